"""`isft list`: the runs below a folder, a line each; a damaged one is listed with its damage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import IsftError
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.report.screen import number, sparkline
from iterative_sft_cli.report.status import status_of
from iterative_sft_cli.rundir import layout

MAX_DEPTH = 4
COLUMNS = (
    ("run", "left"),
    ("status", "left"),
    ("rounds", "right"),
    ("metric", "left"),
    ("start", "right"),
    ("last", "right"),
    ("best", "right"),
    ("curve", "left"),
    ("model", "left"),
)


def find_runs(folder: Path) -> Iterator[Path]:
    """The run directories in `folder` and below, in order of their names; what is inside a run is not looked at."""
    for root, folders, files in os.walk(folder):
        depth = len(Path(root).relative_to(folder).parts)
        if layout.MARKER in files:
            yield Path(root)
            folders.clear()
        elif depth >= MAX_DEPTH:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def describe_run(path: Path, shown_as: str) -> dict[str, Any]:
    """One run's line as plain data; `error` says why it cannot be read."""
    try:
        run = Run.open(path)
        status = status_of(run.view, run.settings)
        metric, stats = run.metric, run.stats
        values = [row.get(metric) for row in stats]
        known = [(value, -int(row["round"])) for value, row in zip(values, stats, strict=True) if value is not None]
        return {
            "run": shown_as,
            "run_id": run.view.run_id,
            "state": status.state,
            "reason": status.reason,
            "rounds_done": status.rounds_done,
            "rounds": status.rounds,
            "metric": metric,
            "start": values[0] if stats and stats[0]["round"] == 0 else None,
            "last": known[-1][0] if known else None,
            "best": max(known)[0] if known else None,
            "best_round": run.best_round,
            "curve": values,
            "model": run.model_name,
            "seed": run.settings.seed,
            "error": None,
        }
    except IsftError as error:
        return {"run": shown_as, "state": "unreadable", "error": error.render()}


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Every run below `folder`."""
    return [describe_run(path, str(path.relative_to(folder)) if path != folder else ".") for path in find_runs(folder)]


def cells(row: dict[str, Any]) -> tuple[object, ...]:
    """The cells of a run in the table."""
    if row["error"] is not None:
        return (row["run"], "unreadable", *("-",) * 5, "", "-")
    figures = (number(row["start"]), number(row["last"]), number(row["best"]))
    rounds = f"{row['rounds_done']}/{row['rounds']}"
    metric = row["metric"].removeprefix("eval/")
    return (row["run"], row["state"], rounds, metric, *figures, sparkline(row["curve"]), short_model(row["model"]))


def short_model(name: str) -> str:
    """A model's name without the folders before its own: hub ids stay whole."""
    return name.rstrip("/").rpartition("/")[2] if name.count("/") > 1 or name.startswith((".", "/")) else name
