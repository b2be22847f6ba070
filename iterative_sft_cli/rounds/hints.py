"""Rationalization: prompts of which nothing was accepted are asked again with the answer in sight, and trained as if they had not been.

Which prompts get a second try is a function of (seed, round, prompt); source: Zelikman et al. 2022, "STaR", section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

from iterative_sft_cli.types import Message, Prompt, derive_seed

FIRST_HINTED = 1_000_000
"""`sample_index` of a prompt's first second try; plain samples stay below it."""


def second_tries(failed: Sequence[Prompt], share: float, *, seed: int, round_index: int) -> list[Prompt]:
    """The failed prompts that are asked again: all, or each with the chance `share`."""
    if share >= 1.0:
        return list(failed)
    return [p for p in failed if derive_seed(seed, "rationalize", round_index, p.prompt_id) < share * 2**63]


def hinted_prompt(template: str, prompt: Prompt) -> str | list[Message]:
    """The prompt with its hint: `template` with {prompt} and {answer} filled in; of chat messages, the last one changes."""
    if isinstance(prompt.prompt, str):
        return fill(template, prompt=prompt.prompt, answer=str(prompt.answer))
    *before, last = prompt.prompt
    return [*before, {**last, "content": fill(template, prompt=str(last["content"]), answer=str(prompt.answer))}]


def fill(template: str, **parts: str) -> str:
    """`template` with every {name} of `parts` replaced, once: braces inside a part stay as they are."""
    pieces = [template]
    for name, text in parts.items():
        split: list[str] = []
        for index, piece in enumerate(pieces):
            if index % 2:
                split.append(piece)
                continue
            for number, bare in enumerate(piece.split("{" + name + "}")):
                split += [text, bare] if number else [bare]
        pieces = split
    return "".join(pieces)
