"""The typer app, and what its commands share: arguments, options, printing. stdout is data, stderr is everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="isft",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Iterative supervised fine-tuning: generate, filter, train, repeat, from one YAML file.",
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Overrides such as generate.temperature=0.7.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout instead of text.")]


def print_json(value: Any) -> None:
    """One JSON document on stdout; ASCII only, so no terminal sequence survives."""
    print(json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False))


def echo(text: str = "") -> None:
    """A line of data on stdout, escaped."""
    from iterative_sft_cli.console import safe_text

    print(safe_text(text))
