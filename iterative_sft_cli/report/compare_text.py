"""A comparison as people read it."""

from __future__ import annotations

from typing import Any

from iterative_sft_cli.console import duration, one_line, prompt_text, safe_text
from iterative_sft_cli.report.compare import curves
from iterative_sft_cli.report.screen import number, table


def print_two(rich: Any, found: dict[str, Any]) -> None:
    """Two runs: the verdict first, then what changed, then curves, config and cost."""
    a, b = found["runs"]
    paired, metric = found["paired"], found["metric"]

    def line(text: str = "") -> None:
        rich.print(safe_text(text), soft_wrap=True)

    for name, one in (("A", a), ("B", b)):
        line(f"{name}: {one['run']}, round {one['round']}, {one['model']}, seed {one['seed']}")
        line(f"   {metric} {number(one['value'])}{interval(one['low'], one['high'])}")
    sign = "+" if paired["difference"] >= 0 else ""
    line()
    line(
        f"B - A: {sign}{paired['difference']:.3f}{interval(paired['difference_low'], paired['difference_high'])} over "
        f"{paired['num_prompts']} prompts; gained {paired['gained']}, lost {paired['lost']}, p = {paired['p_value']:.2g} "
        f"(exact sign test)"
    )
    for note in found["notes"]:
        line(f"note: {note}")
    for word in ("gained", "lost"):
        if found[word]:
            line()
            rows: list[tuple[object, ...]] = [
                (
                    one["prompt_id"],
                    f"{one['before']:.2f}",
                    f"{one['after']:.2f}",
                    one_line(prompt_text(one["prompt"]), 90),
                )
                for one in found[word]
            ]
            columns = (("prompt", "left"), ("A", "right"), ("B", "right"), ("question", "left"))
            rich.print(table(columns, rows, title=f"{word} most"))
    line()
    names = ["A", "B"] if a["run"] != b["run"] else ["A and B"]
    rows = [(index, *map(number, figures[: len(names)])) for index, *figures in curves(found)]
    rich.print(table([("round", "right"), *((name, "right") for name in names)], rows, title=metric))
    line()
    if a["run"] == b["run"]:
        line("one run: B is what its training made of A")
    elif found["config"]:
        rows = [(one["key"], one_line(one["before"], 60), one_line(one["after"], 60)) for one in found["config"]]
        rich.print(table((("key", "left"), ("A", "left"), ("B", "left")), rows, title="what differs in the configs"))
    else:
        line("the configs do not differ")
    line()
    rows = [(key.replace("_", " "), *(cost_text(key, one["cost"][key]) for one in (a, b))) for key in a["cost"]]
    rich.print(table((("cost", "left"), ("A", "right"), ("B", "right")), rows))


def print_many(rich: Any, found: dict[str, Any]) -> None:
    """Many runs: a line each, best first, then the pools."""
    columns = [("run", "left"), ("seed", "right"), ("round", "right"), ("start", "right")]
    columns += [(found["metric"].removeprefix("eval/") + " (95 %)", "right"), ("accepted", "right")]
    columns += [("tokens", "right"), ("steps", "right"), ("time", "right"), ("model", "left")]
    rows = [
        (
            row["run"],
            row["seed"],
            row["round"],
            number(row["start"]),
            f"{row['value']:.3f}{interval(row['low'], row['high'])}",
            number(row["accepted_samples"]),
            number(row["generated_tokens"]),
            number(row["steps"]),
            duration(row["seconds"]),
            row["model"],
        )
        for row in found["runs"]
    ]
    rich.print(table(columns, rows))
    for one in found["pools"]:
        seeds = ", ".join(map(str, one["seeds"]))
        text = f"seeds {seeds}: {one['mean']:.3f}{interval(one['low'], one['high'])}, from {one['min']:.3f} to {one['max']:.3f}"
        rich.print(safe_text(f"{text} ({len(one['runs'])} runs of one config)"), soft_wrap=True)


def interval(low: float | None, high: float | None) -> str:
    """An interval behind its figure."""
    return "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"


def cost_text(key: str, value: float) -> str:
    """One figure of the cost."""
    return duration(value) if key == "seconds" else f"{int(value):,}"
