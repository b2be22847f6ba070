"""`isft refilter`, `report` and `export`: what is made of a finished run, without generating again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from iterative_sft_cli.app import AsJson, app, echo, print_json
from iterative_sft_cli.errors import ConfigError

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]


@app.command()
def refilter(
    run: RunPath,
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG]", help="A config with other filters; the stored one by default.", show_default=False
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ...]", help="Overrides such as filters[1].min=0.5.", show_default=False),
    ] = None,
    round_: Annotated[
        int | None, typer.Option("--round", metavar="N", help="The round; the newest by default.")
    ] = None,
    fork: Annotated[
        Path | None, typer.Option("--fork", metavar="NEW", help="Make a run directory NEW that trains on from there.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Examples to show of what was gained, and lost.")] = 5,
    as_json: AsJson = False,
) -> int:
    """Decide again over the stored samples of a round with other filters: what is gained, what is lost."""
    from iterative_sft_cli.config import load_config
    from iterative_sft_cli.experiment import stored_config
    from iterative_sft_cli.filters import resolve_filters
    from iterative_sft_cli.report.again import check_possible, difference, judge_again
    from iterative_sft_cli.report.fork import check_config
    from iterative_sft_cli.report.fork import fork as make_fork
    from iterative_sft_cli.report.reader import Run
    from iterative_sft_cli.report.refilter_text import print_difference
    from iterative_sft_cli.report.screen import say, screen

    given = list(overrides or [])
    if config is not None and "=" in config and not Path(config).exists():
        given.insert(0, config)
        config = None
    opened = Run.open(run)
    if not opened.rounds:
        raise ConfigError(f"{run}: no samples yet")
    index = opened.rounds[-1] if round_ is None else round_
    check_possible(opened, index)
    extra = given if fork is None else [*given, f"output_dir={fork}"]
    loaded = stored_config(run, extra) if config is None else load_config(Path(config), extra)
    assert loaded is not None
    loaded = loaded.continuing(opened.config)
    if fork is not None:
        check_config(opened, loaded)
    filters = resolve_filters(loaded.config.filters, base_dir=loaded.base_dir)
    again = judge_again(opened, index, filters, loaded.config, loaded.base_dir)
    found = difference(opened, again, num_examples=limit)
    if as_json:
        print_json(found)
    else:
        print_difference(screen(), found)
    if fork is not None:
        for note in make_fork(opened, index, loaded, filters, fork):
            say(f"note: {note}")
        place = shlex.quote(str(fork))
        words = (
            shlex.join(["isft", "train", config, *given, "--output-dir", str(fork)])
            if config
            else f"isft resume {place}"
        )
        say(f"{fork}: round {index} is to be judged anew and trained")
        say(f"next: {words}")
    return 0


@app.command()
def report(
    run: RunPath,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The page; RUN/report.html by default.")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option("--plots", metavar="DIR", help="Write the curves as PNG files into DIR instead (extra: plots)."),
    ] = None,
) -> int:
    """Write RUN as one HTML file that opens anywhere, without a network; or its curves as pictures."""
    from iterative_sft_cli.report.html import write_report
    from iterative_sft_cli.report.reader import Run
    from iterative_sft_cli.report.screen import say

    if plots is not None:
        from iterative_sft_cli.report.plots import write_plots

        if out is not None:
            raise ConfigError("--out names the page, which --plots does not write", expected="one of the two")
        for path in write_plots(Run.open(run), plots):
            echo(str(path))
        return 0
    target = out or run / "report.html"
    size = write_report(Run.open(run), target)
    echo(str(target))
    say(f"{size / 1000:,.0f} kB")
    return 0


@app.command()
def export(
    run: RunPath,
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="FORM", help="hf, vllm, adapter, ollama, gguf, sft-jsonl, dpo-jsonl, inspect or hub."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PATH", help="Where to; RUN/export/FORM by default.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="KEY", help="best, last, or a checkpoint such as 0002; the best by default.")
    ] = None,
    round_: Annotated[
        list[int] | None,
        typer.Option("--round", metavar="N", help="Rounds whose samples (or evaluations) to export; all by default."),
    ] = None,
    repo: Annotated[str | None, typer.Option(metavar="USER/NAME", help="The repository, for --to hub.")] = None,
    push: Annotated[
        bool, typer.Option("--push", help="Upload, for --to hub; without it only what would be is printed.")
    ] = False,
    chosen: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="For --to dpo-jsonl: the prompts' column that holds the better answer (SPIN)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Hand RUN over: a model folder, an adapter, a Modelfile, a GGUF file, its samples as training data, or its evaluations."""
    from iterative_sft_cli.report.export import export as do_export
    from iterative_sft_cli.report.reader import Run
    from iterative_sft_cli.report.screen import say

    made = do_export(
        Run.open(run),
        to,
        out=out,
        checkpoint=checkpoint,
        rounds=round_,
        repo=repo,
        push=push,
        chosen_column=chosen,
    )
    if as_json:
        print_json(made)
        return 0
    if made["out"]:
        echo(made["out"])
    for name, size in made.get("files", {}).items():
        echo(f"{size:>14,}  {name}")
    facts = ("rows", "checkpoint", "architecture", "dtype", "eos_token_id", "bytes")
    say(", ".join(f"{name} {made[name]}" for name in facts if made.get(name) is not None))
    if made.get("files") and not made["pushed"]:
        say("nothing was uploaded")
    if made["next"]:
        say(f"next: {made['next']}")
    return 0
