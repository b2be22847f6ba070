"""What the loop needs of a trainer; the torch implementation and the toy models of the tests satisfy it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from iterative_sft_cli.types import TrainRow


class TrainOutOfMemory(Exception):
    """Raised by `Learner.step` when memory runs out; parameters and optimizer are untouched."""


@runtime_checkable
class Learner(Protocol):
    """The weights being trained, with their optimizer.

    `heartbeat` is set by the loop; `step` calls it after each micro-batch with the number of tokens in it. It drives the
    progress bar and the watchdog, and raises when the run is to stop: the exception passes through with parameters and optimizer untouched.
    """

    deterministic: bool
    heartbeat: Callable[[int], None]

    def load_weights(self, folder: Path | None, *, round_index: int = 0) -> None:
        """Take the weights in a checkpoint folder (base dtype, upcast to the training dtype), or the base model's when None; the optimizer is made fresh.

        An adapter that starts from the base model is a fresh one, a function of the run's seed and `round_index`."""

    def load_state(self, folder: Path) -> None:
        """Take full-precision weights and optimizer from `folder/state`, exactly as they were saved."""

    def begin(self, settings: Any, num_steps: int, *, seed: int, keep_optimizer: bool) -> None:
        """Start a pass of `num_steps` optimizer steps with `settings` (a `TrainConfig` of this round): learning-rate schedule from step 0.

        With `keep_optimizer` the moments carry over, otherwise they are dropped."""

    def step(self, rows: Sequence[TrainRow], step_index: int, micro_batch_tokens: int | None) -> dict[str, Any]:
        """One optimizer step over `rows` (0-based `step_index` in the pass). Returns loss, num_tokens, num_trained_tokens, num_samples,
        learning_rate, grad_norm, skipped_nonfinite. Raises TrainOutOfMemory with everything untouched."""

    def save(self, folder: Path, *, state: bool) -> None:
        """Write a Hugging Face folder (weights in the base model's dtype, config, tokenizer) into the existing empty `folder`; with `state`
        also `folder/state/*.safetensors` and `folder/state/trainer.json`. No fsync: the run directory does that."""

    def offload(self) -> None:
        """Free what generation does not need (optimizer, gradients)."""

    def reload(self) -> None:
        """Undo `offload`."""

    # A learner may have `offload_weights()` too: called after `offload`, before an engine with weights of its own takes the device. It
    # moves the weights away, and `reload` brings them back.
