"""What steps add up to, in a call of `step()` and between two log rows, and when logging, evaluation and saving are due.

Guarantee: every step is in exactly one log row, token-weighted; fractions of `max_steps` are resolved once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerState

from iterative_sft_cli.train.torch_core import StepResult


class LogWindow:
    """Sums over the steps since the last log row. The trainer sets `ends_call` before the callbacks of a step run."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.ends_call = False
        self._loss = 0.0
        self._trained = 0
        self._steps = 0
        self._skipped = 0
        self._last: StepResult | None = None

    @property
    def open(self) -> bool:
        """Whether a step has been taken since the last row, and logging is wanted at all."""
        return self._steps > 0 and self._strategy("logging") != "no"

    def _strategy(self, kind: str) -> str:
        value = getattr(self.args, f"{kind}_strategy")
        return str(getattr(value, "value", value))

    def steps_of(self, kind: str) -> int:
        """Steps between two of `kind` (logging, eval, save); 0 when they do not go by steps."""
        steps = getattr(self.args, f"{kind}_steps")
        if self._strategy(kind) != "steps" or not steps:
            return 0
        return math.ceil(steps * self.args.max_steps) if steps < 1 else int(steps)

    def due(self, kind: str, state: TrainerState) -> bool:
        """Whether `kind` is due after the step just taken; `ends_call` says that it was the last of a `step()` call."""
        if kind == "logging" and state.global_step == 1 and self.args.logging_first_step:
            return True
        if kind == "eval" and self.args.eval_delay > (
            state.global_step if self._strategy(kind) == "steps" else state.epoch or 0
        ):
            return False
        if self._strategy(kind) == "epoch":
            return self.ends_call
        every = self.steps_of(kind)
        return every > 0 and state.global_step % every == 0

    def add(self, result: StepResult, state: TrainerState) -> None:
        """Take a step in."""
        self._steps += 1
        self._skipped += result.skipped_nonfinite
        self._last = result
        if not (result.skipped_nonfinite and self.args.logging_nan_inf_filter):
            self._loss += result.loss * result.num_trained_tokens
            self._trained += result.num_trained_tokens
        if self.args.include_num_input_tokens_seen not in ("no", False):
            state.num_input_tokens_seen += result.num_tokens

    def take(self, state: TrainerState) -> dict[str, Any]:
        """The row, and a fresh window."""
        assert self._last is not None
        row: dict[str, Any] = {
            "loss": self._loss / self._trained if self._trained else None,
            "grad_norm": self._last.to_dict()["grad_norm"],
            "learning_rate": self._last.learning_rate,
            "num_steps": self._steps,
            "num_trained_tokens": self._trained,
            "skipped_nonfinite": self._skipped,
        }
        if self.args.include_num_input_tokens_seen not in ("no", False):
            row["num_input_tokens_seen"] = state.num_input_tokens_seen
        self._loss, self._trained, self._steps, self._skipped = 0.0, 0, 0, 0
        return row

    def to_json(self) -> list[Any]:
        """For the trainer's state."""
        last = None if self._last is None else list(vars_of(self._last))
        return [self._loss, self._trained, self._steps, self._skipped, last]

    def from_json(self, values: list[Any]) -> None:
        """Undo `to_json`."""
        self._loss, self._trained, self._steps, self._skipped, last = values
        self._last = None if last is None else StepResult(*last)


def statistics(results: Sequence[StepResult], seconds: float) -> dict[str, Any]:
    """What `IterativeSFTTrainer.step()` returns for the steps of one call."""
    taken = [result for result in results if not result.skipped_nonfinite]
    trained = sum(result.num_trained_tokens for result in taken)
    tokens = sum(result.num_tokens for result in results)
    last = results[-1].to_dict() if results else {}
    return {
        "loss": sum(r.loss * r.num_trained_tokens for r in taken) / trained if trained else None,
        "num_tokens": tokens,
        "num_trained_tokens": sum(result.num_trained_tokens for result in results),
        "num_samples": sum(result.num_samples for result in results),
        "num_steps": len(results),
        "learning_rate": last.get("learning_rate"),
        "grad_norm": last.get("grad_norm"),
        "tokens_per_second": tokens / seconds if results else 0.0,
        "skipped_nonfinite": sum(result.skipped_nonfinite for result in results),
    }


def vars_of(result: StepResult) -> list[Any]:
    """The fields of a result in order, numbers that are not finite as 0."""
    values = [getattr(result, name) for name in result.__dataclass_fields__]
    return [0.0 if isinstance(value, float) and not math.isfinite(value) else value for value in values]
