"""Generate and filter, shard by shard: a sealed shard is never made again, the filters of one overlap the making of the next."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from iterative_sft_cli.errors import OutOfMemoryError
from iterative_sft_cli.filters import FilterChain, Judged
from iterative_sft_cli.generate.base import Engine, EngineOutOfMemory
from iterative_sft_cli.rounds.stages import Phase, RoundLog, Stages
from iterative_sft_cli.samples import (
    GENERATED,
    ROUND_VERDICTS,
    VERDICTS,
    read_generated,
    sample_to_row,
)
from iterative_sft_cli.types import Decoding, Prompt, Request, Sample, derive_seed

SHARD_ROWS = 512
"""Samples of a shard: what a kill can cost at most, against the idle rows while a shard drains."""


def make_requests(
    stages: Stages, encoder: Any, prompts: Sequence[Prompt], num_samples: int, *, purpose: str, round_index: int
) -> list[Request]:
    """One request a prompt; every sample's seed is a function of (seed, purpose, round, prompt, sample)."""
    seed = stages.config.seed
    return [
        Request(
            prompt_id=prompt.prompt_id,
            prompt=prompt.prompt,
            prompt_ids=tuple(encoder.encode_prompt(prompt.prompt)),
            sample_indices=tuple(range(num_samples)),
            seeds=tuple(derive_seed(seed, purpose, round_index, prompt.prompt_id, i) for i in range(num_samples)),
        )
        for prompt in prompts
    ]


def into_shards(requests: Sequence[Request], rows: int = SHARD_ROWS) -> Iterator[list[Request]]:
    """Cut requests, in order, into shards of at most `rows` samples (a single larger request is its own shard)."""
    shard: list[Request] = []
    size = 0
    for request in requests:
        if shard and size + len(request.seeds) > rows:
            yield shard
            shard, size = [], 0
        shard.append(request)
        size += len(request.seeds)
    if shard:
        yield shard


def generate_shard(
    stages: Stages,
    engine: Engine,
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    round_index: int,
    name: str,
    prompts: dict[str, Prompt],
    phase: Phase,
    on_sample: Any,
) -> tuple[list[Sample], dict[str, Any]]:
    """All samples of a shard in the order of its requests, and the batch plan that made them.

    An out-of-memory split is a sealed decision before it is tried, so a resumed run repeats it. At one row it is an error.
    """
    plan = engine.plan(requests, decoding)
    splits = 0
    while True:
        recorded = stages.run.shards.read(round_index, f"split-{name}-{splits}")
        if recorded is not None:
            plan, splits = recorded[0][0], splits + 1
            continue
        try:
            return _collect(stages, engine, requests, decoding, plan, round_index, prompts, phase, on_sample), plan
        except EngineOutOfMemory as error:
            if plan["max_rows"] <= 1:
                raise OutOfMemoryError(
                    "memory ran out while generating a single row",
                    where=f"round {round_index}, {name}",
                    hint="lower generate.max_new_tokens, use a smaller model, or give the machine more memory",
                ) from error
            plan = {**plan, "max_rows": plan["max_rows"] // 2}
            stages.run.shards.seal(round_index, f"split-{name}-{splits}", [plan], {})


def _collect(
    stages: Stages,
    engine: Engine,
    requests: Sequence[Request],
    decoding: Decoding,
    plan: dict[str, Any],
    round_index: int,
    prompts: dict[str, Prompt],
    phase: Phase,
    on_sample: Any,
) -> list[Sample]:
    def heartbeat(num_tokens: int) -> None:
        stages.stop()
        stages.tokens_generated += num_tokens
        phase.advance(tokens=num_tokens)

    engine.heartbeat = heartbeat
    ids = {request.prompt_id: request.prompt_ids for request in requests}
    made: dict[tuple[str, int], Sample] = {}
    for completion in engine.generate(requests, decoding, plan):
        prompt = prompts[completion.prompt_id]
        text = stages.encoder.decode(completion.token_ids) if completion.text is None else completion.text
        sample = Sample(
            prompt_id=prompt.prompt_id,
            sample_id=f"{round_index}-{prompt.prompt_id}-{completion.sample_index}",
            round_index=round_index,
            prompt=prompt.prompt,
            completion=text,
            answer=prompt.answer,
            row=prompt.row,
            prompt_ids=ids[prompt.prompt_id],
            completion_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            logprob=completion.logprob,
            final=text,
            sample_index=completion.sample_index,
        )
        made[prompt.prompt_id, completion.sample_index] = sample
        on_sample(sample)
        phase.advance(1)
        stages.stop()
    return [made[request.prompt_id, index] for request in requests for index in request.sample_indices]


def seeds_of(requests: Sequence[Request]) -> dict[tuple[str, int], int]:
    """The seed of every (prompt, sample index)."""
    return {
        (request.prompt_id, index): seed
        for request in requests
        for index, seed in zip(request.sample_indices, request.seeds, strict=True)
    }


def judge_round(
    stages: Stages,
    config: Any,
    prompts: Sequence[Prompt],
    *,
    round_index: int,
    weights_hash: Any,
    open_engine: Any,
    chain: FilterChain,
    log: RoundLog,
) -> None:
    """Leave every sample of the round sealed with its verdicts. `open_engine` and `weights_hash` are called only when
    something is to be generated."""
    run, shards = stages.run, stages.run.shards
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    decoding = config.generate.decoding(eos_token_ids=stages.encoder.eos_token_ids)
    num_samples = int(config.generate.samples_per_prompt)
    requests = make_requests(stages, stages.encoder, prompts, num_samples, purpose="generate", round_index=round_index)
    judging: list[Future[int]] = []
    start = time.monotonic()

    with (
        ThreadPoolExecutor(1) as judges,
        stages.view.phase("generate", round_index, len(prompts) * num_samples, "samples") as phase,
    ):
        for index, shard in enumerate(into_shards(requests)):
            name = f"{GENERATED}-{index:05d}"
            verdicts = name.replace(GENERATED, VERDICTS, 1)
            found = shards.read(round_index, name)
            judged = shards.read(round_index, verdicts)
            if found is not None and judged is not None:
                log("generated", shard=name, num_samples=len(found[0]))
                phase.advance(len(found[0]))
                continue
            stream = chain.open_shard()
            if found is None:
                samples, plan = generate_shard(
                    stages,
                    open_engine(),
                    shard,
                    decoding,
                    round_index=round_index,
                    name=name,
                    prompts=by_id,
                    phase=phase,
                    on_sample=stream.submit,
                )
                seeds = seeds_of(shard)
                rows = [sample_to_row(s, seeds[s.prompt_id, s.sample_index]) for s in samples]
                shards.seal(round_index, name, rows, {"weights": weights_hash(), "plan": plan})
            else:
                samples = read_generated(shards, round_index, name, by_id)
                for sample in samples:
                    stream.submit(sample)
                phase.advance(len(samples))
            log("generated", shard=name, num_samples=len(samples))
            if len(judging) >= 2:
                judging[-2].result()
            judging.append(judges.submit(_judge_shard, stages, stream, samples, round_index, verdicts))
        for pending in judging:
            pending.result()
    run.telemetry.append({"event": "generate", "round": round_index, "seconds": time.monotonic() - start})

    start = time.monotonic()
    if chain.has_round_part and shards.read(round_index, ROUND_VERDICTS) is None:
        said = chain.finish_round(JudgedRound(stages, by_id, round_index))
        rows = [{"sample_id": key, "says": [one.to_row() for one in says]} for key, says in said.items()]
        shards.seal(round_index, ROUND_VERDICTS, rows, {})
    for name in shards.names(round_index, VERDICTS):
        found = shards.read(round_index, name)
        log("judged", shard=name, num_samples=len(found[0]) if found else 0)
    run.telemetry.append({"event": "filters", "round": round_index, "seconds": time.monotonic() - start})


def _judge_shard(stages: Stages, stream: Any, samples: Sequence[Sample], round_index: int, name: str) -> int:
    judged = stream.finish(samples)
    rows = [
        {"sample_id": one.sample.sample_id, "kept": one.kept, "says": [says.to_row() for says in one.says]}
        for one in judged
    ]
    stages.run.shards.seal(round_index, name, rows, {})
    return len(rows)


class JudgedRound(Sequence[Judged]):
    """The samples of a round that passed the streaming filters, in order, read from the sealed shards as they are asked for."""

    def __init__(self, stages: Stages, prompts: dict[str, Prompt], round_index: int) -> None:
        self._stages = stages
        self._prompts = prompts
        self._round_index = round_index
        self._index: list[tuple[str, int]] = []
        self._open: tuple[str, list[Judged]] | None = None
        for name in stages.run.shards.names(round_index, GENERATED):
            self._index += [(name, i) for i, one in enumerate(self._load(name)) if one.kept]

    def _load(self, name: str) -> list[Judged]:
        if self._open is None or self._open[0] != name:
            shards = self._stages.run.shards
            samples = read_generated(shards, self._round_index, name, self._prompts)
            verdicts = shards.read(self._round_index, name.replace(GENERATED, VERDICTS, 1))[0]
            judged = [Judged.from_rows(s, v["says"], v["kept"]) for s, v in zip(samples, verdicts, strict=True)]
            self._open = (name, judged)
        return self._open[1]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name, position = self._index[index]
        return self._load(name)[position]
