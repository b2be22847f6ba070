"""`isft ask`, `doctor` and `fetch`: commands about the model of a run or a config; none of them writes into a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from iterative_sft_cli.app import AsJson, Config, Overrides, app, print_json
from iterative_sft_cli.errors import EXIT_CONFIG


@app.command()
def ask(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help="The question; - reads it from stdin.", show_default=False)
    ],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="KEY", help="best, last, or a checkpoint such as 0002; the best by default.")
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Answers from each model.")] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="Decode without sampling.")] = False,
    as_json: AsJson = False,
) -> int:
    """Ask the starting model and the best checkpoint of RUN the same TEXT, side by side."""
    from iterative_sft_cli.report.ask import ask as do_ask
    from iterative_sft_cli.report.ask import print_answers
    from iterative_sft_cli.report.reader import Run
    from iterative_sft_cli.report.screen import screen

    question = sys.stdin.read() if text == "-" else text
    found = do_ask(Run.open(run), question, checkpoint=checkpoint, num_samples=samples, greedy=greedy)
    if as_json:
        print_json(found)
    else:
        print_answers(screen(), found)
    return 0


@app.command()
def doctor(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(metavar="N", help="Prompts to make rows of.")] = 2,
    as_json: AsJson = False,
) -> int:
    """Show what CONFIG really trains on: token ids, loss mask, end tokens, learning rates, and whether generation uses what was trained."""
    from iterative_sft_cli.config import load_config
    from iterative_sft_cli.filters import resolve_filters
    from iterative_sft_cli.report.doctor import examine
    from iterative_sft_cli.report.doctor_text import print_findings
    from iterative_sft_cli.report.screen import say, screen

    loaded = load_config(config, list(overrides or []))
    resolve_filters(loaded.config.filters, base_dir=loaded.base_dir)
    found = examine(loaded, num_rows=max(1, rows))
    if as_json:
        print_json(found)
    else:
        print_findings(screen(), found)
    bad = sum(check["ok"] is False for check in found["checks"])
    say(f"{config}: {bad} bad" if bad else f"{config}: healthy")
    return EXIT_CONFIG if bad else 0


@app.command()
def fetch(
    config: Config,
    overrides: Overrides = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Fill the caches in DIR instead of the user's own.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Bring here every model, data set and filter model that CONFIG names, for a machine without a network."""
    from iterative_sft_cli.config import load_config
    from iterative_sft_cli.report import fetch as fetching
    from iterative_sft_cli.report.screen import say, screen, table

    loaded = load_config(config, list(overrides or []))
    if to is not None:
        fetching.use_home(to)
    items = []
    for item in fetching.fetch(loaded):
        items.append(item)
        if not as_json:
            say(f"{item.where}: {item.name}, {item.commit or 'local'}")
    lines = fetching.pins(items)
    if as_json:
        print_json({"items": [item.to_json() for item in items], "pin": lines, "home": str(to) if to else None})
        return 0
    rows = [(one.where, one.kind, one.name, one.commit or "local", f"{one.bytes:,}", one.path) for one in items]
    names = (
        ("key", "left"),
        ("what", "left"),
        ("name", "left"),
        ("commit", "left"),
        ("bytes", "right"),
        ("place", "left"),
    )
    screen().print(table(names, rows))
    for line in lines:
        say(f"pin it: {line}")
    if to is not None:
        say(f"on a machine without a network: HF_HOME={to} HF_HUB_OFFLINE=1 isft train {config}")
    return 0
