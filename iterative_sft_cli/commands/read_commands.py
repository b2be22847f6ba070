"""`isft samples`, `show`, `why`, `list`, `compare` and `verify`: readers of run directories; they change nothing and take no lock."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from iterative_sft_cli.app import AsJson, app, print_json
from iterative_sft_cli.errors import EXIT_STORAGE, ConfigError, DataError

MAX_BROKEN = 5
"""Runs that cannot be read of which `list` says why."""
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]


@app.command()
def samples(
    run: RunPath,
    round_: Annotated[
        list[int] | None, typer.Option("--round", metavar="N", help="Rounds to look at; the newest by default.")
    ] = None,
    accepted: Annotated[bool, typer.Option("--accepted", help="Only samples that every filter kept.")] = False,
    rejected: Annotated[bool, typer.Option("--rejected", help="Only samples that a filter dropped.")] = False,
    filter_: Annotated[
        str | None, typer.Option("--filter", metavar="NAME", help="Only samples that this filter dropped.")
    ] = None,
    reason: Annotated[
        str | None, typer.Option(metavar="WORD", help="Only samples dropped for this reason, such as wrong_answer.")
    ] = None,
    score: Annotated[
        list[str] | None, typer.Option(metavar="NAME>=X", help="Only samples with such a score, as reward>=0.5.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="ID", help="All samples of one prompt, over all rounds unless --round is given."),
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Samples to print; 0 for all.")] = 20,
    skip: Annotated[int, typer.Option(metavar="N", help="Leave out the first N: the next page.")] = 0,
    eval_: Annotated[
        bool, typer.Option("--eval", help="The samples of the evaluation instead; accepted means correct.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Print long texts whole.")] = False,
    tui: Annotated[bool, typer.Option("--tui", help="Browse them on the whole screen (extra: tui).")] = False,
    as_json: AsJson = False,
) -> int:
    """Print the samples of RUN: what was asked, what was answered, and what each filter said."""
    from iterative_sft_cli.report.query import (
        SampleQuery,
        ScoreCondition,
        check_rounds,
        filter_names,
        find_samples,
        sampled_rounds,
        thinned_rounds,
        unjudged,
    )
    from iterative_sft_cli.report.reader import Run
    from iterative_sft_cli.report.sample_text import print_sample, sample_row
    from iterative_sft_cli.report.screen import print_rows, say, screen

    if accepted and rejected:
        raise ConfigError("--accepted and --rejected exclude each other", hint="leave both out to see all samples")
    if limit < 0 or skip < 0:
        raise ConfigError("--limit and --skip count samples", expected="0 or more")
    opened = Run.open(run)
    there = sampled_rounds(opened.view, evaluation=eval_)
    if not there:
        say(f"{run}: no samples yet")
        if as_json:
            print("[]")
        return 0
    wanted = tuple(round_) if round_ else (tuple(there) if prompt is not None else (there[-1],))
    check_rounds(opened.view, wanted, evaluation=eval_)
    thinned = {} if eval_ else thinned_rounds(opened.view)
    if filter_ is not None and filter_ not in (names := filter_names(opened.view)):
        raise ConfigError(f"--filter {filter_}: no filter of this run", expected=f"one of {', '.join(names)}")
    query = SampleQuery(
        rounds=wanted,
        accepted=True if accepted else False if rejected else None,
        filter_name=filter_,
        reason=reason,
        prompt_id=prompt,
        scores=tuple(ScoreCondition.parse(text) for text in score or ()),
        evaluation=eval_,
    )
    if tui:
        browser(opened.view, query, there, as_json=as_json).run()
        return 0
    found = find_samples(opened.view, query, skip=skip)
    page = found if limit == 0 else islice(found, limit)
    if as_json:
        shown = print_rows(sample_row(stored) for stored in page)
    else:
        rich, shown, before = screen(), 0, None
        for stored in page:
            here = (stored.sample.round_index, stored.sample.prompt_id)
            if shown == 0 or (len(wanted) > 1 and before is not None and before[0] != here[0]):
                rich.print(f"--- round {here[0]}\n")
            print_sample(rich, stored, full=full, with_prompt=here != before and (prompt is None or before is None))
            shown, before = shown + 1, here
    where = f"round {wanted[0]}" if len(wanted) == 1 else "these rounds"
    if not shown:
        waiting = 0 if eval_ else unjudged(opened.view, wanted)
        say(
            f"no {'further ' if skip else ''}sample of {where} is as asked"
            + (f"; {waiting} are not judged yet" if waiting else "")
        )
    elif limit and shown == limit:
        say(f"{shown} samples of {where}; --skip {skip + shown} shows the next, --limit 0 all")
    left = [str(index) for index in wanted if index in thinned]
    if left:
        say(f"round {', '.join(left)}: only the accepted samples were kept (samples.keep: accepted)")
    return 0


def browser(view: Any, query: Any, there: list[int], *, as_json: bool) -> Any:
    """The browser of `--tui`. Raises ConfigError where it cannot be shown."""
    import sys

    if as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            "--tui needs a terminal, and no --json beside it", hint="isft samples prints them page by page"
        )
    try:
        from iterative_sft_cli.report.browse import Browser
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--tui needs {error.name}, which is not installed", hint="pip install 'iterative-sft-cli[tui]'"
        ) from error
    return Browser(view, query, there)


@app.command()
def show(
    run: RunPath,
    watch: Annotated[
        float | None, typer.Option(metavar="S", help="Print anew every S seconds until the run has ended.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Print how RUN stands: status, rounds, curves, the funnel of each, lineage; also while it goes on."""
    from iterative_sft_cli.report.reader import Run
    from iterative_sft_cli.report.show import print_show, summary
    from iterative_sft_cli.report.show import watch as keep_watching

    if watch is not None and (as_json or watch <= 0):
        raise ConfigError("--watch takes seconds, and no --json beside it", expected="such as --watch 5")
    if as_json:
        print_json(summary(Run.open(run)))
    elif watch is not None:
        keep_watching(run, watch)
    else:
        print_show(Run.open(run))
    return 0


@app.command()
def why(
    run: RunPath,
    sample_id: Annotated[
        str, typer.Argument(metavar="SAMPLE_ID", help="A sample's id, such as 2-p17-0.", show_default=False)
    ],
    eval_: Annotated[bool, typer.Option("--eval", help="A sample of the round's evaluation instead.")] = False,
    as_json: AsJson = False,
) -> int:
    """Tell the whole story of one sample: seed, decoding, weights, every verdict, and the steps it trained in."""
    from iterative_sft_cli.report.reader import Run
    from iterative_sft_cli.report.screen import screen
    from iterative_sft_cli.report.why import print_story, story_of

    story = story_of(Run.open(run), sample_id, evaluation=eval_)
    if as_json:
        print_json(story)
    else:
        print_story(screen(), story)
    return 0


@app.command(name="list")
def list_(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A folder of runs; `runs` by default.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Print the runs below DIR with their status and figures."""
    from iterative_sft_cli.report.runs import COLUMNS, cells, list_runs
    from iterative_sft_cli.report.screen import print_rows, say, screen, table

    where = folder or (Path("runs") if Path("runs").is_dir() else Path("."))
    if not where.is_dir():
        raise DataError("there is no such folder", where=str(where), expected="a folder of runs")
    found = list_runs(where)
    if as_json:
        print_rows(found)
    elif found:
        screen().print(table(COLUMNS, map(cells, found)))
        broken = [row for row in found if row["error"] is not None]
        for row in broken[:MAX_BROKEN]:
            say(f"{row['run']}: {row['error'].splitlines()[0]}")
        if len(broken) > MAX_BROKEN:
            say(f"{len(broken) - MAX_BROKEN} more cannot be read; --json says why")
    if not found:
        say(f"{where}: no runs here")
    return 0


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Run directories, or patterns.", show_default=False)
    ],
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="pass@1, maj@4, greedy ...; eval.metric by default.")
    ] = None,
    at: Annotated[str, typer.Option(metavar="ROUND", help="Which evaluation: last, best, or a round.")] = "last",
    limit: Annotated[int, typer.Option(metavar="N", help="Prompts to show that were gained, and lost.")] = 5,
    as_json: AsJson = False,
) -> int:
    """Compare RUNs: two paired by prompt with a p-value, more in a table; one with its own starting model."""
    from iterative_sft_cli.report.compare import choose_round, compare_two, read_side
    from iterative_sft_cli.report.compare_many import compare_many, expand
    from iterative_sft_cli.report.compare_text import print_many, print_two
    from iterative_sft_cli.report.reader import Run
    from iterative_sft_cli.report.screen import screen

    paths = expand(runs)
    if len(paths) > 2:
        table = compare_many(paths, at, metric)
        if as_json:
            print_json(table)
        else:
            print_many(screen(), table)
        return 0
    opened = [Run.open(path) for path in paths]
    name = metric or opened[0].metric.removeprefix("eval/")
    sides = [read_side(run, choose_round(run, at), name) for run in opened]
    if len(sides) == 1:
        sides.insert(0, read_side(opened[0], choose_round(opened[0], "0"), name))
    found = compare_two(sides[0], sides[1], num_examples=limit)
    if as_json:
        print_json(found)
    else:
        print_two(screen(), found)
    return 0


@app.command()
def verify(run: RunPath, as_json: AsJson = False) -> int:
    """Read every byte of RUN that a checksum vouches for; exit 4 when something is not as it was written."""
    from iterative_sft_cli.report.screen import print_rows, say, screen, table
    from iterative_sft_cli.rundir import verify as check

    found = check(run)
    damaged = [one for one in found if one.damage]
    if as_json:
        print_rows({"path": one.path, "problem": one.problem, "damage": one.damage} for one in found)
    elif found:
        rows = [("damage" if one.damage else "note", one.path, one.problem) for one in found]
        screen().print(table((("", "left"), ("file", "left"), ("finding", "left")), rows))
    if damaged:
        say(
            f"{run}: {len(damaged)} damaged; `isft resume {run}` puts right what it needs, and keeps the rest in quarantine/"
        )
        return EXIT_STORAGE
    say(f"{run}: every checksum holds" + (f"; {len(found)} notes, none of them damage" if found else ""))
    return 0
