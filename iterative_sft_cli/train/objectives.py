"""What is minimised: functions from per-token log-probabilities to per-token losses.

Guarantee: the step's loss is the sum of what an objective returns, divided by the number of trained tokens in the step over
all ranks; weights are never normalised. Each built-in is checked against its closed form in tests/train/test_objectives.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.plugin_import import find_plugin


@dataclass(frozen=True)
class TokenBatch:
    """The trained tokens of whole rows, one entry a token in row order.

    `logprobs` (N,) fp32, differentiable: log-probability of each label. `nll` (N,): the loss of each token, label smoothing
    included. `row` (N,): index of the token's row. `weights` (R,): the rows' weights. `ref_logprobs` (N,) or None.
    For an objective that asks for them (`needs_logits = True`): `logits` (N, V), differentiable, from which each label is
    predicted; `sequences`, the (T,) input ids of each row; `index` (N,), the place in its row at which the label is predicted.
    With these a teacher can be asked about the same tokens: its logits are `teacher(sequences[r])[index[row == r]]`.
    """

    logprobs: Tensor
    nll: Tensor
    row: Tensor
    weights: Tensor
    ref_logprobs: Tensor | None = None
    logits: Tensor | None = None
    sequences: tuple[Tensor, ...] = ()
    index: Tensor | None = None

    @property
    def token_weights(self) -> Tensor:
        """The weight of each token's row, (N,)."""
        return self.weights[self.row]

    def row_mean(self, values: Tensor) -> Tensor:
        """Mean of per-token `values` over each row, (R,)."""
        total = torch.zeros_like(self.weights).index_add(0, self.row, values)
        count = torch.zeros_like(self.weights).index_add(0, self.row, torch.ones_like(values))
        return total / count.clamp_min(1)


Objective = Callable[[TokenBatch], Tensor]
"""Takes a `TokenBatch`, returns the (N,) losses, weights applied. An attribute `needs_ref_logprobs = True` asks for
`TrainRow.ref_logprobs`, `needs_logits = True` for the full distribution of each token."""


def nll(batch: TokenBatch) -> Tensor:
    """Negative log-likelihood times the row's weight."""
    return batch.token_weights * batch.nll


def dft(batch: TokenBatch) -> Tensor:
    """Dynamic fine-tuning (arXiv 2508.05629): each token's loss times its own probability, held constant."""
    return batch.token_weights * batch.logprobs.detach().exp() * batch.nll


def iw(batch: TokenBatch, *, tau: float = 1.0, max_weight: float = 16.0) -> Tensor:
    """Importance-weighted SFT (arXiv 2507.12856): the row's loss times clip(exp(tau * mean_t(log p - log p_ref)), 0, max_weight)."""
    if batch.ref_logprobs is None:
        raise ValueError("objective iw needs ref_logprobs")
    ratio = batch.row_mean(batch.logprobs.detach() - batch.ref_logprobs)
    importance = (tau * ratio).exp().clamp(0.0, max_weight)
    return batch.token_weights * importance[batch.row] * batch.nll


iw.needs_ref_logprobs = True  # type: ignore[attr-defined]


def rwr(batch: TokenBatch, *, temperature: float = 1.0, max_weight: float | None = None) -> Tensor:
    """Reward-weighted regression: the row's weight is its reward r, and its loss is multiplied by exp(r / temperature)."""
    factor = (batch.weights / temperature).exp()
    if max_weight is not None:
        factor = factor.clamp_max(max_weight)
    return factor[batch.row] * batch.nll


BUILTIN: dict[str, Objective] = {"nll": nll, "dft": dft, "iw": iw, "rwr": rwr}


def needs_ref_logprobs(objective: Objective) -> bool:
    """Whether rows must carry `ref_logprobs`."""
    inner = objective.func if isinstance(objective, functools.partial) else objective
    return bool(getattr(inner, "needs_ref_logprobs", False))


def needs_logits(objective: Objective) -> bool:
    """Whether the objective reads the whole distribution of each token."""
    inner = objective.func if isinstance(objective, functools.partial) else objective
    return bool(getattr(inner, "needs_logits", False))


def resolve_objective(spec: Any, base_dir: Path | None = None) -> Objective:
    """An objective from a name, `{use, args}` mapping or callable.

    Raises ConfigError for unknown names and wrong arguments, PluginError when its import raises.
    """
    arguments: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        arguments = dict(spec.get("args") or {})
        spec = spec.get("use")
    found = spec
    if isinstance(spec, str):
        found = BUILTIN.get(spec) or find_plugin(
            spec,
            kind="objective",
            base_dir=base_dir or Path(),
            where="train.objective",
            group="isft.objectives",
            built_in=tuple(BUILTIN),
        )
    if inspect.isclass(found):
        try:
            found, arguments = found(**arguments), {}
        except TypeError as error:
            raise ConfigError(f"objective {spec}: {error}", where="train.objective") from None
    if not callable(found):
        raise ConfigError(f"objective {spec!r} is not callable", where="train.objective")
    try:
        inspect.signature(found).bind(None, **arguments)
    except TypeError as error:
        raise ConfigError(f"objective {spec}: {error}", where="train.objective.args") from None
    return functools.partial(found, **arguments) if arguments else found
