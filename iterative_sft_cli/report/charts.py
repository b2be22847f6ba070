"""Charts as inline SVG: drawn here, so that a page needs neither a script nor a request to show them.

Colours come from the page's style sheet (classes `s0` to `s7`), so they follow light and dark; every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from iterative_sft_cli.console import safe_text

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 32
NUM_COLOURS = 8


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: (x, y) points, y None where there is no figure; `band` are (x, low, high)."""

    name: str
    points: Sequence[tuple[float, float | None]]
    band: Sequence[tuple[float, float, float]] = field(default_factory=tuple)

    @property
    def known(self) -> list[tuple[float, float]]:
        """The points that have a figure."""
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most about `most`."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    scale = 10 ** math.floor(math.log10(raw))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(most + 2) if (first + i) * step <= high + step * 1e-9]


def label(value: float) -> str:
    """A number at an axis or in a tooltip."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.4g}"


def text_at(x: float, y: float, text: object, *, anchor: str = "middle", kind: str = "tick") -> Markup:
    """A piece of text in a drawing."""
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>').format(
        _n(x), _n(y), anchor, kind, safe_text(text)
    )


def frame(content: Markup, what: str, height: float = HEIGHT) -> Markup:
    """A drawing with its description for those who do not see it."""
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}" class="chart">{}</svg>').format(
        WIDTH, _n(height), safe_text(what), content
    )


def legend(names: Sequence[str]) -> Markup:
    """The names of a chart's curves, each beside its colour."""
    items = [
        Markup('<span class="key"><i class="b{}"></i>{}</span>').format(i % NUM_COLOURS, safe_text(name))
        for i, name in enumerate(names)
    ]
    return Markup('<p class="legend">{}</p>').format(Markup("").join(items))


def line_chart(lines: Sequence[Line], *, x_name: str, y_range: tuple[float, float] | None = None, what: str) -> Markup:
    """Curves over rounds or steps, with their bands; nothing when no curve has a point."""
    shown = [one for one in lines if one.known]
    if not shown:
        return Markup("")
    xs = [x for one in shown for x, _ in one.known]
    ys = [y for one in shown for _, y in one.known] + [v for one in shown for _, *pair in one.band for v in pair]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = _range(ys, y_range)

    def px(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (min(max(y, y_low), y_high) - y_low) / (y_high - y_low)

    parts = [_axis_y(y_low, y_high, py)]
    whole = [value for value in ticks(x_low, x_high, 8) if float(value).is_integer()]
    parts += [text_at(px(x), HEIGHT - BOTTOM + 14, int(x)) for x in whole or [x_low]]
    parts.append(text_at((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_name, kind="name"))
    # the first curve is the one that matters: it is drawn last, on top
    for index, one in reversed(list(enumerate(lines))):
        colour = index % NUM_COLOURS
        if one.band:
            upper = [f"{_n(px(x))},{_n(py(high))}" for x, _, high in one.band]
            lower = [f"{_n(px(x))},{_n(py(low))}" for x, low, _ in reversed(one.band)]
            parts.append(Markup('<polygon class="b{} band" points="{}"/>').format(colour, " ".join(upper + lower)))
        points = one.known
        if not points:
            continue
        way = " ".join(f"{_n(px(x))},{_n(py(y))}" for x, y in points)
        parts.append(Markup('<polyline class="s{}" points="{}"/>').format(colour, way))
        if len(points) <= 60:
            parts += [
                Markup('<circle class="b{}" cx="{}" cy="{}" r="3"><title>{}: {} {}: {}</title></circle>').format(
                    colour, _n(px(x)), _n(py(y)), safe_text(one.name), x_name, label(x), label(y)
                )
                for x, y in points
            ]
    names = legend([one.name for one in lines]) if len(lines) > 1 else Markup("")
    return frame(Markup("").join(parts), what) + names


def stacked_bars(
    columns: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], *, x_name: str, what: str
) -> Markup:
    """A bar a column, its parts on top of one another; each part's share of the highest bar is drawn."""
    top = max((sum(values) for _, values in columns), default=0.0)
    if top <= 0:
        return Markup("")

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / top

    width = (WIDTH - LEFT - RIGHT) / max(1, len(columns))
    every = math.ceil(len(columns) / 16)
    parts = [_axis_y(0.0, top, py)]
    for place, (column, values) in enumerate(columns):
        x, base = LEFT + place * width, 0.0
        for index, value in enumerate(values):
            if value > 0:
                parts.append(
                    Markup(
                        '<rect class="b{}" x="{}" y="{}" width="{}" height="{}"><title>{} {}, {}: {}</title></rect>'
                    ).format(
                        index % NUM_COLOURS,
                        _n(x + width * 0.12),
                        _n(py(base + value)),
                        _n(width * 0.76),
                        _n(py(base) - py(base + value)),
                        x_name,
                        safe_text(column),
                        safe_text(names[index]),
                        label(value),
                    )
                )
            base += value
        if place % every == 0:
            parts.append(text_at(x + width / 2, HEIGHT - BOTTOM + 14, column))
    parts.append(text_at((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_name, kind="name"))
    return frame(Markup("").join(parts), what) + legend(list(names))


def funnel_chart(rows: Sequence[tuple[str, int, int]], what: str) -> Markup:
    """A bar a filter: how many entered (the whole bar) and how many were left (its dark part)."""
    if not rows or not rows[0][1]:
        return Markup("")
    most = max(entered for _, entered, _ in rows)
    parts = []
    for place, (name, entered, left) in enumerate(rows):
        y = place * 40
        full, part = (WIDTH - 2) * entered / most, (WIDTH - 2) * left / most
        parts.append(text_at(0, y + 12, name, anchor="start", kind="bar-name"))
        parts.append(text_at(WIDTH, y + 12, f"{entered:,} in, {left:,} left", anchor="end"))
        parts.append(Markup('<rect class="faint" x="0" y="{}" width="{}" height="14"/>').format(y + 17, _n(full)))
        parts.append(Markup('<rect class="b0" x="0" y="{}" width="{}" height="14"/>').format(y + 17, _n(part)))
    return frame(Markup("").join(parts), what, height=len(rows) * 40)


def _range(values: Sequence[float], wanted: tuple[float, float] | None) -> tuple[float, float]:
    if wanted is not None:
        return wanted
    low, high = min(values), max(values)
    if high == low:
        margin = abs(high) * 0.1 or 1.0
        return low - margin, high + margin
    margin = (high - low) * 0.06
    return (0.0 if 0 <= low < (high - low) else low - margin), high + margin


def _axis_y(low: float, high: float, place: Callable[[float], float]) -> Markup:
    parts = []
    for value in ticks(low, high):
        y = place(value)
        parts.append(
            Markup('<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, _n(y), _n(y))
        )
        parts.append(text_at(LEFT - 5, y + 3.5, label(value), anchor="end"))
    return Markup("").join(parts)


def _n(value: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")
