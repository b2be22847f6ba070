"""Data on stdout: tables and blocks for people, one JSON document for programs; every foreign text escaped.

On a terminal lines fit its width and carry colour unless NO_COLOR is set; elsewhere nothing is cut and nothing is coloured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from iterative_sft_cli.console import Console, safe_text

WIDE = 200
"""Columns where there is no terminal: a table is never cut for a width that nobody has."""
BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-~=*#@"


def screen() -> Any:
    """A rich console on stdout."""
    rich = Console(sys.stdout).rich
    if not rich.is_terminal:
        rich.width = WIDE
    return rich


def console() -> Console:
    """The run's console, on stdout: for its tables."""
    made = Console(sys.stdout)
    if not made.rich.is_terminal:
        made.rich.width = WIDE
    return made


def say(text: str) -> None:
    """One line beside the data, on stderr."""
    print(safe_text(text), file=sys.stderr)


def print_rows(rows: Iterable[Mapping[str, Any]]) -> int:
    """One JSON array, written row by row so that its length does not matter; returns how many rows it has."""
    count = 0
    sys.stdout.write("[")
    for row in rows:
        text = json.dumps(row, ensure_ascii=True, allow_nan=False)
        sys.stdout.write(("," if count else "") + "\n " + text)
        count += 1
    sys.stdout.write("\n]\n" if count else "]\n")
    return count


def unicode_ok() -> bool:
    """Whether stdout can show block characters."""
    return (sys.stdout.encoding or "ascii").lower().replace("-", "").startswith("utf")


def sparkline(values: Iterable[float | None], *, plain: bool | None = None) -> str:
    """A bar a value, from the lowest to the highest; a blank for a missing one."""
    given = list(values)
    known = [value for value in given if value is not None]
    if not known:
        return ""
    bars = PLAIN_BARS if (not unicode_ok() if plain is None else plain) else BARS
    low, span = min(known), max(known) - min(known)
    top = len(bars) - 1
    return "".join(
        " " if value is None else bars[top // 2 if span == 0 else round((value - low) / span * top)] for value in given
    )


def table(columns: Iterable[tuple[str, str]], rows: Iterable[Iterable[object]], *, title: str | None = None) -> Any:
    """A rich table of (name, justify) columns; every cell is escaped. Print it with `screen().print`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        box=box.SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
        show_edge=False,
    )
    for name, justify in columns:
        made.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*(Text(safe_text("-" if cell is None else cell)) for cell in row))
    return made


def number(value: Any, digits: int = 3) -> str:
    """A figure in a cell; '-' where there is none."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,d}" if isinstance(value, int) else f"{value:.{digits}g}"
