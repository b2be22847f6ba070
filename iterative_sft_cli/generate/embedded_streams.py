"""Several shares of one shard decoded side by side, each by a thread of its own with its own rows and cache.

Guarantee: which samples a stream decodes, and in which order, is fixed before it starts, so streams change nothing about the
bytes; an error in one, or the consumer leaving, ends all.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from iterative_sft_cli.generate.embedded_shard import Piece, Shard
from iterative_sft_cli.types import Completion

POLL_S = 0.25


class _Abandoned(Exception):
    """The consumer left."""


def deal(pieces: Sequence[Piece], streams: int) -> list[list[Piece]]:
    """Pieces to streams, back and forth, so that neighbours in length are spread evenly."""
    hands: list[list[Piece]] = [[] for _ in range(streams)]
    for index, piece in enumerate(pieces):
        turn, place = divmod(index, streams)
        hands[place if turn % 2 == 0 else streams - 1 - place].append(piece)
    return hands


def run_streams(
    shards: Sequence[Shard], hands: Sequence[Sequence[Piece]], threads: int, heartbeat: Callable[[int], None]
) -> Iterator[Completion]:
    """Yield what all shards yield, as it comes. Each stream computes with `threads` threads."""
    results: queue.SimpleQueue[Completion | BaseException | None] = queue.SimpleQueue()
    tokens: queue.SimpleQueue[int] = queue.SimpleQueue()
    abandoned = threading.Event()

    def beat(num_tokens: int) -> None:
        if abandoned.is_set():
            raise _Abandoned
        tokens.put(num_tokens)

    def work(shard: Shard, hand: Sequence[Piece]) -> None:
        # a thread's number of compute threads is its own
        torch.set_num_threads(threads)
        shard.heartbeat = beat
        try:
            for completion in shard.run(hand):
                results.put(completion)
            results.put(None)
        except BaseException as error:  # noqa: BLE001 - it is raised again where the results are read
            results.put(error)

    workers = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(shards, hands, strict=True)]
    for worker in workers:
        worker.start()
    try:
        running = len(workers)
        while running:
            try:
                result = results.get(timeout=POLL_S)
            except queue.Empty:
                heartbeat(_take(tokens))
                continue
            if isinstance(result, BaseException):
                raise result
            if result is None:
                running -= 1
                continue
            yield result
            heartbeat(_take(tokens))
        heartbeat(_take(tokens))
    finally:
        abandoned.set()
        for worker in workers:
            worker.join()


def _take(tokens: queue.SimpleQueue[int]) -> int:
    total = 0
    while not tokens.empty():
        total += tokens.get()
    return total
