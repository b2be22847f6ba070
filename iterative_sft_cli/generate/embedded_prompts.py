"""Prompts that several shards ask for, each read once and kept: waves of samples come back to them.

Guarantee: what is kept of a prompt is a function of the weights and of all prompts that were to be kept, never of which shard asks
first: they are read in groups that are fixed beforehand, so that a resumed round computes the same bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from iterative_sft_cli.generate.embedded_module import Decoder

PromptIds = tuple[int, ...]

LEAST_PREFIX = 8
"""Prompts that begin alike for at least so many tokens (a system prompt, examples) share the work for them."""
KEPT_SHARE = 0.5
"""Share of the cache's memory that kept prompts may take."""
POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """Keys and values [layers, kv_heads, length, d] of a prompt, and the features of its last token."""

    keys: torch.Tensor
    values: torch.Tensor
    features: torch.Tensor


def common_prefix(prompts: Sequence[PromptIds]) -> list[int]:
    """The tokens that all prompts begin with, leaving at least one to each; none where they are too few to be shared."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)
    room = min(map(len, prompts)) - 1
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    prefix = list(first[: min(same, room)])
    return prefix if len(prefix) >= LEAST_PREFIX else []


def that_fit(prompts: Iterable[PromptIds], positions: int) -> list[PromptIds]:
    """The different ones of `prompts`, the first ones where `positions` tokens have no room for all."""
    found = list(dict.fromkeys(prompts))
    for index, prompt in enumerate(found):
        positions -= len(prompt)
        if positions < 0:
            return found[:index]
    return found


class KeptPrompts:
    """`prompts` in groups of about `group_tokens` tokens, longest first, each read when one of its prompts is first asked for.

    May be asked by several threads.
    """

    def __init__(self, prompts: Sequence[PromptIds], group_tokens: int) -> None:
        self.num_tokens = sum(map(len, prompts))
        self._prefix = common_prefix(prompts)
        self._groups: list[list[PromptIds]] = []
        left = 0
        for prompt in sorted(prompts, key=len, reverse=True):
            left -= len(prompt)
            if left < 0:
                self._groups.append([])
                left = group_tokens - len(prompt)
            self._groups[-1].append(prompt)
        self._group_of = {prompt: number for number, group in enumerate(self._groups) for prompt in group}
        self._read: dict[PromptIds, ReadPrompt] = {}
        self._wanted: list[int] = []
        self._at_work: set[int] = set()
        self._changed = threading.Condition()

    def __contains__(self, prompt: PromptIds) -> bool:
        return prompt in self._group_of

    def forget(self) -> None:
        """Free what was read: the weights change, or the memory is wanted."""
        self._read.clear()

    def expect(self, prompts: Iterable[PromptIds]) -> None:
        """These are asked for next: who would wait for another thread's group reads one of theirs instead."""
        self._wanted = sorted({self._group_of[p] for p in prompts if p in self._group_of and p not in self._read})

    def read(self, prompt: PromptIds, decoder: Decoder) -> ReadPrompt:
        """What was read of a prompt that is kept; `decoder`, which has no rows, reads what is not read yet.

        A decoder that may have twins reads with one thread, however many its caller has: bytes can depend on the number.
        """
        while True:
            with self._changed:
                if prompt in self._read:
                    return self._read[prompt]
                number = self._claim(self._group_of[prompt])
                if number is None:
                    self._changed.wait(POLL_S)
                    continue
            try:
                made = self._read_group(number, decoder)
            except BaseException:
                with self._changed:
                    self._at_work.discard(number)
                    self._changed.notify_all()
                raise
            with self._changed:
                self._read.update(made)
                self._at_work.discard(number)
                self._changed.notify_all()

    def _claim(self, number: int) -> int | None:
        """That group, or while another thread is at it a wanted one that nobody has read; None without any."""
        for one in (number, *self._wanted):
            if one not in self._at_work and self._groups[one][0] not in self._read:
                self._at_work.add(one)
                return one
        return None

    def _read_group(self, number: int, decoder: Decoder) -> dict[PromptIds, ReadPrompt]:
        group, threads = self._groups[number], torch.get_num_threads()
        if decoder.shareable:
            torch.set_num_threads(1)
        try:
            if self._prefix:
                decoder.share(self._prefix)
            features = decoder.admit(group, [1] * len(group))
            made = {}
            for slot, prompt in enumerate(group):
                keys, values = decoder.cache.whole_prompt(slot)
                made[prompt] = ReadPrompt(keys, values, features[slot].clone())
            return made
        finally:
            decoder.reset()
            torch.set_num_threads(threads)
