"""`isft show`: status, table of rounds, curves, the funnel of each round and the lineage; also while the run goes on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from iterative_sft_cli.console import duration, one_line, safe_text
from iterative_sft_cli.report.lineage import describe, lineage
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.report.screen import console, number, sparkline, table
from iterative_sft_cli.report.status import COMPLETE, KILLED, RUNNING, STOPPED, status_of
from iterative_sft_cli.rundir.cost import share_blocked

CURVES = (
    ("accepted share", "filters/accept_rate"),
    ("solved share", "filters/solved_rate"),
    ("loss", "train/loss"),
    ("tokens a sample", "generate/mean_tokens"),
    ("cut off share", "generate/truncated_rate"),
    ("distinct-2", "filters/distinct_2"),
)
MAX_REASONS = 6
"""Reasons that are shown of one filter."""
MIN_NAME, ROUND_WIDTH = 16, 12
"""Columns for the names, and for each round, in the table of funnels."""
STYLES = {COMPLETE: "bold green", RUNNING: "bold cyan", STOPPED: "bold yellow", KILLED: "bold red"}


def funnel_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The funnel of a row of statistics: for each filter, in order, how many entered, were dropped, and why."""
    found = []
    for key in row:
        if key.startswith("filters/") and key.endswith("/entered"):
            name = key.removeprefix("filters/").removesuffix("/entered")
            start = f"filters/{name}/reason/"
            reasons = {k.removeprefix(start): int(row[k]) for k in row if k.startswith(start)}
            ordered = dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0])))
            dropped = int(row.get(f"filters/{name}/dropped", 0))
            found.append({"filter": name, "entered": int(row[key]), "dropped": dropped, "reasons": ordered})
    return found


def round_seconds(telemetry: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Seconds of work in each round, over all starts of the run."""
    seconds: dict[int, float] = {}
    for row in telemetry:
        if isinstance(row.get("round"), int) and isinstance(row.get("seconds"), int | float):
            seconds[row["round"]] = seconds.get(row["round"], 0.0) + float(row["seconds"])
    return seconds


def summary(run: Run) -> dict[str, Any]:
    """Everything `isft show` prints, as plain data."""
    stats = run.stats
    telemetry = run.view.telemetry_rows()
    seconds = round_seconds(telemetry)
    blocked = share_blocked(telemetry)
    best = run.best_round
    return {
        "path": str(run.path),
        "run_id": run.view.run_id,
        "model": run.model_name,
        "status": status_of(run.view, run.settings).to_json(),
        "metric": run.metric,
        "best_round": best,
        "checkpoints": run.view.keys,
        "rounds": stats,
        "seconds": {str(index): value for index, value in seconds.items()},
        "safety": None if blocked is None else {"blocked_s": blocked[0], "wall_s": blocked[1]},
        "funnels": [{"round": row["round"], "filters": funnel_of(row)} for row in stats if row["round"] > 0],
        "lineage": lineage(run.view, run.settings),
    }


def print_show(run: Run) -> str:
    """Print a run for people; returns its state."""
    from rich.text import Text

    found = summary(run)
    view = console()
    rich = view.rich
    status = found["status"]
    head = Text(safe_text(run.path))
    head.append(f"  {status['state']}", style=STYLES.get(status["state"], "bold"))
    why = "" if status["state"] == COMPLETE else f": {one_line(status['reason'], 300)}"
    head.append(safe_text(f"{why}, {status['rounds_done']} of {status['rounds']} rounds"))
    rich.print(head, soft_wrap=True)
    rich.print(safe_text(f"model {found['model']}"), soft_wrap=True)
    if status["phase"]:
        sign = "" if status["last_sign_s"] is None else f", last sign of life {duration(status['last_sign_s'])} ago"
        rich.print(safe_text(f"{status['phase']}{sign}"), soft_wrap=True)
    if status["next_command"]:
        rich.print(safe_text(f"next: {status['next_command']}"), soft_wrap=True)
    stats = found["rounds"]
    if stats:
        view.metric = found["metric"]
        rich.print()
        rich.print(view.rounds_table([(row, found["seconds"].get(str(row["round"]))) for row in stats]))
        print_curves(rich, stats, found["metric"])
    if found["funnels"]:
        rich.print()
        rich.print(funnel_table(found["funnels"], rich.width))
    rich.print()
    for row in found["lineage"]:
        rich.print(safe_text(describe(row)), soft_wrap=True)
    if found["best_round"] is not None:
        name = "the starting model" if found["best_round"] == 0 else f"round {found['best_round']}"
        rich.print(safe_text(f"best by {found['metric'].removeprefix('eval/')}: {name}"), soft_wrap=True)
    if found["safety"]:
        blocked, wall = found["safety"]["blocked_s"], found["safety"]["wall_s"]
        share = blocked / wall if wall else 0.0
        rich.print(f"hashing and syncing held the run up for {blocked:.1f} s of {wall:.1f} s ({share:.1%})")
    return str(status["state"])


def print_curves(rich: Any, stats: Sequence[Mapping[str, Any]], metric: str) -> None:
    """A line a figure: its name, a bar a round, first and last value."""
    for name, key in ((metric.removeprefix("eval/"), metric), *CURVES):
        values = [row.get(key) for row in stats]
        known = [value for value in values if value is not None]
        if len(known) > 1:
            line = sparkline(values)
            rich.print(safe_text(f"{name:>16} {line} {number(known[0])} -> {number(known[-1])}"), soft_wrap=True)


def funnel_table(funnels: Sequence[Mapping[str, Any]], width: int) -> Any:
    """The funnels of the rounds side by side, as many of the newest as fit: what each filter left, and below it what it dropped for which
    reason."""
    names = list(dict.fromkeys(one["filter"] for funnel in funnels for one in funnel["filters"]))
    first = max([len(name) for name in names] + [MIN_NAME]) + 4
    shown = funnels[-max(1, (width - first) // ROUND_WIDTH) :]
    by_round = [{one["filter"]: one for one in funnel["filters"]} for funnel in shown]
    rows: list[tuple[object, ...]] = [("generated", *(_entered(funnel) for funnel in shown))]
    for name in names:
        mine = [found.get(name) for found in by_round]
        if not any(mine):
            continue
        rows.append((name, *("-" if one is None else f"{one['entered'] - one['dropped']:,}" for one in mine)))
        counts = Counter[str]()
        for one in mine:
            counts.update((one or {}).get("reasons", {}))
        for reason, _ in counts.most_common(MAX_REASONS):
            dropped = ((one or {}).get("reasons", {}).get(reason) for one in mine)
            rows.append((f"  {reason}", *(f"-{count:,}" if count else "" for count in dropped)))
    columns = [("filter", "left"), *((f"round {funnel['round']}", "right") for funnel in shown)]
    hidden = f" (the newest {len(shown)} of {len(funnels)} rounds)" if len(shown) < len(funnels) else ""
    return table(columns, rows, title=f"what each filter left, and what it dropped{hidden}")


def _entered(funnel: Mapping[str, Any]) -> str:
    return f"{funnel['filters'][0]['entered']:,}" if funnel["filters"] else "-"


def watch(path: Any, every_s: float) -> None:
    """Print the run anew every few seconds while another process works in it; returns when it has ended."""
    rich = console().rich
    while True:
        if rich.is_terminal:
            rich.clear()
        state = print_show(Run.open(path))
        if state != RUNNING:
            return
        if not rich.is_terminal:
            rich.print()
        time.sleep(every_s)
