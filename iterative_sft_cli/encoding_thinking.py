"""Thinking blocks: what a model reasons between two tags, apart from what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from iterative_sft_cli.types import Message


@dataclass(frozen=True, slots=True)
class Thinking:
    """A completion's thinking and what follows it; `closed` is false when a thinking block was opened and never closed.

    `reasoning` is None when there was no thinking block; `final` is empty when it was not closed.
    """

    reasoning: str | None
    final: str
    closed: bool


@dataclass(frozen=True, slots=True)
class ThinkingTags:
    """The tags between which a model thinks."""

    open: str = "<think>"
    close: str = "</think>"

    def opened_by(self, prompt: str) -> bool:
        """Whether a prompt ends inside a block that its template opened."""
        return prompt.rstrip().endswith(self.open)

    def split(self, text: str, *, inside: bool) -> Thinking:
        """What stands inside the thinking blocks of `text`, the first of which the prompt has opened if `inside`, and what
        follows the last of them."""
        parts: list[str] = []
        rest = text
        if inside and rest.lstrip().startswith(self.open):
            rest = rest.lstrip()[len(self.open) :]
        while True:
            if not inside:
                _, opened, after = rest.partition(self.open)
                if not opened:
                    break
                rest = after
            thought, closed, after = rest.partition(self.close)
            parts.append(thought.strip())
            if not closed:
                return Thinking("\n".join(parts), "", False)
            rest = after.lstrip()
            inside = False
        return Thinking("\n".join(parts), rest, True) if parts else Thinking(None, text, True)

    def written(self, message: Mapping[str, Any]) -> str:
        """The content of an assistant's message; reasoning, if it is a field of its own, stands before it inside the tags."""
        content = str(message.get("content") or "")
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        return f"{self.open}\n{str(reasoning).strip()}\n{self.close}\n\n{content}" if reasoning else content

    def turn(self, sample_id: str, message: Message, prefix: str) -> str:
        """What the assistant writes behind `prefix`. Raises ValueError where it leaves a block open that `prefix` opened."""
        content = self.written(message)
        if not self.opened_by(prefix):
            return content
        if content.lstrip().startswith(self.open):
            content = content.lstrip()[len(self.open) :].lstrip("\n")
        if self.close not in content:
            raise ValueError(
                f"{sample_id}: the chat template opens a thinking block that the answer never closes "
                f"(write {self.close} into it, or set prompts.template_kwargs: {{enable_thinking: false}})"
            )
        return content
