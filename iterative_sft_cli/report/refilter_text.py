"""What deciding again changed, as people read it."""

from __future__ import annotations

from typing import Any

from iterative_sft_cli.console import one_line, prompt_text, safe_text
from iterative_sft_cli.report.sample_text import says_text
from iterative_sft_cli.report.screen import table


def print_difference(rich: Any, found: dict[str, Any]) -> None:
    """The numbers, both funnels side by side, and examples."""
    before, after = found["before"], found["after"]

    def line(text: str = "") -> None:
        rich.print(safe_text(text), soft_wrap=True)

    n = max(1, after["num_samples"])
    line(
        f"round {found['round']}: accepted {before['accepted']:,} -> {after['accepted']:,} of {after['num_samples']:,} "
        f"({before['accepted'] / n:.1%} -> {after['accepted'] / n:.1%}), gained {found['gained']:,}, lost {found['lost']:,}; "
        f"prompts with something accepted {before['solved']:,} -> {after['solved']:,}"
    )
    for word, counts in (("before", before), ("now", after)):
        rows = [
            (
                one["filter"],
                f"{one['entered']:,}",
                f"{one['dropped']:,}",
                ", ".join(f"{reason} {number:,}" for reason, number in list(one["reasons"].items())[:6]),
            )
            for one in counts["filters"]
        ]
        line()
        columns = (("filter", "left"), ("entered", "right"), ("dropped", "right"), ("reasons", "left"))
        rich.print(table(columns, rows, title=word))
    for word in ("gained", "lost"):
        if found["examples"][word]:
            line()
            shown: list[tuple[object, ...]] = [
                (
                    one["sample_id"],
                    one_line(prompt_text(one["prompt"]), 50),
                    one_line(one["completion"], 60),
                    decided(one["said_before"]),
                    decided(one["says"]),
                )
                for one in found["examples"][word]
            ]
            names = ("sample", "prompt", "completion", "before", "now")
            rich.print(table([(name, "left") for name in names], shown, title=word))


def decided(says: list[dict[str, Any]]) -> str:
    """The verdict that decided, on a line."""
    last = next((one for one in says if not one["keep"]), None)
    return "accepted" if last is None else f"{last['filter']}: {one_line(says_text(last), 80)}"
