"""Which prompts a round asks, and in which order: a pure function of prompts, settings, seed, round and what happened before."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.types import Prompt, derive_seed


@dataclass(frozen=True, slots=True)
class PromptHistory:
    """What became of a prompt in earlier rounds: all its samples, and the acceptance rate of the last round that asked it."""

    num_samples: int
    num_accepted: int
    last_round: int
    last_rate: float


def num_per_round(setting: Any, num_prompts: int) -> int:
    """The number of prompts `per_round` means: "all", an integer, or a fraction (a float up to 1.0) of `num_prompts`."""
    if setting == "all":
        return num_prompts
    if isinstance(setting, float) and setting <= 1:
        return min(num_prompts, max(1, round(setting * num_prompts)))
    return min(num_prompts, int(setting))


def needs_history(section: Any) -> bool:
    """Whether `select_round` looks at earlier rounds under these settings (of one round)."""
    skip = section.skip
    skips = skip is not None and (skip.solved_at_least is not None or skip.solved_at_most is not None)
    return bool(
        skips
        or section.order in ("hardest_first", "adaptive")
        or (section.order != "curriculum" and section.per_round != "all")
    )


def select_round(
    prompts: Sequence[Prompt],
    section: Any,
    *,
    round_index: int,
    seed: int,
    history: Mapping[str, PromptHistory],
    promotions: int | None = None,
) -> list[Prompt]:
    """The prompts of round `round_index` (from 1), in the order they are asked; empty when `skip` leaves none.

    `section` holds this round's scalars. `per_round` counts over all prompts, before `skip`.

    - shuffle: seeded by (seed, round); under `per_round` every prompt is asked once before any is asked twice.
    - sequential: in the data's order, going on behind the prompts of the last round, wrapping.
    - curriculum: lowest level first; `per_round` says how far up a round goes, so a schedule on it makes it grow.
      `curriculum` {start, step, width} asks only levels in a window that has moved up by `step` `promotions` times (once a round when None).
    - hardest_first: lowest last acceptance rate first, never asked ones before all.
    - adaptive: longest not asked first, then lowest last acceptance rate (AdaSTaR, Koh et al. 2025).
    """
    pool = [prompt for prompt in prompts if not _is_skipped(history.get(prompt.prompt_id), section.skip)]
    count = min(num_per_round(section.per_round, len(prompts)), len(pool))

    def chance(prompt: Prompt) -> int:
        return derive_seed(seed, "prompts", round_index, prompt.prompt_id)

    def last_round(prompt: Prompt) -> int:
        seen = history.get(prompt.prompt_id)
        return seen.last_round if seen else 0

    if section.order == "sequential":
        if history or round_index <= 1:
            return sorted(pool, key=last_round)[:count]
        start = (round_index - 1) * count % max(1, len(pool))
        return [*pool[start:], *pool[:start]][:count]
    if section.order == "curriculum":
        moved = max(1, round_index) - 1 if promotions is None else promotions
        pool = _window(pool, getattr(section, "curriculum", None), moved)
        return sorted(pool, key=lambda p: (_level_key(p), derive_seed(seed, "level", p.prompt_id)))[:count]
    if section.order in ("hardest_first", "adaptive"):

        def rate(prompt: Prompt) -> float:
            seen = history.get(prompt.prompt_id)
            return seen.last_rate if seen else -1.0

        if section.order == "adaptive":
            return sorted(pool, key=lambda p: (last_round(p), rate(p), chance(p)))[:count]
        return sorted(pool, key=lambda p: (rate(p), chance(p)))[:count]
    return sorted(sorted(pool, key=lambda p: (last_round(p), chance(p)))[:count], key=chance)


def _is_skipped(seen: PromptHistory | None, skip: Any) -> bool:
    if seen is None or skip is None:
        return False
    if skip.solved_at_least is not None and seen.last_rate >= skip.solved_at_least:
        return True
    return skip.solved_at_most is not None and seen.last_rate <= skip.solved_at_most


def _window(pool: Sequence[Prompt], curriculum: Any, moved: int) -> list[Prompt]:
    """The prompts whose level is asked after the window moved up `moved` times; all without a window. Raises DataError for a level that is no number."""
    if curriculum is None:
        return list(pool)
    highest = curriculum.start + curriculum.step * moved
    inside = []
    for prompt in pool:
        kind, level, _ = _level_key(prompt)
        if kind != 0:
            raise DataError(
                f"the level of prompt {prompt.prompt_id} is {prompt.level!r}",
                where="prompts.curriculum",
                expected="a number",
            )
        if level <= highest and (curriculum.width is None or level > highest - curriculum.width):
            inside.append(prompt)
    return inside


def _level_key(prompt: Prompt) -> tuple[Any, ...]:
    """Numbers by value before texts in natural order ("Level 2" before "Level 10"). Raises DataError without a level."""
    level = prompt.level
    if level is None or level == "":
        raise DataError(
            f"prompt {prompt.prompt_id} has no level, which `order: curriculum` sorts by",
            where="prompts.level",
            hint="set `prompts.level` to the column with the difficulty",
        )
    try:
        return (0, float(level), ())
    except (TypeError, ValueError):
        parts = re.split(r"(\d+)", str(level))
        return (1, 0.0, tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts))
