"""Which samples a round trains on, how often and in which step: pure functions of config, seed and accepted samples."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from iterative_sft_cli.types import derive_seed


def pool_rounds(data: Any, round_index: int) -> list[int]:
    """The rounds whose accepted samples train in `round_index` under `train.data` (replace, accumulate, or a window of n)."""
    if data == "replace":
        return [round_index]
    if data == "accumulate":
        return list(range(1, round_index + 1))
    return list(range(max(1, round_index - int(data.window) + 1), round_index + 1))


def num_seed_rows(share: float, num_accepted: int, num_available: int) -> int:
    """How many seed rows make up `share` of the round's rows, at most what there is."""
    if share >= 1.0:
        return num_available
    return min(num_available, round(num_accepted * share / (1.0 - share)))


def draw_seed_rows(num_available: int, num_wanted: int, *, seed: int, round_index: int) -> list[int]:
    """Indices of the seed rows that are mixed into a round, without repetition, in ascending order."""
    rng = random.Random(derive_seed(seed, "mix", round_index))
    return sorted(rng.sample(range(num_available), num_wanted))


def num_steps(num_rows: int, *, epochs: float | None, steps: int | None, batch_size: int) -> int:
    """Optimizer steps of a pass; 0 when there is nothing to train on."""
    if num_rows == 0:
        return 0
    if steps is not None:
        return int(steps)
    return math.ceil(num_dealt(num_rows, epochs=epochs, steps=steps, batch_size=batch_size) / batch_size)


def num_dealt(num_rows: int, *, epochs: float | None, steps: int | None, batch_size: int) -> int:
    """Rows dealt in a pass, repetitions counted."""
    if steps is not None:
        return int(steps) * batch_size
    return max(1, round((1 if epochs is None else epochs) * num_rows))


def deal(
    num_rows: int,
    *,
    epochs: float | None,
    steps: int | None,
    batch_size: int,
    seed: int,
    round_index: int,
    pass_index: int = 0,
    groups: Sequence[tuple[Sequence[int], float]] | None = None,
) -> Iterator[list[int]]:
    """The row indices of each optimizer step.

    Shuffles of all rows follow one another, one an epoch, each a function of (seed, round, pass, epoch); steps cut the stream into
    pieces of `batch_size`, the last may be shorter. `groups`: (rows, share) parts that get their shares of the stream instead.
    """
    if groups is not None:
        total = num_dealt(num_rows, epochs=epochs, steps=steps, batch_size=batch_size) if num_rows else 0
        yield from _cut(mixed_stream(groups, total, seed, round_index, pass_index), batch_size)
        return
    left = num_dealt(num_rows, epochs=epochs, steps=steps, batch_size=batch_size) if num_rows else 0
    stream: list[int] = []
    epoch = 0
    while left > 0:
        want = min(batch_size, left)
        while len(stream) < want:
            order = list(range(num_rows))
            random.Random(derive_seed(seed, "train", round_index, pass_index, epoch)).shuffle(order)
            stream += order
            epoch += 1
        yield stream[:want]
        del stream[:want]
        left -= want


def mixed_stream(
    groups: Sequence[tuple[Sequence[int], float]], total: int, seed: int, round_index: int, pass_index: int
) -> list[int]:
    """`total` rows of which each group has its share (to the nearest row), in one shuffle; a group's rows take turns."""
    exact = [share * total for _, share in groups]
    counts = [math.floor(value + 1e-9) for value in exact]
    order = sorted(range(len(groups)), key=lambda i: (counts[i] - exact[i], i))
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    stream: list[int] = []
    for place, ((members, _), count) in enumerate(zip(groups, counts, strict=True)):
        epoch = 0
        while count > 0:
            turn = list(members)
            random.Random(derive_seed(seed, "train", round_index, pass_index, place, epoch)).shuffle(turn)
            stream += turn[:count]
            count -= len(turn)
            epoch += 1
    random.Random(derive_seed(seed, "train", round_index, pass_index, "mixed")).shuffle(stream)
    return stream


def _cut(stream: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(stream), size):
        yield list(stream[start : start + size])


def times_trained(dealt: Sequence[Sequence[int]], num_rows: int) -> list[int]:
    """How often each row was dealt."""
    counts = [0] * num_rows
    for step in dealt:
        for index in step:
            counts[index] += 1
    return counts
