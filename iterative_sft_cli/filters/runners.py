"""How a filter is run: in this process, in threads, or in worker processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from iterative_sft_cli.config.secrets import hide
from iterative_sft_cli.errors import DataError, IsftError, PluginError
from iterative_sft_cli.filters.batches import BatchSizes, InMemory, judge_in_batches
from iterative_sft_cli.filters.cache import ResultCache
from iterative_sft_cli.filters.context import Context
from iterative_sft_cli.filters.contract import ContractBreach, Outcome, to_outcome, to_outcomes
from iterative_sft_cli.filters.pool import WorkerPool, outcome_from_row
from iterative_sft_cli.filters.resolved import ResolvedFilter
from iterative_sft_cli.filters.wire import encode, frame_around, sample_to_wire, to_json
from iterative_sft_cli.filters.worker import outcome_to_row
from iterative_sft_cli.plugin_import import explain
from iterative_sft_cli.types import Sample, Verdict

History = Iterable[Mapping[str, Any]]


class Runner(Protocol):
    """One filter of one round, ready to judge. Methods may be called from several threads."""

    batched: bool
    waits_for_device: bool

    def judge(self, sample: Sample) -> Outcome | Future[Outcome]:
        """A per-sample filter's outcome, now or later."""

    def judge_batch(self, samples: Sequence[Sample]) -> list[Outcome]:
        """A batched per-sample filter's outcomes, in order."""

    def judge_many(self, samples: Sequence[Sample]) -> list[Outcome] | Future[list[Outcome]]:
        """A `group` or `samples` filter's outcomes, in order."""

    def close(self) -> None:
        """Remove what was written for this round alone."""


class DirectRunner:
    """Calls the filter in this process. What it raises becomes a PluginError with the filter, the prompt and the cause."""

    def __init__(
        self,
        one: ResolvedFilter,
        call: Callable[..., Any],
        make_context: Callable[[str], Context],
        batch: Any,
        sizes: BatchSizes | None = None,
    ) -> None:
        self._one = one
        self._sizes = sizes or InMemory()
        self._call = call
        self._make_context = make_context
        self._batch = batch
        self._takes_context = one.shape.takes_context
        self.batched = batch is not None
        self.waits_for_device = one.needs_device

    def judge(self, sample: Sample) -> Outcome:
        """One sample, now."""
        context = self._make_context(sample.sample_id) if self._takes_context else None
        try:
            if self._one.builtin:
                value = self._call(sample, context)
                return Outcome(value) if type(value) is Verdict else to_outcome(value)
            return to_outcome(self._call(own_copy(sample), context))
        except Exception as error:
            raise blame(self._one, error, prompt_id=sample.prompt_id, sample_id=sample.sample_id) from error

    def close(self) -> None:
        """Nothing was written."""

    def judge_batch(self, samples: Sequence[Sample]) -> list[Outcome]:
        """All samples at once."""
        try:
            return to_outcomes(judge_in_batches(self._one, self._batch, samples, self._sizes), len(samples))
        except Exception as error:
            raise blame(self._one, error, prompt_id=samples[0].prompt_id) from error

    def judge_many(self, samples: Sequence[Sample]) -> list[Outcome]:
        """A group, or the round."""
        is_group = self._one.kind == "group"
        context = self._make_context(samples[0].prompt_id if is_group else "round") if self._takes_context else None
        count = len(samples)
        shown = samples if self._one.builtin or not is_group else [own_copy(sample) for sample in samples]
        try:
            return to_outcomes(self._call(shown, context), count)
        except Exception as error:
            raise blame(self._one, error, prompt_id=samples[0].prompt_id if is_group else None) from error


def own_copy(sample: Sample) -> Sample:
    """A copy whose mappings a plug-in may change without changing the run."""
    return replace(
        sample,
        row=copy.deepcopy(dict(sample.row)),
        prompt=copy.deepcopy(sample.prompt),
        answer=copy.deepcopy(sample.answer),
        scores=dict(sample.scores),
    )


class ThreadRunner:
    """Calls a built-in that waits for something else (a server, an interpreter process) in several threads."""

    batched = False

    def __init__(
        self, one: ResolvedFilter, call: Callable[..., Any], threads: ThreadPoolExecutor, cache: ResultCache | None
    ) -> None:
        self._one = one
        self._call = call
        self._threads = threads
        self._cache = cache
        self.waits_for_device = one.needs_device

    def judge(self, sample: Sample) -> Outcome | Future[Outcome]:
        """From the cache at once, else later."""
        key = b""
        if self._cache is not None:
            key = ResultCache.key(to_json(sample_to_wire(sample)))
            if (rows := self._cache.get(key)) is not None:
                return outcome_from_row(rows[0])
        return self._threads.submit(self._judge, sample, key)

    def _judge(self, sample: Sample, key: bytes) -> Outcome:
        for attempt in (1, 2):
            try:
                outcome = to_outcome(self._call(sample, None))
                break
            except Exception as error:
                # a server that is not there is no sample's fault
                if (
                    isinstance(error, DataError)
                    or self._one.on_error == "fail"
                    or self._one.on_error == "retry"
                    and attempt == 2
                ):
                    raise blame(self._one, error, prompt_id=sample.prompt_id, sample_id=sample.sample_id) from error
                if self._one.on_error == "drop":
                    return Outcome(
                        Verdict(False, None, "plugin_error", {"error": hide(explain(error), self._one.env)[:300]})
                    )
        if self._cache is not None:
            self._cache.put(key, [outcome_to_row(outcome)])
        return outcome

    def close(self) -> None:
        """Nothing was written."""

    def judge_batch(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Not used: threads take samples one by one."""
        raise NotImplementedError

    def judge_many(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Not used: such built-ins look at one sample."""
        raise NotImplementedError


class WorkerRunner:
    """Sends samples to the worker processes of a filter; what a cache holds is not asked again."""

    batched = False

    def __init__(
        self,
        one: ResolvedFilter,
        pool: WorkerPool,
        head: Mapping[str, Any],
        cache: ResultCache | None,
        store_round: Callable[[Sequence[Sample]], Path],
        history: Path | None = None,
    ) -> None:
        self._one = one
        self._history = history
        self._pool = pool
        self._head = dict(head)
        self._cache = cache
        self._store_round = store_round
        self.waits_for_device = one.needs_device

    def judge(self, sample: Sample) -> Outcome | Future[Outcome]:
        """One sample: at once from the cache, else later."""
        raw = to_json(sample_to_wire(sample))
        subject = f"prompt {sample.prompt_id} (sample {sample.sample_id})"
        found = self._ask(raw, "sample", sample.sample_id, subject, 1)
        if isinstance(found, list):
            return found[0]
        first: Future[Outcome] = Future()
        first.set_running_or_notify_cancel()
        found.add_done_callback(lambda done: _hand_over(done, first))
        return first

    def close(self) -> None:
        """Remove the earlier rounds' file: over many rounds they would fill the temporary folder."""
        if self._history is not None:
            self._history.unlink(missing_ok=True)

    def judge_batch(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Not used: workers take samples one by one."""
        raise NotImplementedError

    def judge_many(self, samples: Sequence[Sample]) -> list[Outcome] | Future[list[Outcome]]:
        """A group as one call, or the round through a file that the worker reads lazily."""
        if self._one.kind == "samples":
            path = self._store_round(samples)
            frame = encode({"id": 0, "path": str(path), "subject": "round", **self._head})
            result = self._pool.submit(frame, "the round", len(samples))
            result.add_done_callback(lambda done: path.unlink(missing_ok=True))
            return result
        raw = to_json([sample_to_wire(sample) for sample in samples])
        prompt_id = samples[0].prompt_id
        return self._ask(raw, "samples", prompt_id, f"prompt {prompt_id}", len(samples))

    def _ask(
        self, raw: bytes, field: str, subject: str, named: str, count: int
    ) -> list[Outcome] | Future[list[Outcome]]:
        key = ResultCache.key(raw) if self._cache is not None else b""
        if self._cache is not None and (rows := self._cache.get(key)) is not None:
            return [outcome_from_row(row) for row in rows]
        frame = frame_around({"id": 0, "subject": subject, **self._head}, field, raw)
        result = self._pool.submit(frame, named, count)
        if self._cache is not None:
            result.add_done_callback(lambda done: self._remember(key, done))
        return result

    def _remember(self, key: bytes, done: Future[list[Outcome]]) -> None:
        assert self._cache is not None
        if done.cancelled() or done.exception() is not None:
            return
        outcomes = done.result()
        if not any(one.verdict.reason in ("timeout", "plugin_error") for one in outcomes):
            self._cache.put(key, [outcome_to_row(one) for one in outcomes])


def _hand_over(done: Future[list[Outcome]], first: Future[Outcome]) -> None:
    if done.cancelled():
        first.set_exception(PluginError("the call was cancelled because the run is ending"))
    elif (error := done.exception()) is not None:
        first.set_exception(error)
    else:
        first.set_result(done.result()[0])


def blame(
    one: ResolvedFilter, error: BaseException, *, prompt_id: str | None = None, sample_id: str | None = None
) -> IsftError:
    """The named error for what a filter raised; an error that is already explained only gets the place."""
    subject = f"prompt {prompt_id}" if prompt_id is not None else "the round"
    if sample_id is not None:
        subject += f" (sample {sample_id})"
    where = f"{one.key}: {one.use}"
    if isinstance(error, IsftError):
        return type(error)(error.what, where=error.where or where, expected=error.expected, hint=error.hint)
    cause = hide(str(error) if isinstance(error, ContractBreach) else f"it raised {explain(error)}", one.env)
    hint = "`isft filters test` runs it over stored samples" if not one.builtin else None
    return PluginError(f"the filter `{one.name}` failed on {subject}: {cause}", where=where, hint=hint)
