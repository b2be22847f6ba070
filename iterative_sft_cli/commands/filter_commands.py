"""`isft filters list|show|test`: what filters there are, what one does, and what one says of stored samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iterative_sft_cli.app import AsJson, app, echo, print_json
from iterative_sft_cli.errors import EXIT_PLUGIN

filters_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, explain and try out filters.")
app.add_typer(filters_app, name="filters")

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A built-in, an installed name, pkg.mod:attr or file.py:attr.", show_default=False
    ),
]


@filters_app.command("list")
def list_command(as_json: AsJson = False) -> int:
    """Print every built-in and installed filter, with the distribution it comes from."""
    from iterative_sft_cli.filters.catalog import list_filters

    rows = list_filters()
    if as_json:
        print_json([row.to_row() for row in rows])
        return 0
    from iterative_sft_cli.report.screen import say, screen, table

    built_in = [(row.name, row.kind, row.role, row.summary) for row in rows if row.kind is not None]
    headers = (("built-in", "left"), ("sees", "left"), ("role", "left"), ("", "left"))
    screen().print(table(headers, built_in))
    installed = [(row.name, row.source, row.place) for row in rows if row.kind is None]
    if installed:
        screen().print()
        screen().print(table((("installed", "left"), ("from", "left"), ("place", "left")), installed))
    say("isft filters show NAME: arguments, cost; your own: isft init --filter")
    return 0


@filters_app.command("show")
def show_command(name: Name) -> int:
    """Print what a filter keeps, its arguments and what it costs."""
    from iterative_sft_cli.filters.catalog import show_filter

    echo(show_filter(name, base_dir=Path.cwd()))
    return 0


@filters_app.command("test")
def test_command(
    name: Name,
    samples: Annotated[
        Path,
        typer.Argument(
            metavar="SAMPLES",
            help="JSONL with at least `completion`; `answer` and other columns as the filter needs.",
            show_default=False,
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[name=value ...]", help="Arguments of the filter.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(help="Rows of the table; the counts are of all samples.")] = 20,
    as_json: AsJson = False,
) -> int:
    """Run one filter over the samples of a file, without a model: verdicts, reasons and times. Exit 5 when it fails."""
    from iterative_sft_cli.filters.catalog import entry_for, read_samples, test_filter

    tested = test_filter(entry_for(name, arguments or []), read_samples(samples), base_dir=Path.cwd())
    if as_json:
        print_json(
            {"rows": [row.to_row() for row in tested.rows], "start_s": tested.start_s, "total_s": tested.total_s}
        )
        return EXIT_PLUGIN if tested.failed else 0
    from collections import Counter

    from iterative_sft_cli.console import one_line
    from iterative_sft_cli.report.screen import number, screen, table

    shown = [
        (
            one_line(row.sample_id, 24),
            "error" if row.keep is None else "keep" if row.keep else "drop",
            number(row.score, 4),
            one_line(row.reason or "-", 24),
            f"{row.seconds * 1e3:.2f}" if row.timed else "-",
            one_line(row.completion, 60),
        )
        for row in tested.rows[:limit]
    ]
    columns = (("sample", "left"), ("", "left"), ("score", "right"), ("reason", "left"), ("ms", "right"), ("", "left"))
    screen().print(table(columns, shown))
    errors = [row for row in tested.rows if row.error is not None]
    for row in errors[:limit]:
        echo(f"{one_line(row.sample_id, 24)}: {one_line(row.error or '', 400)}")
    kept = sum(row.keep is True for row in tested.rows)
    reasons = Counter(row.reason or "rejected" for row in tested.rows if row.keep is False)
    why = f" ({', '.join(f'{word} {count}' for word, count in reasons.most_common(4))})" if reasons else ""
    total = len(tested.rows)
    timed = [row.seconds for row in tested.rows if row.timed]
    each = f", then {1e3 * sum(timed) / len(timed):.2f} ms a sample" if timed else ""
    more = f"; {total - limit} more rows with --limit" if total > limit else ""
    echo()
    echo(f"{total} samples: {kept} kept, {total - kept - len(errors)} dropped{why}, {len(errors)} errors{more}")
    echo(f"{tested.start_s:.2f} s to start{each}")
    return EXIT_PLUGIN if tested.failed else 0
