"""The charts of a run as plain data: what the page's script draws, and the table that says the same without it.

Every name is made visible here, for no escaping of the page reaches what the script writes; no figure is NaN or infinite.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from iterative_sft_cli.console import safe_text

MAX_TABLE_ROWS = 60


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: (x, y) points, y None where there is no figure; `band` are (x, low, high)."""

    name: str
    points: Sequence[tuple[float, float | None]]
    band: Sequence[tuple[float, float, float]] = ()

    @property
    def known(self) -> list[tuple[float, float]]:
        """The points that have a figure."""
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of the page: at every `x` a value of each of `names`, None where there is none; `bands` gives (low, high) beside them.

    `kind` is `lines`, `bars` (stacked) or `funnel` (bars from the left, one over the other; `x` are names).
    """

    kind: str
    what: str
    x_name: str
    y_name: str
    x: Sequence[float | str]
    names: Sequence[str]
    values: Sequence[Sequence[float | None]]
    bands: Sequence[Sequence[tuple[float, float] | None]] = ()
    share: bool = False

    @property
    def data(self) -> str:
        """The chart as JSON, for the script."""
        return json.dumps(
            {
                "kind": self.kind,
                "xName": safe_text(self.x_name),
                "yName": safe_text(self.y_name),
                "x": [safe_text(x) if isinstance(x, str) else x for x in self.x],
                "names": [safe_text(name) for name in self.names],
                "values": [[_short(value) for value in values] for values in self.values],
                "bands": [
                    [None if pair is None else [_short(end) for end in pair] for pair in band] for band in self.bands
                ],
                "share": self.share,
            },
            separators=(",", ":"),
            allow_nan=False,
        )

    @property
    def heads(self) -> list[str]:
        """The heads of the table."""
        return [self.x_name, *self.names]

    @property
    def rows(self) -> list[list[str]]:
        """The table, a row an `x`; every so many of them where there are more than `MAX_TABLE_ROWS`."""
        return [[_cell(x), *self._cells(place)] for place, x in enumerate(self.x)][:: self.every]

    @property
    def every(self) -> int:
        """Which rows the table shows: all, or every so many."""
        return math.ceil(len(self.x) / MAX_TABLE_ROWS) or 1

    def _cells(self, place: int) -> list[str]:
        cells = []
        for index, values in enumerate(self.values):
            pair = self.bands[index][place] if self.bands else None
            interval = "" if pair is None else f" ({_cell(pair[0])} to {_cell(pair[1])})"
            cells.append(_cell(values[place]) + interval)
        return cells


def line_chart(
    lines: Sequence[Line], *, what: str, y_name: str, x_name: str = "round", share: bool = False
) -> Chart | None:
    """Curves over rounds or steps, with their bands; None when no curve has a point. `share` keeps 0 to 1 in view."""
    shown = [(line, dict(line.known)) for line in lines]
    xs = sorted({x for _, known in shown for x in known})
    if not xs:
        return None
    bands = [{x: (low, high) for x, low, high in line.band} for line in lines]
    return Chart(
        "lines",
        what,
        x_name,
        y_name,
        xs,
        [line.name for line in lines],
        [[known.get(x) for x in xs] for _, known in shown],
        [[band.get(x) for x in xs] for band in bands],
        share,
    )


def stacked_bars(
    columns: Sequence[tuple[float, Sequence[float]]], names: Sequence[str], *, what: str, y_name: str
) -> Chart | None:
    """A bar a round, its parts on top of one another; None when all are empty."""
    if not any(value > 0 for _, values in columns for value in values):
        return None
    values = [[column[index] for _, column in columns] for index in range(len(names))]
    return Chart("bars", what, "round", y_name, [x for x, _ in columns], names, values)


def funnel_chart(rows: Sequence[tuple[str, int, int]], what: str) -> Chart | None:
    """A bar a filter: how many entered, and in front of it how many were left; None when nothing entered."""
    if not any(entered for _, entered, _ in rows):
        return None
    names, entered, left = zip(*rows, strict=True)
    return Chart("funnel", what, "filter", "samples", names, ["entered", "left"], [entered, left])


def _short(value: float | None) -> float | None:
    """A figure for the page, to six digits; None for one that cannot be drawn."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _cell(value: float | str | None) -> str:
    """A figure in a table."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"
