"""One shard of completions: its requests, the engine that answers them, and the splits that memory forces, sealed before they are tried."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from iterative_sft_cli.errors import OutOfMemoryError
from iterative_sft_cli.generate.base import Engine, EngineOutOfMemory
from iterative_sft_cli.rounds.stages import Phase, Stages
from iterative_sft_cli.samples import GENERATED
from iterative_sft_cli.types import Completion, Decoding, Prompt, Request, Sample, derive_seed
from iterative_sft_cli.watchdog import Watchdog, end_hung_process

Item = TypeVar("Item")

SHARD_ROWS = 512
"""Samples of a shard: what a kill can cost at most, against the idle rows while a shard drains."""


def make_request(
    prompt: Prompt, prompt_ids: Sequence[int], indices: Iterable[int], *, seed: int, purpose: str, round_index: int
) -> Request:
    """The request for some samples of a prompt; every sample's seed is a function of (seed, purpose, round, prompt, sample)."""
    wanted = tuple(indices)
    return Request(
        prompt_id=prompt.prompt_id,
        prompt=prompt.prompt,
        prompt_ids=tuple(prompt_ids),
        sample_indices=wanted,
        seeds=tuple(derive_seed(seed, purpose, round_index, prompt.prompt_id, index) for index in wanted),
    )


def make_requests(
    stages: Stages, encoder: Any, prompts: Sequence[Prompt], num_samples: int, *, purpose: str, round_index: int
) -> list[Request]:
    """One request a prompt, for samples 0 to `num_samples` - 1."""
    seed = stages.config.seed
    return [
        make_request(
            prompt,
            encoder.encode_prompt(prompt.prompt),
            range(num_samples),
            seed=seed,
            purpose=purpose,
            round_index=round_index,
        )
        for prompt in prompts
    ]


def into_groups(items: Iterable[Item], size: Callable[[Item], int], rows: int) -> Iterator[list[Item]]:
    """Cut items of so many samples each, in order, into groups of at most `rows` samples (a larger item is its own group)."""
    group: list[Item] = []
    num = 0
    for item in items:
        if group and num + size(item) > rows:
            yield group
            group, num = [], 0
        group.append(item)
        num += size(item)
    if group:
        yield group


def into_shards(requests: Sequence[Request], rows: int = SHARD_ROWS) -> Iterator[list[Request]]:
    """Cut requests, in order, into shards of at most `rows` samples (a single larger request is its own shard)."""
    return into_groups(requests, lambda request: len(request.seeds), rows)


def sample_id(round_index: int, prompt_id: str, sample_index: int) -> str:
    """The name of a sample in its run."""
    return f"{round_index}-{prompt_id}-{sample_index}"


def make_sample(
    prompt: Prompt,
    completion: Completion,
    prompt_ids: Sequence[int],
    *,
    round_index: int,
    decode: Callable[[Sequence[int]], str],
) -> Sample:
    """A completion with all that is known of its prompt, to be trained after `prompt_ids`."""
    text = decode(completion.token_ids) if completion.text is None else completion.text
    return Sample(
        prompt_id=prompt.prompt_id,
        sample_id=sample_id(round_index, prompt.prompt_id, completion.sample_index),
        round_index=round_index,
        prompt=prompt.prompt,
        completion=text,
        answer=prompt.answer,
        row=prompt.row,
        prompt_ids=tuple(prompt_ids),
        completion_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        logprob=completion.logprob,
        final=text,
        sample_index=completion.sample_index,
    )


def generate_shard(
    stages: Stages,
    engine: Engine,
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    round_index: int,
    name: str,
    prompts: Mapping[str, Prompt],
    phase: Phase,
    on_sample: Callable[[Sample], None],
    trained_after: Mapping[str, Sequence[int]] | None = None,
    logprobs: dict[str, list[float]] | None = None,
) -> tuple[list[Sample], dict[str, Any]]:
    """All samples of a shard in the order of its requests, and the batch plan that made them.

    `trained_after`: prompt ids to the token ids that the samples are trained after, where these are not the ones they were generated after.
    `logprobs` is filled with each token's log probability, by sample id.
    An out-of-memory split is a sealed decision before it is tried, so a resumed run repeats it. At one row it is an error.
    Under an engine that does not repeat itself each finished completion is journaled, and a resumed run asks only for the others.
    """
    context = int(stages.encoder.context_length)
    if decoding.max_new_tokens >= context and round_index == 1 and name == f"{GENERATED}-00000":
        stages.view.note(
            f"warning: max_new_tokens {decoding.max_new_tokens} is beyond the model's context of {context} tokens:"
            " completions end there"
        )
    plan = engine.plan(requests, decoding)
    splits = 0
    # the same plan gives a deterministic engine's same bytes, but only for the whole shard
    repeats = engine.deterministic or stages.config.deterministic
    journal = None if repeats else stages.run.journal(round_index, name, _key(stages, requests, decoding))
    finished = Finished(journal)
    if finished.kept:
        stages.run.telemetry.append(
            {"event": "journal", "round": round_index, "shard": name, "num": len(finished.kept)}
        )
    try:
        while True:
            recorded = stages.run.shards.read(round_index, f"split-{name}-{splits}")
            if recorded is not None:
                plan, splits = recorded[0][0], splits + 1
                continue
            try:
                made = _collect(
                    stages,
                    engine,
                    requests,
                    decoding,
                    plan,
                    round_index,
                    prompts,
                    phase,
                    on_sample,
                    trained_after or {},
                    logprobs if logprobs is not None else {},
                    finished,
                )
                return made, plan
            except EngineOutOfMemory as error:
                if plan["max_rows"] <= 1:
                    raise OutOfMemoryError(
                        "memory ran out while generating a single row",
                        where=f"round {round_index}, {name}",
                        hint="lower generate.max_new_tokens, use a smaller model, or give the machine more memory",
                    ) from error
                plan = {**plan, "max_rows": plan["max_rows"] // 2}
                stages.run.shards.seal(round_index, f"split-{name}-{splits}", [plan], {})
    finally:
        finished.close()
        usage = getattr(engine, "usage", None)
        if usage is not None:
            stages.run.telemetry.append({"event": "usage", "round": round_index, "shard": name, **asdict(usage)})


class Finished:
    """The completions of a shard that need not be made again: those in its journal (None: there is none)."""

    def __init__(self, journal: Any) -> None:
        self._journal = journal
        self.kept: dict[tuple[str, int], Completion] = {}
        for row in journal.rows if journal is not None else ():
            each = row["token_logprobs"]
            self._keep(
                Completion(
                    prompt_id=row["prompt_id"],
                    sample_index=row["sample_index"],
                    token_ids=tuple(row["token_ids"]),
                    finish_reason=row["finish_reason"],
                    text=row["text"],
                    logprob=row["logprob"],
                    token_logprobs=None if each is None else tuple(each),
                )
            )

    def _keep(self, completion: Completion) -> None:
        self.kept[completion.prompt_id, completion.sample_index] = completion

    def add(self, completion: Completion) -> None:
        """Journal one that was just finished."""
        if self._journal is not None:
            self._keep(completion)
            self._journal.append(asdict(completion))

    def tick(self) -> None:
        """See `Journal.tick`."""
        if self._journal is not None:
            self._journal.tick()

    def close(self) -> None:
        """See `Journal.close`."""
        if self._journal is not None:
            self._journal.close()

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """The requests without the samples that are there."""
        found = []
        for request in requests:
            wanted = [
                (index, seed)
                for index, seed in zip(request.sample_indices, request.seeds, strict=True)
                if (request.prompt_id, index) not in self.kept
            ]
            if wanted:
                indices, seeds = zip(*wanted, strict=True)
                found.append(replace(request, sample_indices=indices, seeds=seeds))
        return found


def _key(stages: Stages, requests: Sequence[Request], decoding: Decoding) -> str:
    """What a journaled completion depends on: what was asked, how it is decoded, and the weights."""
    newest = stages.run.checkpoints.newest()
    weights = stages.live_hash or (newest.weights_hash if newest is not None else stages.base_hash)
    asked = [[request.prompt_ids, request.sample_indices, request.seeds] for request in requests]
    text = json.dumps([asked, asdict(decoding), weights, stages.session.serving])
    return hashlib.sha256(text.encode()).hexdigest()


def _collect(
    stages: Stages,
    engine: Engine,
    requests: Sequence[Request],
    decoding: Decoding,
    plan: dict[str, Any],
    round_index: int,
    prompts: Mapping[str, Prompt],
    phase: Phase,
    on_sample: Callable[[Sample], None],
    trained_after: Mapping[str, Sequence[int]],
    logprobs: dict[str, list[float]],
    finished: Finished,
) -> list[Sample]:
    timeout_s = float(stages.config.generate.timeout_s)

    def hang() -> None:
        end_hung_process(stages.run.path, "the engine", timeout_s)

    def heartbeat(num_tokens: int) -> None:
        watchdog.beat()
        stages.stop()
        finished.tick()
        phase.advance(tokens=num_tokens)

    engine.heartbeat = heartbeat
    watchdog = Watchdog(timeout_s, hang)
    ids = {request.prompt_id: request.prompt_ids for request in requests}
    made: dict[tuple[str, int], Sample] = {}
    with watchdog:
        for completion in _completions(engine, requests, decoding, plan, finished):
            prompt = prompts[completion.prompt_id]
            after = trained_after.get(prompt.prompt_id, ids[prompt.prompt_id])
            sample = make_sample(prompt, completion, after, round_index=round_index, decode=stages.encoder.decode)
            made[prompt.prompt_id, completion.sample_index] = sample
            if completion.token_logprobs is not None:
                logprobs[sample.sample_id] = list(completion.token_logprobs)
            on_sample(sample)
            watchdog.beat()
            phase.advance(1)
            stages.stop()
    return [made[request.prompt_id, index] for request in requests for index in request.sample_indices]


def _completions(
    engine: Engine, requests: Sequence[Request], decoding: Decoding, plan: dict[str, Any], finished: Finished
) -> Iterator[Completion]:
    """What is there already, then what the engine makes."""
    missing = finished.missing(requests)
    yield from list(finished.kept.values())
    if missing:
        for completion in engine.generate(missing, decoding, plan):
            finished.add(completion)
            yield completion


def seeds_of(requests: Sequence[Request]) -> dict[tuple[str, int], int]:
    """The seed of every (prompt, sample index)."""
    return {
        (request.prompt_id, index): seed
        for request in requests
        for index, seed in zip(request.sample_indices, request.seeds, strict=True)
    }
