"""The loop's trainer over torch: `Learner` on the same core as `IterativeSFTTrainer`.

Guarantee: a step after `save` and `load_state` is, byte for byte, the step that would have followed without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.train import torch_native, torch_optim, torch_ranks, torch_sharded, torch_state
from iterative_sft_cli.train.torch_away import Away
from iterative_sft_cli.train.torch_core import TrainCore
from iterative_sft_cli.train.torch_rows import share
from iterative_sft_cli.train.torch_settings import Schedule, settings_from_section
from iterative_sft_cli.types import TrainRow, derive_seed

STATE = "state"


def _parallel_kind(section: Any) -> str:
    """auto, ddp or fsdp2. Raises ConfigError for what there is not."""
    parallel = getattr(section, "parallel", None)
    kind: str = parallel if isinstance(parallel, str) else getattr(parallel, "type", "auto")
    if kind not in ("auto", "ddp", "fsdp2"):
        raise ConfigError(f"{kind} is not supported yet", where="train.parallel", expected="auto, ddp or fsdp2")
    options = getattr(parallel, "options", None)
    if options:
        raise ConfigError(f"{kind} takes no options, got {', '.join(options)}", where="train.parallel.options")
    return kind


class TorchLearner:
    """The weights of a `LoadedModel` being trained. All ranks call every method with the same arguments."""

    def __init__(self, section: Any, *, loaded: Any, config: Any = None) -> None:
        self.loaded = loaded
        self.section = section
        self._cut = _parallel_kind(section) == "fsdp2"
        self.core = TrainCore(
            loaded.model,
            settings_from_section(section),
            compute_dtype=loaded.compute_dtype,
            device=torch.device(loaded.device),
        )
        device = torch.device(loaded.device)
        wanted = bool(getattr(config, "deterministic", False))
        self.deterministic = device.type == "cpu" or (wanted and torch.are_deterministic_algorithms_enabled())
        self._schedule = Schedule(self.core.settings, 1)
        self._seed = 0
        self.heartbeat: Callable[[int], None] = lambda _tokens: None
        self._optimizer_away: Away | None = None
        self._weights_away: Away | None = None
        self._state: torch_sharded.Whole | None = None

    @property
    def kernels(self) -> str | None:
        """What the C kernels that may take part are made from, None without any: bytes depend on it."""
        return torch_native.kernels() if self.core.device.type == "cpu" else None

    def load_weights(self, folder: Path | None, *, round_index: int = 0) -> None:
        """Take the weights in `folder`, or when None the base model's (an adapter: this round's fresh one); fresh optimizer."""
        from iterative_sft_cli import model

        if folder is None:
            model.reset_to_base(self.loaded, round_index)
        else:
            model.load_weights_into(self.loaded, folder)
        self.core.weights.reread()
        self.core.weights.drop_copies()
        self.core.fresh_optimizer()

    def load_state(self, folder: Path) -> None:
        """Take masters and optimizer from `folder/state`, exactly as they were saved."""
        if isinstance(self.core, torch_sharded.ShardedCore):
            self._state = self.core.read_state(folder / STATE)
        else:
            torch_state.load_state(self.core, folder / STATE)

    def begin(self, settings: Any, num_steps: int, *, seed: int, keep_optimizer: bool) -> None:
        """Start a pass of `num_steps` steps with the `train` section of this round."""
        self.section = settings
        self.core.configure(settings_from_section(settings))
        if not keep_optimizer:
            self.core.fresh_optimizer()
        self.core.weights.cast(frozen=True)
        self._schedule = Schedule(self.core.settings, max(1, num_steps))
        self._seed = seed

    def step(self, rows: Sequence[TrainRow], step_index: int, micro_batch_tokens: int | None) -> dict[str, Any]:
        """One optimizer step over `rows` (0-based `step_index` in the pass)."""
        return self.step_part(self.shares(rows, torch_ranks.size())[torch_ranks.rank()], step_index, micro_batch_tokens)

    def shares(self, rows: Sequence[TrainRow], size: int) -> list[list[TrainRow]]:
        """A step's rows by rank: each on one, like token counts on all."""
        return [share(rows, rank, size, self.core.is_encoder_decoder) for rank in range(size)]

    def step_part(self, rows: Sequence[TrainRow], step_index: int, micro_batch_tokens: int | None) -> dict[str, Any]:
        """This rank's part of a step, which may be empty; the result speaks of the whole step."""
        self.core.heartbeat = self.heartbeat
        result = self.core.step(
            rows,
            learning_rate=self._schedule(step_index),
            seed=derive_seed(self._seed, "step", step_index),
            micro_batch_tokens=micro_batch_tokens,
        )
        return result.to_dict()

    def describe_state(self) -> dict[str, Any]:
        """The optimizer's state as `spread` takes it on the other ranks: names, types and shapes; and its scalars."""
        optimizer, weights = self.core.optimizer, self.core.weights
        assert optimizer is not None
        tensors, scalars = torch_optim.state_tensors(optimizer, weights.names, weights.masters)
        if self._state is not None:
            tensors, scalars = self._state[2], self._state[0].get("scalars", {})
        kinds = [[name, str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in tensors.items()]
        return {"tensors": kinds, "scalars": scalars}

    @torch.no_grad()
    def spread(self, state: dict[str, Any] | None) -> None:
        """Take rank 0's trained parameters, with its optimizer's state where `state` describes one, else with a fresh one."""
        if self._cut:
            self._spread_pieces(state)
            return
        weights = self.core.weights
        torch_ranks.broadcast([master.data for master in weights.masters])
        weights.publish()
        weights.drop_copies()
        if state is None:
            if torch_ranks.rank():
                self.core.fresh_optimizer()
            return
        optimizer = self.core.optimizer
        assert optimizer is not None
        if torch_ranks.rank():
            by_name = dict(zip(weights.names, weights.masters, strict=True))
            tensors = {}
            for full, kind, shape in state["tensors"]:
                _, key, name = full.split("/", 2)
                on_host = not shape and key == "step"
                device = torch.device("cpu") if on_host else by_name[name].device
                tensors[full] = torch.empty(shape, dtype=getattr(torch, kind), device=device)
        else:
            tensors, _ = torch_optim.state_tensors(optimizer, weights.names, weights.masters)
        torch_ranks.broadcast([tensors[full] for full, _, _ in state["tensors"]])
        if torch_ranks.rank():
            torch_optim.load_state_tensors(optimizer, weights.names, weights.masters, tensors, state["scalars"])

    def _spread_pieces(self, state: dict[str, Any] | None) -> None:
        """The same when every rank holds a piece; the first call cuts the model."""
        if not isinstance(self.core, torch_sharded.ShardedCore):
            loaded = self.loaded
            self.core = torch_sharded.ShardedCore(
                loaded.model,
                self.core.settings,
                compute_dtype=loaded.compute_dtype,
                device=self.core.device,
                # what generation computes in and what is saved, where that is one type
                whole_dtype=loaded.base_dtype
                if loaded.base_dtype == loaded.compute_dtype and not loaded.has_adapter
                else None,
            )
        if state is None:
            self.core.from_whole()
            self.core.fresh_optimizer()
            return
        self.core.take_state(state["tensors"], state["scalars"], self._state)
        self._state = None

    @property
    def doors(self) -> int:
        """How often a step meets the other ranks: over its counts and its gradients, and before each pass of a cut model."""
        return int(getattr(self.core, "doors", 2))

    @property
    def gathers(self) -> bool:
        """Whether `gather` comes before `save`."""
        return isinstance(self.core, torch_sharded.ShardedCore)

    def gather(self, *, state: bool) -> None:
        """Put together on rank 0 what lies on all ranks."""
        assert isinstance(self.core, torch_sharded.ShardedCore)
        self.core.to_whole()
        self._state = self.core.gather_state() if state else None

    def loss(self, rows: Sequence[TrainRow]) -> float:
        """Mean nll a trained token of `rows` under the live weights, in nats; nothing changes."""
        from iterative_sft_cli.train.torch_evaluate import evaluate

        return evaluate(self.core, rows, batch_size=8)["loss"]

    def save_bytes(self, *, state: bool) -> int:
        """About how many bytes `save` writes: the model (or adapter) in its checkpoints' type, and masters with two moments."""
        trained = sum(master.numel() for master in self.core.weights.masters)
        adapter = getattr(getattr(self.loaded, "source", None), "adapter", None)
        saved = trained if adapter is not None else sum(one.numel() for one in self.loaded.model.parameters())
        return saved * int(self.loaded.base_dtype.itemsize) + (3 * 4 * trained if state else 0)

    def save(self, folder: Path, *, state: bool) -> None:
        """Write a Hugging Face folder (or an adapter) and, with `state`, `folder/state`; rank 0 writes."""
        from iterative_sft_cli import model

        if torch_ranks.rank() != 0:
            return
        model.save_pretrained(self.loaded, folder)
        if state:
            (folder / STATE).mkdir()
            if self._state is not None:
                torch_sharded.write_state(folder / STATE, self._state)
                self._state = None
            else:
                torch_state.save_state(self.core, folder / STATE, {})

    def offload(self) -> None:
        """Free the compute copies, and move the optimizer's state to where `train.offload` says."""
        if self._weights_away is not None:
            return
        self.core.free_scratch()
        if isinstance(self.core, torch_sharded.ShardedCore):
            self.core.to_whole()
        optimizer, weights = self.core.optimizer, self.core.weights
        assert optimizer is not None
        if self._optimizer_away is None:
            self._optimizer_away = self._send(
                torch_optim.state_tensors(optimizer, weights.names, weights.masters)[0].values()
            )

    def offload_weights(self) -> None:
        """Move the weights there too, for an engine that has weights of its own; until `reload` nothing else may be asked."""
        self.offload()
        if self._weights_away is not None:
            return
        tensors: list[torch.Tensor] = list(self.core.weights.masters)
        for module in {id(one): one for one in (self.loaded.model, self.core.model)}.values():
            held = (*module.parameters(), *module.buffers())
            tensors += [one for one in held if type(one.data) is torch.Tensor]  # pieces are among the masters
        self._weights_away = self._send(tensors)

    def reload(self) -> None:
        """Undo both."""
        for away in (self._weights_away, self._optimizer_away):
            if away is not None:
                away.back()
        self._weights_away = self._optimizer_away = None

    def _send(self, tensors: Iterable[torch.Tensor]) -> Away | None:
        """Empty `tensors` where `train.offload` says so: by default what is on a GPU waits on the host."""
        mode, device = getattr(self.section, "offload", "auto") or "auto", self.core.device.type
        if mode == "disk":
            return Away(tensors, disk=True)
        if mode == "none" or device not in ("cuda", "xpu"):
            return None
        return Away([one for one in tensors if one.device.type == device], disk=False)
