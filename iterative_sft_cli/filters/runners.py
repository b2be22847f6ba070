"""How a filter is run: in this process, in threads, or in workers; and what outlives a chain (workers, loaded models)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from iterative_sft_cli.errors import IsftError, PluginError
from iterative_sft_cli.filters.context import Context
from iterative_sft_cli.filters.contract import ContractBreach, Outcome, make_callable, to_outcome, to_outcomes
from iterative_sft_cli.filters.resolve import ResolvedFilter
from iterative_sft_cli.types import Sample, Verdict


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


class DirectRunner:
    """Calls the filter in this process. What it raises becomes a PluginError with the filter, the prompt and the cause."""

    def __init__(
        self,
        one: ResolvedFilter,
        call: Callable[..., Any],
        make_context: Callable[[str], Context | None],
        batch: Any = None,
    ) -> None:
        self._one = one
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
            value = self._call(sample, context)
            if self._one.builtin and type(value) is Verdict:
                return Outcome(value)
            return to_outcome(value)
        except Exception as error:
            raise blame(self._one, error, prompt_id=sample.prompt_id, sample_id=sample.sample_id) from error

    def judge_batch(self, samples: Sequence[Sample]) -> list[Outcome]:
        """All samples at once."""
        try:
            return to_outcomes(self._batch(list(samples)), len(samples))
        except Exception as error:
            raise blame(self._one, error, prompt_id=samples[0].prompt_id) from error

    def judge_many(self, samples: Sequence[Sample]) -> list[Outcome]:
        """A group, or the round."""
        subject = samples[0].prompt_id if self._one.kind == "group" else "round"
        context = self._make_context(subject) if self._takes_context else None
        try:
            return to_outcomes(self._call(samples, context), len(samples))
        except Exception as error:
            prompt_id = samples[0].prompt_id if self._one.kind == "group" else None
            raise blame(self._one, error, prompt_id=prompt_id) from error


def blame(
    one: ResolvedFilter, error: BaseException, *, prompt_id: str | None = None, sample_id: str | None = None
) -> IsftError:
    """The named error for what a filter raised; an error that is already explained only gets the place."""
    subject = f"prompt {prompt_id}" if prompt_id is not None else "the round"
    if sample_id is not None:
        subject += f" (sample {sample_id})"
    if isinstance(error, IsftError):
        return type(error)(
            error.what, where=error.where or f"{one.key}: {one.use}", expected=error.expected, hint=error.hint
        )
    cause = str(error) if isinstance(error, ContractBreach) else f"it raised {type(error).__name__}: {error}"
    return PluginError(
        f"the filter `{one.name}` failed on {subject}: {cause}",
        where=f"{one.key}: {one.use}",
        hint="`isft filters test` runs one filter over stored samples" if not one.builtin else None,
    )


class Runtime:
    """Workers and loaded models by filter; they serve every chain of a run. Close it at the end."""

    def __init__(self) -> None:
        self._instances: dict[str, Any] = {}

    def runner(
        self,
        one: ResolvedFilter,
        *,
        seed: int,
        round_index: int,
        cache_dir: Path | None,
        accepted_earlier: Iterable[Mapping[str, Any]],
    ) -> Runner:
        """The runner of a filter for one round."""

        def make_context(subject: str) -> Context:
            return Context(
                round_index=round_index,
                seed=seed,
                filter_name=one.name,
                subject=subject,
                cache_dir=cache_dir,
                accepted_earlier=accepted_earlier,
            )

        assert one.target is not None
        return DirectRunner(one, make_callable(one.target, one.shape, one.arguments), make_context)

    def release_device(self) -> None:
        """Move models off the accelerator and end the workers that hold one."""

    def close(self) -> None:
        """End all workers."""
