"""The doctor's findings as people read them."""

from __future__ import annotations

from typing import Any

from iterative_sft_cli.console import safe_text

MARKS: dict[bool | None, tuple[str, str]] = {True: ("ok", "green"), False: ("BAD", "bold red"), None: ("--", "dim")}
TOKENS_SHOWN = 400


def print_findings(rich: Any, found: dict[str, Any]) -> None:
    """Rows with their tokens first, then learning rates, then the checks, the bad ones last."""
    from rich.text import Text

    for row in found["rows"]:
        rich.print(
            Text(
                safe_text(
                    f"{row['sample_id']} ({row['finish_reason']}): each piece with its id; trained pieces are marked"
                ),
                style="bold",
            ),
            soft_wrap=True,
        )
        line = Text("  ")
        for token in row["tokens"][:TOKENS_SHOWN]:
            piece = repr(token["piece"])[1:-1] or "''"
            mark = "*" if token["trained"] else ""
            line.append(safe_text(f"{piece}"), style="green" if token["trained"] else "dim")
            line.append(f"{mark}[{token['id']}] ", style="dim")
        if len(row["tokens"]) > TOKENS_SHOWN:
            line.append(f"... {len(row['tokens']) - TOKENS_SHOWN} more, all of them with --json")
        rich.print(line)
    for one in found["learning_rates"]:
        rates = one["rates"]
        shown = rates if len(rates) <= 12 else [*rates[:6], None, *rates[-5:]]
        words = " ".join("..." if rate is None else f"{rate:.2e}" for rate in shown)
        rich.print(
            safe_text(f"round {one['round']}: at most {one['steps']} steps, learning rate {words}"), soft_wrap=True
        )
    for check in sorted(found["checks"], key=lambda check: check["ok"] is False):
        word, style = MARKS[check["ok"]]
        line = Text(f"{word:>3} ", style=style)
        line.append(safe_text(f"{check['name'].replace('_', ' ')}: {check['detail']}"), style="default")
        rich.print(line, soft_wrap=True)
        if check["mend"]:
            rich.print(Text(safe_text(f"    mend: {check['mend']}"), style="bold"), soft_wrap=True)
