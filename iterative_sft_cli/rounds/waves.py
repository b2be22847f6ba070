"""Which samples are drawn when: a round is one wave, or several that look at earlier waves' verdicts to spend samples where they help.

A wave is a pure function of the config, the prompts and the verdicts it waits for, so a resumed round draws the same samples again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from iterative_sft_cli.rounds.sampling import SHARD_ROWS, into_groups
from iterative_sft_cli.types import Prompt

SMALLEST = 16
"""A wave has at least this part of the samples that a prompt may get: a round has at most so many."""

Passed = Mapping[str, Sequence[int]]
"""Prompt ids to the indices of the samples that passed."""


@dataclass(frozen=True, slots=True)
class Draw:
    """The samples of one prompt in a wave: indices `first` to `first + count - 1`."""

    prompt: Prompt
    first: int
    count: int


class Waves(Protocol):
    """The plan of a round. `limits` says what is surplus, once everything is judged."""

    adaptive: bool
    """Whether later waves look at verdicts."""
    returns: bool
    """Whether later waves come back to the prompts of earlier ones."""

    def waits_for(self, wave: int) -> int:
        """How many waves' verdicts must be known before wave `wave` (counted from 0) can be planned."""

    def plan(self, wave: int, passed: Passed) -> list[Draw] | None:
        """The draws of wave `wave`, asked in order; None when the round is done. `passed` is known of the first `waits_for(wave)` waves."""

    def limits(self) -> tuple[Mapping[str, int] | None, int | None]:
        """(most accepted samples of each prompt, most of the round), None for no limit."""


class OneWave:
    """Every prompt gets the same number of samples."""

    adaptive = returns = False

    def __init__(self, prompts: Sequence[Prompt], num_samples: int) -> None:
        self._prompts = prompts
        self._num_samples = num_samples

    def waits_for(self, wave: int) -> int:
        """Nothing."""
        return 0

    def plan(self, wave: int, passed: Passed) -> list[Draw] | None:
        """All draws in wave 0."""
        return [Draw(prompt, 0, self._num_samples) for prompt in self._prompts] if wave == 0 else None

    def limits(self) -> tuple[Mapping[str, int] | None, int | None]:
        """None."""
        return None, None


def wave_size(wanted: int, most: int) -> int:
    """Samples a prompt gets in a wave when `wanted` are to be accepted of at most `most`."""
    return min(most, max(wanted, math.ceil(most / SMALLEST)))


class UntilAccepted:
    """Waves of one size for the prompts that have not `wanted` accepted samples yet, at most `most` samples each.

    Wave w + 1 looks at the verdicts up to wave w - 1, so that the filters of one wave run beside the generation of the next.
    The first two look at none and are drawn as one. With `pairs` every two are: the samples are the same, in fewer and larger
    batches, where filters answer at once and have nothing to run beside.
    """

    adaptive = returns = True
    _first = 0
    """The number of the two waves that are drawn as one in any case."""

    def __init__(
        self, prompts: Sequence[Prompt], wanted: int, most: int, size: int | None = None, *, pairs: bool = False
    ) -> None:
        self._prompts = prompts
        self._wanted = dict.fromkeys((prompt.prompt_id for prompt in prompts), wanted)
        self._most = most
        self._size = min(size, most) if size is not None else wave_size(wanted, most)
        self._drawn: dict[str, int] = {}
        self._pairs = pairs

    def waits_for(self, wave: int) -> int:
        """All waves but the one before; what follows a pair that was drawn as one needs that."""
        return wave if self._pairs or wave <= self._first + 1 else wave - 1

    def plan(self, wave: int, passed: Passed) -> list[Draw] | None:
        """A further piece for every prompt that is short of its number."""
        draws = []
        for prompt in self._prompts:
            key = prompt.prompt_id
            first = self._drawn.get(key, 0)
            due = self._due(wave, first, passed.get(key, ()), self._wanted[key])
            if first < self._most and due:
                draws.append(Draw(prompt, first, min(due * self._size, self._most - first)))
                self._drawn[key] = first + draws[-1].count
        return draws or None

    def _due(self, wave: int, drawn: int, indices: Sequence[int], wanted: int) -> int:
        """In how many of the waves that are drawn now a prompt takes part."""

        def short(upto: int) -> bool:
            return sum(index < upto for index in indices) < wanted

        first = short(self._looks_at(drawn))
        return first + short(drawn) if self._pairs else first * (2 if wave == self._first else 1)

    def _looks_at(self, drawn: int) -> int:
        """How many of a prompt's `drawn` samples are looked at: all but those of the wave before."""
        return drawn - self._size

    def limits(self) -> tuple[Mapping[str, int] | None, int | None]:
        """The wanted number of each prompt."""
        return self._wanted, None


class ByDifficulty(UntilAccepted):
    """DART-Math's Prop2Diff: after a pilot, accepted samples are wanted in proportion to the share that failed, at least one each.

    Source: Tong et al. 2024, "DART-Math", section 3.1; the hardest prompts of the pilot get `wanted`.
    """

    _first = 1

    def __init__(
        self,
        prompts: Sequence[Prompt],
        wanted: int,
        most: int,
        pilot: int,
        size: int | None = None,
        *,
        pairs: bool = False,
    ) -> None:
        super().__init__(prompts, wanted, most, size, pairs=pairs)
        self._pilot = min(pilot, most)
        self._hardest = wanted

    def plan(self, wave: int, passed: Passed) -> list[Draw] | None:
        """The pilot first; then, two waves at first, a further piece for every prompt that is short of its number."""
        if wave == 0:
            self._drawn = {prompt.prompt_id: self._pilot for prompt in self._prompts}
            return [Draw(prompt, 0, self._pilot) for prompt in self._prompts]
        if wave == 1:
            failed = {p.prompt_id: 1.0 - len(passed.get(p.prompt_id, ())) / self._pilot for p in self._prompts}
            worst = max(failed.values(), default=0.0) or 1.0
            self._wanted = {key: max(1, math.ceil(self._hardest * f / worst - 1e-9)) for key, f in failed.items()}
        return super().plan(wave, passed)

    def _looks_at(self, drawn: int) -> int:
        """The pilot, and all but the wave before."""
        return max(self._pilot, drawn - self._size)


class UntilTotal:
    """Asks the prompts in order, a fixed number at a time, until enough samples of the round were accepted."""

    adaptive, returns = True, False

    def __init__(self, prompts: Sequence[Prompt], num_samples: int, total: int) -> None:
        self._prompts = prompts
        self._num_samples = num_samples
        self._total = total
        self._size = max(1, math.ceil(total / (2 * num_samples)))

    def waits_for(self, wave: int) -> int:
        """All waves but the one before."""
        return max(0, wave - 1)

    def plan(self, wave: int, passed: Passed) -> list[Draw] | None:
        """The next prompts, unless there is enough."""
        piece = self._prompts[wave * self._size : (wave + 1) * self._size]
        if not piece or sum(map(len, passed.values())) >= self._total:
            return None
        return [Draw(prompt, 0, self._num_samples) for prompt in piece]

    def limits(self) -> tuple[Mapping[str, int] | None, int | None]:
        """The total."""
        return None, self._total


class ByVariance:
    """GVM's allocation with equal gradient norms: after a pilot, `num_samples` a prompt on average, in proportion to `gvm_weight`.

    Source: Yao et al. 2025, "GVM-RAFT", Algorithm 1 and its released code (largest-remainder rounding). The pilot's samples stay in.
    """

    adaptive = returns = True

    def __init__(self, prompts: Sequence[Prompt], num_samples: int, pilot: int, alpha: float, beta: float) -> None:
        self._prompts = prompts
        self._num_samples = num_samples
        self._pilot, self._alpha, self._beta = pilot, alpha, beta

    def waits_for(self, wave: int) -> int:
        """The pilot."""
        return min(wave, 1)

    def plan(self, wave: int, passed: Passed) -> list[Draw] | None:
        """The pilot, then the allocation."""
        if wave == 0:
            return [Draw(prompt, 0, self._pilot) for prompt in self._prompts]
        if wave > 1:
            return None
        rates = [len(passed.get(prompt.prompt_id, ())) / self._pilot for prompt in self._prompts]
        weights = [gvm_weight(rate, self._alpha, self._beta) for rate in rates]
        counts = largest_remainder(weights, self._num_samples * len(self._prompts))
        return [
            Draw(prompt, self._pilot, count) for prompt, count in zip(self._prompts, counts, strict=True) if count
        ] or None

    def limits(self) -> tuple[Mapping[str, int] | None, int | None]:
        """None."""
        return None, None


def gvm_weight(rate: float, alpha: float, beta: float) -> float:
    """1 / sqrt(p + alpha / p^(beta - 1)) for the accepted share p, 0 for a prompt that was never solved."""
    return 0.0 if rate <= 0 else float(1.0 / math.sqrt(rate + alpha / rate ** (beta - 1.0)))


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to `weights` that add up to `total`; ties go to the earlier one. All zero for no weight."""
    whole = sum(weights)
    if whole <= 0:
        return [0] * len(weights)
    exact = [weight / whole * total for weight in weights]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts


def plan_waves(section: Any, prompts: Sequence[Prompt], *, pairs: bool) -> Waves:
    """The waves of a round under `generate` (of that round); `pairs`: see `UntilAccepted`."""
    num_samples = int(section.samples_per_prompt)
    if section.budget is not None and section.budget.kind == "gvm":
        return ByVariance(prompts, num_samples, section.budget.pilot, section.budget.alpha, section.budget.beta)
    if section.budget is not None:
        wanted = int(section.until_accepted)
        return ByDifficulty(prompts, wanted, num_samples, section.budget.pilot, section.wave_size, pairs=pairs)
    if section.until_accepted is not None:
        return UntilAccepted(prompts, int(section.until_accepted), num_samples, section.wave_size, pairs=pairs)
    if section.until_total is not None:
        return UntilTotal(prompts, num_samples, int(section.until_total))
    return OneWave(prompts, num_samples)


def into_units(draws: Sequence[Draw], rows: int = SHARD_ROWS) -> Iterator[list[Draw]]:
    """Cut draws, in order, into units of at most `rows` samples (a single larger one is its own unit)."""
    return into_groups(draws, lambda draw: draw.count, rows)


def owners_of(shares: Sequence[float], num_samples: int) -> list[int]:
    """Which source makes sample 0, 1, ... of a prompt: always the one that is furthest behind its share, the earlier of equals."""
    made = [0] * len(shares)
    owners = []
    for index in range(num_samples):
        behind = [share * (index + 1) - made[place] for place, share in enumerate(shares)]
        owners.append(max(range(len(shares)), key=lambda place: (round(behind[place], 9), -place)))
        made[owners[-1]] += 1
    return owners
