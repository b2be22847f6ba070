"""Runs the filters of a config over samples: shard by shard while they are generated, then once over the round.

A shard's verdicts depend only on its samples and their order, never on when they were submitted or what ran beside them.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from iterative_sft_cli.errors import ConfigError, PluginError
from iterative_sft_cli.filters.batches import BatchSizes
from iterative_sft_cli.filters.contract import Outcome
from iterative_sft_cli.filters.resolve import is_read, unread_scores
from iterative_sft_cli.filters.resolved import ResolvedFilter
from iterative_sft_cli.filters.round_part import judge_round_part
from iterative_sft_cli.filters.runners import DirectRunner, Runner
from iterative_sft_cli.filters.runtime import Runtime
from iterative_sft_cli.filters.says import GENERATE, FilterSays, Judged
from iterative_sft_cli.types import PROMPT_TOO_LONG, STOP, Sample

Elsewhere = MutableMapping[str, list[dict[str, Any]] | None]
"""What another process says of samples, by their ids: rows of the first filters' verdicts, None while it is at it."""
BARE = "bare"
"""Key of such a row whose score was a float, which something must read."""


class AcceptedHistory(Protocol):
    """What earlier rounds accepted: `{"prompt_id", "completion", "round_index"}`, oldest round first, iterable often."""

    def __iter__(self) -> Any:
        """Start from the oldest round."""


class ThinkingSplitter(Protocol):
    """The part of an encoder that the chain uses."""

    def split_thinking(self, text: str, prompt_ids: Sequence[int]) -> Any:
        """An object with `reasoning`, `final`, `closed`."""


class FilterChain:
    """The filters of one round. Use as a context manager; `open_shard` may be called while other shards are finishing.

    `scores_read` are the names that weights and objectives read; None switches the check for unread scores off (eval).
    `eval_texts` are the evaluation's prompts, for `not_in_eval`. `runtime` holds workers and models that outlive the chain; without one the chain has its own.
    `batch_sizes` keeps the batches of scoring models that did not fit into memory, for a resumed round to take the same.
    """

    def __init__(
        self,
        filters: Sequence[ResolvedFilter],
        *,
        seed: int,
        round_index: int,
        accepted_earlier: AcceptedHistory | Iterable[Mapping[str, Any]] | None = None,
        cache_dir: Path | None = None,
        encoder: ThinkingSplitter | None = None,
        max_length: int | None = None,
        scores_read: Iterable[str] | None = None,
        eval_texts: Sequence[str] = (),
        runtime: Runtime | None = None,
        batch_sizes: BatchSizes | None = None,
    ) -> None:
        self.filters = [one.at_round(round_index) for one in filters]
        self.seed = seed
        self.round_index = round_index
        self._encoder = encoder
        self.max_length = max_length
        self._scores_read = None if scores_read is None else frozenset(scores_read)
        self._own_runtime = runtime is None
        self.runtime = runtime or Runtime()
        self.runners: list[Runner] = [
            self.runtime.runner(
                one,
                seed=seed,
                round_index=round_index,
                cache_dir=cache_dir,
                accepted_earlier=accepted_earlier if accepted_earlier is not None else (),
                eval_texts=eval_texts,
                batch_sizes=batch_sizes,
            )
            for one in self.filters
        ]
        wide = [index for index, one in enumerate(self.filters) if one.kind == "samples"]
        self.streaming_end = wide[0] if wide else len(self.filters)
        self._check_unread([])

    def __enter__(self) -> FilterChain:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what the filters hold on an accelerator; end the workers of a chain that has its own runtime."""
        self.runtime.release_device()
        for runner in self.runners:
            runner.close()
        if self._own_runtime:
            self.runtime.close()

    @property
    def has_round_part(self) -> bool:
        """Whether `finish_round` has something to do: the list holds a `samples` filter."""
        return self.streaming_end < len(self.filters)

    @property
    def needs_device(self) -> bool:
        """Whether a streaming filter waits for the accelerator: then call `finish` after the engine has left it."""
        return any(one.needs_device for one in self.filters[: self.streaming_end])

    @property
    def at_once(self) -> bool:
        """Whether every streaming filter is a function in this process: judging takes no time to speak of."""
        return all(isinstance(runner, DirectRunner) for runner in self.runners[: self.streaming_end])

    def not_prefix_stable(self) -> list[str]:
        """Names of filters with which `until_accepted` cannot work: their verdict on a sample depends on later ones."""
        return [one.name for one in self.filters if one.kind != "sample" and not one.prefix_stable]

    def open_shard(self, earlier: Sequence[Judged] = (), elsewhere: Elsewhere | None = None) -> Shard:
        """A new shard. `earlier` are judged samples of the same prompts in this round (the waves of `until_accepted`):
        group filters see them before the new ones, their verdicts stand. `elsewhere` holds what other processes say."""
        return Shard(self, earlier, elsewhere)

    def prepare(self, sample: Sample) -> tuple[Sample, FilterSays | None]:
        """The sample with reasoning and final part, and the rejection that precedes all filters, if any."""
        if sample.finish_reason == PROMPT_TOO_LONG:
            return sample, FilterSays(GENERATE, False, None, "prompt_too_long")
        said: FilterSays | None = None
        if self._encoder is not None:
            thinking = self._encoder.split_thinking(sample.completion, sample.prompt_ids)
            if not thinking.closed:
                said = FilterSays(GENERATE, False, None, "thinking_unclosed")
            if thinking.reasoning != sample.reasoning or thinking.final != sample.final:
                sample = replace(sample, reasoning=thinking.reasoning, final=thinking.final)
        elif sample.final != sample.completion and sample.reasoning is None:
            sample = replace(sample, final=sample.completion)
        if said is None and self.max_length is not None:
            # after a stop string the training row gets an EOS of its own
            size = len(sample.prompt_ids) + len(sample.completion_ids) + (sample.finish_reason == STOP)
            if size > self.max_length:
                said = FilterSays(GENERATE, False, None, "too_long")
        return sample, said

    def finish_round(self, judged: Sequence[Judged]) -> dict[str, list[FilterSays]]:
        """Run the first `samples` filter and all after it over the round's survivors, in order.

        Samples that are not `kept` are passed over. Returns what was said of each survivor; empty without a round part.
        """
        if not self.has_round_part:
            return {}
        steps = list(zip(self.filters, self.runners, strict=True))[self.streaming_end :]
        said, floats = judge_round_part(judged, steps, self.prepare)
        self._check_unread(sorted(floats))
        return said

    def _check_unread(self, floats: Iterable[str]) -> None:
        """Raises ConfigError for a filter that only scores while nothing reads the score."""
        if self._scores_read is None:
            return
        unread = unread_scores(self.filters, self._scores_read)
        for name in floats:
            index = next(i for i, one in enumerate(self.filters) if one.name == name)
            if name not in self._scores_read and not is_read(name, self.filters[index + 1 :]):
                unread.append(name)
        if unread:
            name = unread[0]
            one = next(one for one in self.filters if one.name == name)
            raise ConfigError(
                f"{one.use} gives every sample a score that nothing reads, so it drops nothing",
                where=one.key,
                hint=f"add threshold: {{by: {name}, min: ...}} after it, or name `{name}` in top_k, top_fraction or train.weight_by",
            )


class _State:
    """Where one sample of a shard stands."""

    __slots__ = ("flying", "kept", "position", "said", "sample")

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.said: list[FilterSays] = []
        self.kept = True
        self.position = 0
        self.flying = False


class Shard:
    """The samples of one shard on their way through the streaming filters. Not to be shared by threads at one time."""

    def __init__(self, chain: FilterChain, earlier: Sequence[Judged] = (), elsewhere: Elsewhere | None = None) -> None:
        self._chain = chain
        self._elsewhere: Elsewhere = {} if elsewhere is None else elsewhere
        self._earlier: dict[str, list[Judged]] = {}
        for one in earlier:
            self._earlier.setdefault(one.sample.prompt_id, []).append(one)
        self._states: dict[str, _State] = {}
        self._flying = 0
        self._landed: queue.SimpleQueue[tuple[_State, Future[Outcome]]] = queue.SimpleQueue()
        self._failed: list[tuple[_State, BaseException]] = []
        self._floats: set[str] = set()

    def submit(self, sample: Sample) -> None:
        """Take a sample as soon as it is generated; starts what can start. Never raises for what a filter does."""
        if sample.sample_id in self._elsewhere:
            return
        state = self._admit(sample)
        self._advance(state, streaming=True)
        self._land(block=False)

    def finish(self, samples: Sequence[Sample]) -> list[Judged]:
        """The verdicts on all samples of the shard, in the order of `samples`; those not submitted are judged now.

        Raises PluginError for the first sample, in this order, on which a filter failed, and ConfigError for a score
        that nothing reads.
        """
        order = {sample.sample_id: index for index, sample in enumerate(samples)}
        states = [self._states.get(sample.sample_id) or self._admit(sample) for sample in samples]
        end = self._chain.streaming_end
        while True:
            for state in states:
                self._advance(state, streaming=False)
            self._land(block=True)
            if self._failed:
                self._chain.runtime.cancel()
                raise min(self._failed, key=lambda pair: order.get(pair[0].sample.sample_id, len(order)))[1]
            waiting = [state for state in states if state.kept and state.position < end]
            if not waiting:
                break
            position = min(state.position for state in waiting)
            self._barrier(position, [state for state in waiting if state.position == position])
        self._chain._check_unread(sorted(self._floats))
        return [Judged(state.sample, tuple(state.said), state.kept) for state in states]

    def said(self, judged: Sequence[Judged]) -> list[list[dict[str, Any]]]:
        """What was said of `judged`, the result of `finish`, as another process's shard takes it from `elsewhere`."""
        bare = {name: {BARE: True} for name in self._floats}
        return [[one.to_row() | bare.get(one.filter, {}) for one in sample.says] for sample in judged]

    def _admit(self, sample: Sample) -> _State:
        prepared, rejection = self._chain.prepare(sample)
        rows = self._elsewhere.pop(sample.sample_id, None)
        if rows is not None:
            state = self._go_on(prepared, rows)
        else:
            state = _State(prepared)
        if rows is None and rejection is not None:
            state.said.append(rejection)
            state.kept = False
        self._states[sample.sample_id] = state
        return state

    def _go_on(self, sample: Sample, rows: Sequence[Mapping[str, Any]]) -> _State:
        """A sample of which another process has said `rows`, the verdicts of the first filters."""
        judged = Judged.from_rows(sample, rows, all(row["keep"] for row in rows))
        state = _State(judged.sample)
        state.said, state.kept, state.position = list(judged.says), judged.kept, len(rows)
        self._floats.update(row["filter"] for row in rows if row.get(BARE))
        return state

    def _advance(self, state: _State, *, streaming: bool) -> None:
        """Run per-sample filters until one is under way elsewhere, drops the sample, or needs the others of the shard."""
        filters, runners = self._chain.filters, self._chain.runners
        while state.kept and not state.flying and state.position < self._chain.streaming_end:
            runner = runners[state.position]
            if filters[state.position].kind != "sample" or runner.batched or (streaming and runner.waits_for_device):
                return
            try:
                result = runner.judge(state.sample)
            except Exception as error:
                self._failed.append((state, error))
                state.kept = False
                return
            if isinstance(result, Outcome):
                self._apply(state, result)
                continue
            self._flying += 1
            state.flying = True
            result.add_done_callback(partial(self._note, state))
            return

    def _note(self, state: _State, done: Future[Outcome]) -> None:
        """Called in whatever thread finished the work; everything else happens in the shard's own."""
        self._landed.put((state, done))

    def _land(self, *, block: bool) -> None:
        """Take results of other threads; with `block` until nothing is under way or one failed."""
        while self._flying and not (block and self._failed):
            try:
                state, done = self._landed.get(block=block)
            except queue.Empty:
                return
            self._flying -= 1
            state.flying = False
            error = PluginError("the call was given up") if done.cancelled() else done.exception()
            if error is not None:
                self._failed.append((state, error))
                state.kept = False
                continue
            self._apply(state, done.result())
            self._advance(state, streaming=not block)

    def _apply(self, state: _State, outcome: Outcome) -> None:
        one = self._chain.filters[state.position]
        verdict = outcome.verdict
        state.said.append(FilterSays(one.name, verdict.keep, verdict.score, verdict.reason, verdict.extra))
        if verdict.score is not None:
            state.sample = replace(state.sample, scores={**state.sample.scores, one.name: verdict.score})
            if outcome.bare_float:
                self._floats.add(one.name)
        state.kept = verdict.keep
        state.position += 1

    def _barrier(self, position: int, states: Sequence[_State]) -> None:
        """Run a filter that looks at several samples: each prompt's group, or a batch over the shard."""
        runner = self._chain.runners[position]
        if self._chain.filters[position].kind == "sample":
            for state, outcome in zip(states, runner.judge_batch([state.sample for state in states]), strict=True):
                self._apply(state, outcome)
            return
        groups: dict[str, list[_State]] = {}
        for state in states:
            groups.setdefault(state.sample.prompt_id, []).append(state)
        before = {prompt_id: self._earlier_at(prompt_id, position) for prompt_id in groups}
        started = [
            (members, before[prompt_id], runner.judge_many([*before[prompt_id], *(m.sample for m in members)]))
            for prompt_id, members in groups.items()
        ]
        for members, earlier, result in started:
            outcomes = result.result() if isinstance(result, Future) else result
            for state, outcome in zip(members, outcomes[len(earlier) :], strict=True):
                self._apply(state, outcome)

    def _earlier_at(self, prompt_id: str, position: int) -> list[Sample]:
        """The earlier waves' samples of a prompt that entered the filter at `position`."""
        name = self._chain.filters[position].name
        return [one.sample for one in self._earlier.get(prompt_id, ()) if any(says.filter == name for says in one.says)]
