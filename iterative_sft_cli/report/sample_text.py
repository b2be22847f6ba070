"""One stored sample as people read it and as programs read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iterative_sft_cli.console import one_line, safe_text, verdict_text
from iterative_sft_cli.samples import StoredSample

MAX_PROMPT, MAX_COMPLETION = 600, 1200
"""Characters of a prompt and of a completion that are shown unless everything is asked for."""


def sample_row(stored: StoredSample) -> dict[str, Any]:
    """A sample as JSON: what was asked and answered, and what every filter said of it."""
    sample = stored.sample
    rejected = stored.rejected_by
    return {
        "sample_id": sample.sample_id,
        "round": sample.round_index,
        "prompt_id": sample.prompt_id,
        "sample_index": sample.sample_index,
        "accepted": stored.accepted,
        "rejected_by": rejected["filter"] if rejected else None,
        "reason": (rejected.get("reason") or "rejected") if rejected else None,
        "prompt": sample.prompt,
        "completion": sample.completion,
        "answer": sample.answer,
        "row": dict(sample.row),
        "finish_reason": sample.finish_reason,
        "num_tokens": len(sample.completion_ids),
        "logprob": sample.logprob,
        "seed": stored.seed,
        "hinted": stored.hinted,
        "says": [dict(one) for one in stored.says],
    }


def whole_prompt(prompt: str | list[Mapping[str, Any]] | list[dict[str, Any]]) -> str:
    """A prompt with all its messages, each behind its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role") == "user":
        return str(prompt[0].get("content", ""))
    return "\n".join(f"[{message.get('role')}] {message.get('content', '')}" for message in prompt)


def says_text(says: Mapping[str, Any]) -> str:
    """What one filter said, on a line: kept or dropped, why, its score, its extras."""
    parts = ["kept" if says["keep"] else f"dropped as {says.get('reason') or 'rejected'}"]
    if says.get("score") is not None:
        parts.append(f"score {says['score']:.4g}")
    parts += [f"{name}={one_line(value, 200)}" for name, value in (says.get("extra") or {}).items()]
    return ", ".join(parts)


def indented(text: str, limit: int | None, by: str = "    ") -> str:
    """A text of several lines, each moved to the right; what is over `limit` characters is left out and said."""
    shown = safe_text(text, limit) or "(empty)"
    return "\n".join(by + line for line in shown.split("\n"))


def print_sample(rich: Any, stored: StoredSample, *, full: bool, with_prompt: bool) -> None:
    """A sample as a block: a line of what became of it, the texts, a line a filter."""
    from rich.text import Text

    sample = stored.sample
    word, style = ("accepted", "green") if stored.accepted else ("rejected", "red")
    head = Text(safe_text(sample.sample_id), style="bold")
    head.append("  ")
    head.append(word, style=f"bold {style}")
    why = f"  {one_line(verdict_text(stored), 120)}  {len(sample.completion_ids)} tokens, {sample.finish_reason}"
    head.append(safe_text(why) + ("  second try, with a hint" if stored.hinted else ""), style="default")
    rich.print(head, soft_wrap=True)
    if with_prompt:
        answer = "" if sample.answer is None else f"  (answer: {one_line(sample.answer, 80)})"
        rich.print(Text(f"  prompt {safe_text(sample.prompt_id)}{answer}"), soft_wrap=True)
        rich.print(Text(indented(whole_prompt(sample.prompt), None if full else MAX_PROMPT)), soft_wrap=True)
    rich.print(Text("  completion"), soft_wrap=True)
    rich.print(Text(indented(sample.completion, None if full else MAX_COMPLETION)), soft_wrap=True)
    said = " | ".join(f"{one_line(says['filter'])}: {safe_text(says_text(says))}" for says in stored.says)
    if said:
        rich.print(Text(f"  {said}"), soft_wrap=True)
    rich.print()
