"""How one optimizer step is taken, as plain values; both doors (YAML and `IterativeSFTTrainer`) are translated into this.

Guarantee: everything the core reads is here, so the two doors train alike when they say the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from iterative_sft_cli.errors import ConfigError

_OPEN_ENDED = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Curves that need no end."""


@dataclass(frozen=True)
class StepSettings:
    """Hyper-parameters of a pass.

    `warmup` is a number of steps when >= 1 and a fraction of the pass when < 1. `max_grad_norm` None or 0 switches clipping
    off. `on_nonfinite`: "skip" leaves weights and moments untouched and counts; "stop" raises `NonFiniteLoss`.
    `objective` is what `resolve_objective` takes. `micro_batch_tokens` None means a function of model and machine.
    `layout`: "auto" | "packed" | "padded" (results are equal up to rounding; packed computes no padding).
    """

    learning_rate: float = 2e-5
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0.0
    optimizer: str = "adamw"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    label_smoothing: float = 0.0
    neftune_noise_alpha: float | None = None
    objective: Any = "nll"
    on_nonfinite: str = "skip"
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    micro_batch_tokens: int | None = None
    layout: str = "auto"


_FROM_SECTION = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "optimizer",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing",
    "neftune_noise_alpha",
    "objective",
    "gradient_checkpointing",
)


def settings_from_section(section: Any) -> StepSettings:
    """The `train` section of the YAML (of one round) as `StepSettings`; a key the section lacks keeps its default.

    `on_nonfinite` stays "skip": what follows a step that was left out is the loop's decision.
    """
    values: dict[str, Any] = {}
    for name in _FROM_SECTION:
        value = getattr(section, name, None)
        if value is not None or (name == "max_grad_norm" and hasattr(section, name)):
            values[name] = value
    warmup = getattr(section, "warmup_steps", None) or getattr(section, "warmup_ratio", None)
    if warmup:
        values["warmup"] = float(warmup)
    arguments = getattr(section, "objective_args", None)
    if arguments:
        values["objective"] = {"use": values.get("objective", "nll"), "args": dict(arguments)}
    tokens = getattr(section, "micro_batch_tokens", None)
    values["micro_batch_tokens"] = None if tokens in (None, "auto") else int(tokens)
    if getattr(section, "packing", False):
        values["layout"] = "packed"
    return StepSettings(**values)


class Schedule:
    """Learning rate as a pure function of the step: Hugging Face's curves by name.

    Warm-up never fills the whole pass (at most `num_steps - 1` steps), so that every pass trains something.
    Raises ConfigError for a name transformers does not know or one that needs more than the step number.
    """

    def __init__(self, settings: StepSettings, num_steps: int) -> None:
        from transformers import get_scheduler

        name = str(getattr(settings.lr_scheduler_type, "value", settings.lr_scheduler_type))
        warmup = settings.warmup
        steps = math.ceil(num_steps * warmup) if warmup < 1 else int(warmup)
        steps = max(0, min(steps, num_steps - 1))
        self.peak = settings.learning_rate
        self.num_steps = num_steps
        probe = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
        try:
            scheduler = get_scheduler(
                name,
                probe,
                num_warmup_steps=steps,
                num_training_steps=num_steps,
                scheduler_specific_kwargs=dict(settings.lr_scheduler_kwargs),
            )
            self._factor = scheduler.lr_lambdas[0]
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"learning-rate schedule {name!r} cannot be used: {error}",
                where="train.lr_scheduler_type",
                expected="linear, cosine, constant, constant_with_warmup, polynomial, inverse_sqrt, cosine_with_min_lr …",
            ) from None

    def __call__(self, step: int) -> float:
        """Learning rate of the 0-based optimizer step."""
        return float(self.peak * self._factor(step))


def schedule_of_call(settings: StepSettings, *, num_steps: int, done: int, max_steps: int) -> Callable[[int], float]:
    """The learning rate of each of the `num_steps` steps of one call, `done` steps into the trainer's life.

    It spans `max_steps` where they are known (0: they are not), else the call; a curve without an end goes on from call to call.
    """
    if max_steps > 0:
        whole = Schedule(settings, max_steps)
        return lambda number: whole(done + number)
    if settings.lr_scheduler_type in _OPEN_ENDED and (settings.warmup >= 1 or settings.warmup == 0):
        endless = Schedule(settings, 1 << 40)
        return lambda number: endless(done + number)
    return Schedule(settings, max(1, num_steps))
