"""`isft report --plots DIR`: the curves of a run as PNG files for papers. Needs the extra `plots` (matplotlib).

The figures are those of the HTML report, from the same functions; no text of a run is read as markup or mathematics.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.console import one_line
from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.report.charts import Line
from iterative_sft_cli.report.page_data import DIVERSITY, LENGTHS, RATES, curves, eval_keys, step_curves
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.report.show import funnel_of

SIZE, DPI = (5.0, 3.4), 200
MAX_NAME = 60


def write_plots(run: Run, folder: Path) -> list[Path]:
    """Write a PNG a chart into `folder`; a chart without figures is left out. Raises ConfigError without matplotlib, DataError without a round."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--plots needs {error.name}, which is not installed", hint="pip install 'iterative-sft-cli[plots]'"
        ) from error
    stats = run.stats
    rounds = [row for row in stats if row["round"] > 0]
    loss, rate = step_curves(run)
    charts: list[tuple[str, str, str, Sequence[Line], bool]] = [
        ("eval", "held-out accuracy", "round", curves(stats, eval_keys(stats, run.metric)), True),
        ("accepted", "share", "round", curves(rounds, RATES), True),
        ("diversity", "diversity of what was accepted", "round", curves(rounds, DIVERSITY), True),
        ("length", "tokens a completion", "round", curves(rounds, LENGTHS), False),
        ("loss", "training loss", "optimizer step", [loss], False),
        ("learning-rate", "learning rate", "optimizer step", [rate], False),
    ]
    charts = [chart for chart in charts if any(line.known for line in chart[3])]
    if not charts:
        raise DataError("there is nothing to draw yet", where=str(run.path), hint="wait for the first round")
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def save(figure: Any, name: str) -> None:
        temp, target = folder / f".{name}.part.png", folder / f"{name}.png"
        FigureCanvasAgg(figure).print_png(str(temp), metadata={"Software": None})
        os.replace(temp, target)
        written.append(target)

    for name, label, x_name, lines, share in charts:
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        draw_lines(axes, lines, whole=x_name == "round")
        axes.set_xlabel(x_name)
        axes.set_ylabel(label)
        if share:
            axes.set_ylim(0, 1)
        save(figure, name)
    if any(funnel_of(row) for row in rounds):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        draw_funnel(figure.add_subplot(), rounds)
        save(figure, "funnel")
    return written


def draw_lines(axes: Any, lines: Sequence[Line], *, whole: bool) -> None:
    """The curves with their intervals; `whole` puts ticks at whole numbers only."""
    for line in lines:
        known = line.known
        if not known:
            continue
        xs, ys = [x for x, _ in known], [y for _, y in known]
        [drawn] = axes.plot(xs, ys, marker="o" if len(xs) < 40 else None, markersize=3, label=plain(line.name))
        if line.band:
            bounds = [[point[i] for point in line.band] for i in range(3)]
            axes.fill_between(*bounds, color=drawn.get_color(), alpha=0.2, linewidth=0)
    if whole:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=7, frameon=False)


def draw_funnel(axes: Any, rounds: Sequence[dict[str, Any]]) -> None:
    """What each filter left, a line a filter, as a share of what was generated."""
    names = list(dict.fromkeys(one["filter"] for row in rounds for one in funnel_of(row)))
    lines = []
    for name in names:
        points = []
        for row in rounds:
            funnel = funnel_of(row)
            mine = next((one for one in funnel if one["filter"] == name), None)
            left = None if mine is None or not funnel[0]["entered"] else mine["entered"] - mine["dropped"]
            points.append((float(row["round"]), None if left is None else left / funnel[0]["entered"]))
        lines.append(Line(f"after {name}", points))
    draw_lines(axes, lines, whole=True)
    axes.set_xlabel("round")
    axes.set_ylabel("share of the samples that is left")
    axes.set_ylim(0, 1)


def plain(name: str) -> str:
    """A name that matplotlib draws as it is: no mathematics, no leading underscore (which hides a legend's entry)."""
    text = one_line(name, MAX_NAME).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
