"""Generation over ranks: whole shards, each made and judged by whichever rank is free, handed on in the order in which they are
asked for.

Guarantee: a shard is made under the plan that one process would have used, so that its bytes do not depend on which rank made it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.filters import Judging
from iterative_sft_cli.filters.sharing import is_plain
from iterative_sft_cli.generate.base import Engine, EngineOutOfMemory
from iterative_sft_cli.ranks.link import Link
from iterative_sft_cli.ranks.wire import from_decoding, from_requests, pack, to_completion, unpack
from iterative_sft_cli.rounds.sampling import sample_id
from iterative_sft_cli.samples import prompt_to_row
from iterative_sft_cli.types import Completion, Decoding, Request

Shard = tuple[Sequence[Request], Decoding]
WAIT_S = 0.5


class Job:
    """One announced shard: what has come of it so far."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.made: deque[Completion] = deque()
        self.num_tokens = 0
        self.plan: Any = None
        self.sample_ids: list[str] = []
        """Of the samples that the rank which makes them judges too; none where rank 0 does."""
        self.said: list[list[dict[str, Any]]] | None = None
        self.done = self.out_of_memory = False


class RankedEngine:
    """Rank 0's `Engine` over its own and those of the others; see `generate/base.py` for the contract.

    `announce` says which shards will be asked for, in order; those are shared out. Others are made here.
    `elsewhere` holds what other ranks say of the samples that they make, by sample id; None while they are at it.
    """

    def __init__(self, local: Engine, link: Link) -> None:
        self._local, self._link = local, link
        self.deterministic = local.deterministic
        self.heartbeat: Callable[[int], None] = lambda _tokens: None
        local.heartbeat = self._beat
        self.elsewhere: dict[str, list[dict[str, Any]] | None] = {}
        self._coming: Iterator[Shard] = iter(())
        self._judging: Judging | None = None
        self._number = 0
        self._jobs: dict[int, Job] = {}
        self._by_key: dict[tuple[Any, ...], int] = {}
        self._posted = self._taken = 0
        self._open = self._exhausted = False
        self._mine: tuple[Job, Iterator[Completion]] | None = None
        self._keeps = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._local, name)

    def begin(self, weights: Path | None) -> None:
        """Serve the same weights on every rank."""
        stamp = None
        if weights is not None and (weights / "MANIFEST.json").is_file():
            stamp = (weights / "MANIFEST.json").read_text(encoding="utf-8")
        self._link.command("serve", weights=None if weights is None else str(weights.resolve()), manifest=stamp)
        self._local.begin(weights)

    def end(self) -> None:
        """Free what `begin` took, everywhere."""
        self._finish()
        self._link.command("unserve")
        self._local.end()

    def plan(self, requests: Sequence[Request], decoding: Decoding) -> dict[str, Any]:
        """The batch shape of a shard, as one process would choose it."""
        return self._local.plan(requests, decoding)

    def keep_prompts(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Have every rank keep the prompts that this one has memory for: what is read together is the same everywhere."""
        keep = getattr(self._local, "keep_prompts", None)
        if keep is not None and (prompts or self._keeps):
            kept = keep(prompts)
            self._keeps = bool(kept)
            self._link.command("keep_prompts", prompts=kept)

    def announce(self, shards: Iterable[Shard], judging: Judging | None = None) -> None:
        """The shards that will be asked for next, in that order, read as they are needed; and how they are judged elsewhere."""
        self._finish()
        self._coming, self._exhausted, self._judging = iter(shards), False, judging

    def generate(self, requests: Sequence[Request], decoding: Decoding, plan: dict[str, Any]) -> Iterator[Completion]:
        """The completions of a shard, from the rank that makes it. Raises EngineOutOfMemory as that rank did."""
        self._fill()
        number = self._by_key.pop(_key(requests), None)
        if number is None:
            yield from self._alone(requests, decoding, plan)
            return
        job = self._jobs[number]
        self._taken += 1
        while True:
            if job.plan is not None and job.plan != _plain(plan):
                self._drop(number)
                yield from self._alone(requests, decoding, plan)
                return
            yield from self._hand_on(job)
            if job.out_of_memory:
                self._drop(number)
                raise EngineOutOfMemory("on another rank")
            if job.done:
                break
            yield from self._go_on(job)
        self._drop(number)
        if job.said is not None:
            self.elsewhere.update(zip(job.sample_ids, job.said, strict=True))

    def _hand_on(self, job: Job) -> Iterator[Completion]:
        """What has come of a shard since the last call."""
        if job.made:
            # said first: these samples are not judged here
            self.elsewhere.update(dict.fromkeys(job.sample_ids))
        while job.made:
            yield job.made.popleft()

    def _drop(self, number: int) -> None:
        for name in self._jobs.pop(number).sample_ids:
            self.elsewhere.pop(name, None)

    def _go_on(self, wanted: Job) -> Iterator[Completion]:
        """Make some shard here, or wait for what the others make; returns when there may be news of `wanted`."""
        if self._mine is None:
            self._claim()
        if self._mine is None:
            self._hear(WAIT_S)
            self.heartbeat(wanted.num_tokens)
            wanted.num_tokens = 0
            return
        job, made = self._mine
        try:
            for completion in made:
                job.made.append(completion)
                self._hear(0.0)
                yield from self._hand_on(wanted)
                if wanted.done or wanted.out_of_memory:
                    return
            job.done = True
        except EngineOutOfMemory:
            job.out_of_memory = True
        self._mine = None

    def _alone(self, requests: Sequence[Request], decoding: Decoding, plan: dict[str, Any]) -> Iterator[Completion]:
        while self._mine is not None:
            job, made = self._mine
            try:
                job.made.extend(made)
                job.done = True
            except EngineOutOfMemory:
                job.out_of_memory = True
            self._mine = None
        yield from self._local.generate(requests, decoding, plan)

    def _beat(self, num_tokens: int) -> None:
        self._hear(0.0)
        self.heartbeat(num_tokens)

    # --- sharing out ----------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Keep so many shards ahead that no rank waits: one at work and one waiting for each."""
        while not self._exhausted and self._posted < self._taken + 2 * self._link.size:
            if self._next() is None:
                break

    def _next(self, *, post: bool = True) -> Job | None:
        shard = None if self._exhausted else next(self._coming, None)
        if shard is None:
            if self._open and not self._exhausted:
                for index in range(self._posted, self._posted + self._link.size):
                    self._link.put(f"job/{self._number}/{index}", None)
            self._exhausted = True
            return None
        if not self._open:
            self._open = True
            self._number += 1
            self._posted = self._taken = 0
            part = None if self._judging is None else self._judging.part
            self._link.command("generate", number=self._number, judging=part)
        job = Job(shard)
        requests, decoding = shard
        if post:
            self._link.put(
                f"job/{self._number}/{self._posted}",
                {
                    "requests": from_requests(requests),
                    "decoding": from_decoding(decoding),
                    "prompts": _prompts_of(requests, self._judging),
                },
            )
        self._jobs[self._posted] = job
        self._by_key[_key(requests)] = self._posted
        self._posted += 1
        return job

    def _claim(self) -> None:
        """Take a shard that nobody makes yet, if there is one."""
        cursor = f"cursor/{self._number}"
        if not self._open or self._link.count(cursor, 0) >= self._posted:
            return
        number = self._link.count(cursor) - 1
        while self._posted < number and self._next() is not None:
            pass
        if number == self._posted and self._next(post=False) is None:
            return
        job = self._jobs.get(number)
        if job is None:
            return
        self._link.forget(f"job/{self._number}/{number}")
        requests, decoding = job.shard
        plan = self._local.plan(requests, decoding)
        job.plan = _plain(plan)
        self._mine = (job, self._local.generate(requests, decoding, plan))

    def _hear(self, wait_s: float) -> None:
        for said in self._link.hear(wait_s):
            if said["say"] != "made" or said["number"] != self._number:
                continue
            job = self._jobs.get(said["job"])
            if job is None:
                continue
            job.plan = said["plan"]
            if said["judges"] and self._judging is not None and not job.sample_ids:
                job.sample_ids = _sample_ids(job.shard[0], self._judging.round_index)
            job.said = said["said"]
            job.made.extend(to_completion(values) for values in said["made"])
            job.num_tokens += said["tokens"]
            job.done = said["done"]
            job.out_of_memory = said["out_of_memory"]
        self._fill()

    def _finish(self) -> None:
        """Let the ranks leave the shards of an announcement; what is left of it is not wanted any more."""
        if self._mine is not None:
            close = getattr(self._mine[1], "close", None)
            if close is not None:
                close()
            self._mine = None
        if self._open:
            self._coming = iter(())
            self._next()
            self._open = False
        self._coming, self._exhausted = iter(()), True
        self._jobs, self._by_key = {}, {}


def _key(requests: Sequence[Request]) -> tuple[Any, ...]:
    return tuple((request.prompt_id, request.seeds) for request in requests)


def _sample_ids(requests: Sequence[Request], round_index: int) -> list[str]:
    return [sample_id(round_index, one.prompt_id, index) for one in requests for index in one.sample_indices]


def _prompts_of(requests: Sequence[Request], judging: Judging | None) -> list[Any] | None:
    """What filters see of each request's prompt, and the ids to train after; None where JSON would change that."""
    if judging is None:
        return None
    rows = [
        [prompt_to_row(judging.prompts[one.prompt_id]), list(judging.trained_after.get(one.prompt_id, one.prompt_ids))]
        for one in requests
    ]
    return rows if is_plain(rows) else None


def _plain(plan: dict[str, Any]) -> Any:
    return unpack(pack(plan))
