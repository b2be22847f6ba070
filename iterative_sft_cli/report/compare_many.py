"""Many runs in a table by their eval figure; runs that differ only in their seed are pooled, with an interval over seeds."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.report.compare import choose_round, cost_of
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.rundir import layout

# the 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
NOT_COMPARED = ("seed", "output_dir", "tracking")


def expand(paths: Sequence[Path]) -> list[Path]:
    """The run directories that paths and patterns name, in order. Raises ConfigError for a pattern that names none."""
    found: list[Path] = []
    for path in paths:
        text = str(path)
        if path.exists() or not glob.has_magic(text):
            found.append(path)
            continue
        matches = [Path(one) for one in sorted(glob.glob(text, recursive=True))]
        runs = [one for one in matches if (one / layout.MARKER).is_file()]
        if not runs:
            raise ConfigError(f"{text}: no run is called like that", hint="isft list DIR shows the runs there are")
        found += runs
    return list(dict.fromkeys(found))


def describe(path: Path, at: str, metric: str | None) -> dict[str, Any]:
    """A run's line: the figure of the wanted round with its interval, and what it cost."""
    run = Run.open(path)
    key = f"eval/{metric}" if metric is not None else run.metric
    index = choose_round(run, at)
    row = next((one for one in run.stats if one["round"] == index), {})
    if row.get(key) is None:
        raise ConfigError(f"{path}: round {index} has no {key}", hint="--metric names a figure that every run has")
    first = next((one for one in run.stats if one["round"] == 0), {})
    return {
        "run": str(path),
        "group": group_of(run),
        "model": run.model_name,
        "seed": run.settings.seed,
        "round": index,
        "metric": key,
        "start": first.get(key),
        "value": row[key],
        "low": row.get(f"{key}_low"),
        "high": row.get(f"{key}_high"),
        **cost_of(run, index),
    }


def group_of(run: Run) -> str:
    """Equal for runs that differ only in their seed: config, and the content of model, data and filters."""
    tree = {key: value for key, value in run.config.items() if key not in NOT_COMPARED}
    hashes = {key: run.view.environment.get(key) for key in ("model", "prompts", "eval", "filters")}
    return json.dumps([tree, hashes], sort_keys=True)


def compare_many(paths: Sequence[Path], at: str, metric: str | None) -> dict[str, Any]:
    """Every run, best first, and the pools of runs that differ only in their seed."""
    rows = sorted((describe(path, at, metric) for path in paths), key=lambda row: (-row["value"], row["run"]))
    if len({row["metric"] for row in rows}) > 1:
        names = ", ".join(sorted({row["metric"] for row in rows}))
        raise ConfigError(f"these runs have different metrics ({names})", hint="--metric pass@1 compares by one")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.pop("group"), []).append(row)
    pools = [pool(members) for members in groups.values() if len(members) > 1]
    return {"metric": rows[0]["metric"], "runs": rows, "pools": pools}


def pool(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds with Student's 95 % interval: how the next seed's mean would vary, which no single run tells."""
    values = [float(row["value"]) for row in members]
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = _T[min(n - 1, len(_T)) - 1] * deviation / math.sqrt(n)
    return {
        "runs": [row["run"] for row in members],
        "seeds": [row["seed"] for row in members],
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "min": min(values),
        "max": max(values),
    }
