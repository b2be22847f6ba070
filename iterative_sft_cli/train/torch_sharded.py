"""Training with parameters, gradients and optimizer cut into one piece a rank: FSDP2 (`fully_shard`) under the same step.

Guarantee: a whole copy in the checkpoints' dtype is kept beside for generation and saving, and follows the pieces whenever it is
asked for; what is saved is whole, so that any number of ranks can go on from it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.train import torch_memory, torch_optim, torch_ranks, torch_rows, torch_state
from iterative_sft_cli.train.torch_core import StepResult, TrainCore
from iterative_sft_cli.train.torch_rows import MicroBatch
from iterative_sft_cli.train.torch_settings import StepSettings
from iterative_sft_cli.train.torch_weights import Weights
from iterative_sft_cli.types import TrainRow, derive_seed

Whole = tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]
"""A saved state read back: its record, the masters and the optimizer's tensors, by name."""


class PieceWeights(Weights):
    """The trainable parameters of a sharded model: the masters are this rank's pieces, which the parameters share memory with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, torch.float32)
        self.sharded: list[Any] = list(self.params)
        self.masters = [nn.Parameter(param.to_local()) for param in self.sharded]

    def publish(self) -> None:
        """Nothing to do: a piece is the parameter's memory."""

    def reread(self) -> None:
        """Nothing to do."""

    def take_gradients(self) -> list[Tensor | None]:
        """This rank's pieces of the sums."""
        return [None if grad is None else grad.to_local() for grad in super().take_gradients()]  # type: ignore[attr-defined]


class ShardedCore(TrainCore):
    """A `TrainCore` over the pieces of `whole`, which afterwards only follows them, in `whole_dtype` (None: as it is).

    All ranks make it, and call every method, together. Raises ConfigError for an optimizer whose state cannot be cut.
    """

    def __init__(
        self,
        whole: nn.Module,
        settings: StepSettings,
        *,
        compute_dtype: torch.dtype,
        device: torch.device,
        whole_dtype: torch.dtype | None,
    ) -> None:
        self.whole = whole
        model = shard_model(whole, compute_dtype, device)
        super().__init__(model, settings, compute_dtype=torch.float32, device=device)
        self.weights: PieceWeights = PieceWeights(model)
        self._named = dict(whole.named_parameters())
        if whole_dtype is not None:
            whole.to(whole_dtype)
        if device.type != "cpu":
            whole.to("cpu")  # the accelerator is for the pieces; generation makes a copy of its own
        self._plain_head, self._packs = False, False
        self.fresh_optimizer()

    def configure(self, settings: StepSettings) -> None:
        """Take new hyper-parameters."""
        if settings.optimizer != "adamw":
            raise ConfigError(
                f"{settings.optimizer} keeps state that cannot be cut into pieces",
                where="train.optimizer",
                expected="adamw with train.parallel: fsdp2",
            )
        super().configure(settings)

    # --- the whole copy -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def to_whole(self) -> None:
        """Bring the whole copy up to date with the pieces."""
        torch_ranks.meet()
        for name, param in zip(self.weights.names, self.weights.sharded, strict=True):
            self._named[name].copy_(param.full_tensor())

    @torch.no_grad()
    def from_whole(self) -> None:
        """Take rank 0's whole copy into the pieces."""
        wholes = [self._named[name].data for name in self.weights.names]
        torch_ranks.broadcast(wholes)
        for full, master in zip(wholes, self.weights.masters, strict=True):
            master.copy_(piece_of(full, master))

    # --- state ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def gather_state(self) -> Whole | None:
        """Masters and optimizer, whole, on rank 0's host memory; None on the others."""
        assert self.optimizer is not None
        torch_ranks.meet()
        weights = self.weights
        by_name = dict(zip(weights.names, weights.sharded, strict=True))
        tensors, scalars = torch_optim.state_tensors(self.optimizer, weights.names, weights.masters)
        first = torch_ranks.rank() == 0
        masters: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, param in by_name.items():
            full = param.full_tensor()
            if first:
                masters[name] = full.detach().cpu()
        for key, value in tensors.items():
            whole = value
            if value.dim():
                whole = like(value, by_name[key.split("/", 2)[2]]).full_tensor()
            if first:
                moments[key] = whole.detach().cpu()
        record = {"optimizer": type(self.optimizer).__name__, "scalars": scalars}
        return (record, masters, moments) if first else None

    def read_state(self, folder: Path) -> Whole:
        """What `write_state` wrote. Raises DataError for what does not fit the model."""
        record = torch_state.read_record(folder, type(self.optimizer).__name__)
        masters = torch_state.read_tensors(folder / torch_state.MASTERS)
        shapes = {n: p.shape for n, p in zip(self.weights.names, self.weights.sharded, strict=True)}
        odd = sorted(n for n in set(masters) | set(shapes) if n not in masters or shapes.get(n) != masters[n].shape)
        if odd:
            raise DataError(f"parameters differ from the model's: {', '.join(odd[:3])}", where=str(folder))
        return record, masters, torch_state.read_tensors(folder / torch_state.OPTIMIZER)

    @torch.no_grad()
    def take_state(self, kinds: Sequence[Any], scalars: dict[str, Any], state: Whole | None) -> None:
        """Take rank 0's `state` (None elsewhere) into the pieces; `kinds` lists its optimizer's tensors: name, type, shape."""
        assert self.optimizer is not None
        weights = self.weights
        torch_ranks.meet()
        by_name = dict(zip(weights.names, weights.masters, strict=True))
        for name, param, master in zip(weights.names, weights.sharded, weights.masters, strict=True):
            full = torch.empty(param.shape, dtype=master.dtype, device=master.device)
            if state is not None:
                full.copy_(state[1][name])
            dist.broadcast(full, 0)
            master.copy_(piece_of(full, master))
        tensors = {}
        for key, kind, shape in kinds:
            master = by_name[key.split("/", 2)[2]]
            device = master.device if shape else torch.device("cpu")
            full = torch.empty(shape, dtype=getattr(torch, kind), device=device)
            if state is not None:
                full.copy_(state[2][key])
            dist.broadcast(full, 0)
            tensors[key] = piece_of(full, master).clone() if shape else full
        torch_optim.load_state_tensors(self.optimizer, weights.names, weights.masters, tensors, scalars)

    # --- a step ---------------------------------------------------------------------------------------------------------

    def step(
        self, rows: Sequence[TrainRow], *, learning_rate: float | None, seed: int, micro_batch_tokens: int | None = None
    ) -> StepResult:
        """One optimizer step; every rank makes as many passes as the one with the most micro-batches."""
        self.doors = 1 << 30  # not known before the first
        self.check_rows(rows)
        with torch_memory.out_of_memory():
            batches = self.micro_batches(rows, micro_batch_tokens)
        mine = [
            sum(int(b.targets.numel()) for b in batches),
            sum(b.num_tokens for b in batches),
            len(rows),
            len(batches),
        ]
        every = torch_ranks.gather_ints(mine, self.device)
        trained, tokens, samples, number = (sum(values) for values in zip(*every, strict=True))
        if not trained:
            raise DataError("no trained token in the whole step")
        passes = max(counts[3] for counts in every)
        self.doors = 2 + passes
        idle = passes - len(batches)
        filler = torch_rows.build([TrainRow("-", (0, 0), (0, 0), 0.0)], [0], self.row_format()) if idle else None
        training = self.model.training
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        model: Any = self.model
        model.reshard()
        try:
            self.model.train()
            with ExitStack() as stack:
                stack.enter_context(torch_memory.out_of_memory())
                stack.enter_context(self._quiet(derive_seed(seed, "dropout", torch_ranks.rank())))
                stack.enter_context(torch.enable_grad())
                stack.enter_context(self.weights.gathering(in_fp32=False))
                for batch in [*batches, *([filler] * idle)]:
                    torch_ranks.meet()
                    loss += self._pass(batch, trained)
            grads = self.weights.take_gradients()
        finally:
            self.model.train(training)
        torch_ranks.meet()
        return self._finish(loss, grads, (tokens, trained, samples), learning_rate, number)

    def _pass(self, batch: MicroBatch | None, trained: int) -> Tensor:
        assert batch is not None
        part = self.loss_sum(batch)
        if not batch.weights.any():
            part = part * 0.0
        # the gradients of all ranks are averaged where the contract is their sum
        (part * (torch_ranks.size() / trained)).backward()  # type: ignore[no-untyped-call]
        self.heartbeat(batch.num_tokens)
        return part.detach().double()

    def _norm(self, grads: Sequence[Tensor | None]) -> float:
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for grad in grads:
            if grad is not None and grad.numel():
                squares += torch.linalg.vector_norm(grad, dtype=torch.float32).double() ** 2
        return math.sqrt(float(torch_ranks.sum_tensor(squares)))


def shard_model(whole: nn.Module, compute_dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A copy of `whole` in fp32, cut by layers over all ranks, that computes in `compute_dtype` and sums gradients in fp32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = copy.deepcopy(whole).float()
    mesh = init_device_mesh(device.type, (torch_ranks.size(),))
    low = compute_dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if low else None, reduce_dtype=torch.float32 if low else None
    )
    names = set(getattr(getattr(model, "base_model", model), "_no_split_modules", None) or ())
    names |= set(getattr(whole, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def piece_of(full: Tensor, master: Tensor) -> Tensor:
    """This rank's rows of a whole tensor, as `fully_shard` cuts it."""
    each = -(-full.shape[0] // torch_ranks.size())
    start = min(full.shape[0], each * torch_ranks.rank())
    piece = full[start : start + each]
    if piece.shape != master.shape:
        raise DataError(f"a piece of {tuple(piece.shape)}", expected=str(tuple(master.shape)))
    return piece


def like(piece: Tensor, param: Any) -> Any:
    """The sharded tensor of which `piece` is this rank's part, cut as `param` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        piece, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def write_state(folder: Path, state: Whole) -> None:
    """Write a gathered state as `torch_state.save_state` writes one that was whole."""
    record, masters, moments = state
    save_file({name: value.contiguous() for name, value in masters.items()}, folder / torch_state.MASTERS)
    save_file({name: value.contiguous() for name, value in moments.items()}, folder / torch_state.OPTIMIZER)
    text = json.dumps({"format": torch_state.FORMAT, **record}, sort_keys=True, allow_nan=False) + "\n"
    (folder / torch_state.TRAINER).write_text(text, encoding="utf-8")
