"""The first filters of a run on the rank that makes a shard: judged while it is made, said with its last completion.

Guarantee: a filter that fails here decides nothing: rank 0 judges that shard itself and raises what it meets.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from iterative_sft_cli.filters import FilterChain, Judged, ResolvedFilter, Runtime, Shard, open_part
from iterative_sft_cli.ranks.link import Link
from iterative_sft_cli.ranks.wire import pack
from iterative_sft_cli.rounds.sampling import make_sample
from iterative_sft_cli.samples import prompt_from_row
from iterative_sft_cli.types import Completion, Prompt, Request, Sample

LOOK_S = 0.2
"""While filters are waited for, the rank looks this often whether the run goes on."""


def hashes_of(filters: Sequence[ResolvedFilter]) -> dict[str, str]:
    """The content of each filter's source, which is to be the same on every host."""
    return {one.name: one.source_hash for one in filters}


class RankJudge:
    """A rank's filters, with workers and models that serve every round."""

    def __init__(self, encoder: Any, filters: Sequence[ResolvedFilter], link: Link) -> None:
        self._encoder, self._filters, self._link = encoder, filters, link
        self._runtime = Runtime()
        self._chain: FilterChain | None = None

    @contextmanager
    def of(self, part: dict[str, Any] | None) -> Iterator[None]:
        """Judge the shards of one announcement; None when rank 0 does."""
        if part is None:
            yield
            return
        with open_part(part, self._filters, encoder=self._encoder, runtime=self._runtime) as self._chain:
            try:
                yield
            finally:
                self._chain = None

    def open(self, prompts: Sequence[Any] | None) -> RankShard | None:
        """A shard over these prompts; None when it is judged by rank 0."""
        if self._chain is None or prompts is None:
            return None
        found = {row["prompt_id"]: (prompt_from_row(row), tuple(ids)) for row, ids in prompts}
        return RankShard(self._chain, self._encoder, found, self._link)

    def close(self) -> None:
        """End the filters' workers, whatever they are at."""
        self._runtime.cancel()
        self._runtime.close()


class RankShard:
    """One shard: completions in, what was said of them out."""

    def __init__(
        self, chain: FilterChain, encoder: Any, prompts: dict[str, tuple[Prompt, tuple[int, ...]]], link: Link
    ) -> None:
        self._chain, self._encoder, self._prompts, self._link = chain, encoder, prompts, link
        self._shard: Shard = chain.open_shard()
        self._samples: dict[tuple[str, int], Sample] = {}

    def submit(self, completion: Completion) -> None:
        """Take a completion as soon as it is made."""
        prompt, ids = self._prompts[completion.prompt_id]
        sample = make_sample(prompt, completion, ids, round_index=self._chain.round_index, decode=self._encoder.decode)
        self._samples[prompt.prompt_id, completion.sample_index] = sample
        self._shard.submit(sample)

    def finish(self, requests: Sequence[Request]) -> list[list[dict[str, Any]]] | None:
        """What was said of each sample, in the order of `requests`; None when a filter failed. Raises what ends the run."""
        samples = [self._samples[one.prompt_id, index] for one in requests for index in one.sample_indices]
        found: list[list[Judged]] = []
        failed: list[Exception] = []

        def judge() -> None:
            try:
                found.append(self._shard.finish(samples))
            except Exception as error:
                failed.append(error)

        # a thread that nobody waits for when the run ends
        thread = threading.Thread(target=judge, name="isft-judge", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_S)
            self._link.check()
        try:
            if failed:
                raise failed[0]
            said = self._shard.said(found[0])
            pack(said)
        except Exception as error:
            sys.stderr.write(f"isft: {self._link.name} leaves a shard's filters to rank 0: {error}\n")
            return None
        return said
