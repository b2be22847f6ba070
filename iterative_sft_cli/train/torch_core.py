"""One optimizer step, as `IterativeSFTTrainer.step()` and the loop both take it.

Guarantee: loss and gradients do not depend on batching, padding, layout or number of ranks (beyond rounding); a step that
raises or meets a number that is not finite leaves weights and optimizer as they were.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.train import (
    torch_attention,
    torch_blocks,
    torch_head,
    torch_memory,
    torch_native,
    torch_noise,
    torch_norms,
    torch_optim,
    torch_ranks,
    torch_rows,
)
from iterative_sft_cli.train.objectives import TokenBatch, needs_logits, needs_ref_logprobs, resolve_objective
from iterative_sft_cli.train.torch_adamw import AdamW
from iterative_sft_cli.train.torch_rows import MicroBatch, RowFormat
from iterative_sft_cli.train.torch_settings import StepSettings
from iterative_sft_cli.train.torch_weights import Weights
from iterative_sft_cli.types import TrainRow, derive_seed


class NonFiniteLoss(DataError):
    """Loss or gradient is not finite and the policy is to stop."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks. `loss` is NaN when a skipped step's loss was."""

    loss: float
    num_tokens: int
    num_trained_tokens: int
    num_samples: int
    learning_rate: float
    grad_norm: float
    skipped_nonfinite: int
    num_micro_batches: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: numbers that are not finite become None."""
        row = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def bare_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper."""
    inner: Any = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


class TrainCore:
    """A model with its optimizer. `settings` may be replaced between passes by `configure`."""

    def __init__(
        self,
        model: nn.Module,
        settings: StepSettings,
        *,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model = model
        self.bare = bare_model(model)
        self.config: Any = self.bare.config
        self.device = device or next(model.parameters()).device
        self._blocks = torch_blocks.Blocks(model)
        together = self._blocks.together
        self.weights = Weights(model, compute_dtype, own_masters=optimizer is None, together=together)
        if not self.weights.params:
            raise ConfigError("the model has no trainable parameter", where="model")
        self.heartbeat: Callable[[int], None] = lambda _tokens: None
        self.optimizer = optimizer
        self.own_optimizer = optimizer is None
        self.is_encoder_decoder = bool(getattr(self.config, "is_encoder_decoder", False))
        self.vocab_size = int(self.bare.get_input_embeddings().num_embeddings)
        self._head: nn.Module = self.bare.get_output_embeddings()
        if self._head is None:
            raise ConfigError(f"{type(self.bare).__name__} has no language-model head", where="model")
        self._plain_head: bool | None = None
        self._packs: bool | None = None
        self._scratch = torch_head.Scratch()
        self._norms = torch_norms.rms_norms(model)
        self.configure(settings)

    def configure(self, settings: StepSettings) -> None:
        """Take new hyper-parameters; the optimizer and its moments stay unless its kind changes."""
        changed = getattr(self, "settings", settings).optimizer != settings.optimizer
        self.settings = settings
        self.objective = resolve_objective(settings.objective)
        torch_memory.set_checkpointing(
            self.bare, settings.gradient_checkpointing, settings.gradient_checkpointing_kwargs
        )
        if self.own_optimizer and (self.optimizer is None or changed):
            self.fresh_optimizer()
        elif self.own_optimizer:
            assert self.optimizer is not None
            torch_optim.set_weight_decay(self.optimizer, settings.weight_decay)

    def free_scratch(self) -> None:
        """Give back the memory that is kept from step to step: buffers and compute copies."""
        self._scratch.clear()
        self.weights.drop_copies()

    def fresh_optimizer(self) -> None:
        """Drop all moments."""
        names, masters = self.weights.names, self.weights.masters
        self.optimizer = torch_optim.make_optimizer(self.model, names, masters, self.settings)

    # --- layout ---------------------------------------------------------------------------------------------------------

    def _accepts(self, name: str) -> bool:
        return name in inspect.signature(self.bare.forward).parameters

    def row_format(self) -> RowFormat:
        """How rows are laid out for this model; probes it at the first call."""
        if self._plain_head is None:
            self._probe()
        start = getattr(self.config, "decoder_start_token_id", None)
        generation = getattr(self.bare, "generation_config", None)
        if start is None:
            start = getattr(generation, "decoder_start_token_id", None)
        if self.is_encoder_decoder and start is None:
            raise ConfigError("the model's config has no decoder_start_token_id", where="model")
        pad = getattr(self.config, "pad_token_id", None)
        return RowFormat(
            packed=bool(self._packs),
            position_ids=self._accepts("position_ids"),
            pad_token_id=0 if pad is None or not 0 <= pad < self.vocab_size else int(pad),
            is_encoder_decoder=self.is_encoder_decoder,
            decoder_start_token_id=int(start or 0),
            device=self.device,
        )

    @torch.no_grad()
    def _probe(self) -> None:
        """Learn, from two tiny rows, whether the head is plain and whether rows may lie end to end."""
        rows = [TrainRow(str(n), ids, ids) for n, ids in enumerate(((1, 2, 3, 1, 2), (3, 2, 1)))]
        rows = [TrainRow(r.sample_id, tuple(i % self.vocab_size for i in r.input_ids), r.labels) for r in rows]
        form = RowFormat(False, self._accepts("position_ids"), 0, self.is_encoder_decoder, 0, self.device)
        training = self.model.training
        with self._quiet(0), torch.autocast(self.device.type, enabled=False):
            self.model.eval()
            try:
                batch = torch_rows.build(rows, [0, 1], form)
                self._plain_head = torch_head.head_is_plain(
                    self.model, self._head, {**batch.inputs, "use_cache": False}
                )
                self._packs = False
                wanted = self.settings.layout
                if wanted != "padded" and torch_attention.may_pack(self.bare) and form.position_ids:
                    if wanted == "packed" or self.device.type == "cpu":
                        self._packs = self._packs_alike(rows, batch)
                if wanted == "packed" and not self._packs:
                    raise ConfigError(
                        f"{type(self.bare).__name__} does not keep rows that lie end to end apart",
                        where="train.packing",
                        hint="leave packing out: rows are then padded inside small batches of like length",
                    )
            finally:
                self.model.train(training)

    def _packs_alike(self, rows: Sequence[TrainRow], padded: MicroBatch) -> bool:
        """Whether rows that lie end to end have the log-probabilities that they have in a padded batch.

        The difference is held against what it would be if the rows could see each other.
        """
        form = RowFormat(True, True, 0, False, 0, self.device)
        packed = torch_rows.build(rows, range(len(rows)), form)
        try:
            apart = self._logprobs(packed)[0]
            mixed = self._logprobs(replace(packed, lengths=(sum(packed.lengths),)))[0]
        except NotImplementedError:
            return False
        alone = self._logprobs(padded)[0]
        low = next(self.model.parameters()).dtype != torch.float32
        leak = float((mixed - alone).abs().max())
        return float((apart - alone).abs().max()) <= (0.2 if low else 0.01) * leak

    # --- one step -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _quiet(self, seed: int) -> Iterator[None]:
        """A random state of our own (dropout, NEFTune); the caller's is untouched."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    def _outputs(self, batch: MicroBatch, *, through: bool) -> Tensor:
        """What the model makes where a label is predicted: logits (N, V), or `through` its head, the hidden states before it."""
        alpha = self.settings.neftune_noise_alpha if self.model.training else None
        with (
            torch_head.selected(self._head, batch.positions, through=through),
            torch_noise.noisy_embeddings(self.bare, batch, alpha),
            self._layout(batch),
        ):
            out: Tensor = self.model(**batch.inputs, use_cache=False).logits[0]
        return out

    def _logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        want_mean = self.settings.label_smoothing > 0
        plain = bool(self._plain_head)
        out = self._outputs(batch, through=plain)
        if plain:
            head: Any = self._head
            return torch_head.token_logprobs(out, head.weight, head.bias, batch.targets, want_mean, self._scratch)
        return torch_head.logprobs_of_logits(out, batch.targets, want_mean)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, forward passes run in eval mode without gradients on the compute weights; all is put back after."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                self.weights.cast(frozen=False)
                with self.weights.swapped_in():
                    yield
        finally:
            self.model.train(training)

    def label_logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability of each label, (N,) fp32, and the labels, inside `evaluating`."""
        return self._logprobs(batch)[0], batch.targets

    @contextmanager
    def _layout(self, batch: MicroBatch) -> Iterator[None]:
        if batch.packed:
            with torch_attention.rows_layout(self.bare, batch.lengths):
                yield
        else:
            yield

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Sum of the objective's losses over the micro-batch, before division by the step's trained tokens."""
        smoothing = self.settings.label_smoothing
        more: dict[str, Any] = {}
        if needs_logits(self.objective):
            if self.is_encoder_decoder:
                raise ConfigError("an objective with needs_logits takes causal models only", where="train.objective")
            logits = self._outputs(batch, through=False)
            sequences, index = torch_rows.sequences(batch)
            more = {"logits": logits, "sequences": sequences, "index": index}
            logprobs, mean = torch_head.logprobs_of_logits(logits, batch.targets, smoothing > 0)
        else:
            logprobs, mean = self._logprobs(batch)
        nll = -logprobs if mean is None else -(1 - smoothing) * logprobs - smoothing * mean
        losses = self.objective(TokenBatch(logprobs, nll, batch.row, batch.weights, batch.ref_logprobs, **more))
        if losses.shape != nll.shape:
            raise DataError(
                f"the objective returned shape {tuple(losses.shape)}",
                where="train.objective",
                expected=f"one loss a trained token, {tuple(nll.shape)}",
            )
        return losses.sum()

    def check_rows(self, rows: Sequence[TrainRow]) -> None:
        """Raises DataError naming the row for what the model cannot be trained on."""
        needed = needs_ref_logprobs(self.objective)
        for row in rows:
            torch_rows.check(row, self.is_encoder_decoder, self.vocab_size, needs_ref_logprobs=needed)

    def micro_batches(self, rows: Sequence[TrainRow], budget: int | None) -> list[MicroBatch]:
        """`rows` as micro-batches of at most `budget` tokens."""
        form = self.row_format()
        limit = budget or self.settings.micro_batch_tokens or self.auto_budget()
        groups = torch_rows.plan(rows, limit, packed=form.packed, is_encoder_decoder=form.is_encoder_decoder)
        return [torch_rows.build(rows, group, form) for group in groups]

    def auto_budget(self) -> int:
        """Tokens a micro-batch may hold: a function of the model's shape and the machine's total memory only."""
        return torch_memory.micro_batch_tokens(self.config, self.device, self.settings.gradient_checkpointing)

    def step(
        self, rows: Sequence[TrainRow], *, learning_rate: float | None, seed: int, micro_batch_tokens: int | None = None
    ) -> StepResult:
        """One optimizer step over this rank's `rows` (may be empty on some ranks, not on all).

        `learning_rate` None leaves each parameter group's own rate. Raises TrainOutOfMemory, DataError or NonFiniteLoss with everything untouched.
        """
        self.check_rows(rows)
        with torch_memory.out_of_memory():
            batches = self.micro_batches(rows, micro_batch_tokens)
        return self.step_batches(batches, len(rows), learning_rate=learning_rate, seed=seed)

    def step_batches(
        self, batches: Sequence[MicroBatch], num_samples: int, *, learning_rate: float | None, seed: int
    ) -> StepResult:
        """The same over micro-batches that were made elsewhere (a caller's own collator)."""
        counts = [sum(int(b.targets.numel()) for b in batches), sum(b.num_tokens for b in batches), num_samples]
        trained, tokens, samples, number = torch_ranks.sum_ints([*counts, len(batches)], self.device)
        if not trained:
            raise DataError("no trained token in the whole step")
        training = self.model.training
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        ranks = torch_ranks.size()
        try:
            self.model.train()
            with ExitStack() as stack:
                stack.enter_context(torch_memory.out_of_memory())
                stack.enter_context(self._quiet(derive_seed(seed, "dropout", torch_ranks.rank())))
                stack.enter_context(torch.enable_grad())
                self.weights.cast(frozen=False)
                stack.enter_context(self.weights.swapped_in())
                stack.enter_context(torch_norms.fused_norms(self._norms))
                stack.enter_context(self._blocks.standing_in())
                stack.enter_context(self.weights.gathering(in_fp32=len(batches) > 1 or ranks > 1))
                for batch in batches:
                    part = self.loss_sum(batch)
                    loss += part.detach().double()
                    with self._layout(batch):
                        (part / trained).backward()  # type: ignore[no-untyped-call]
                    self.heartbeat(batch.num_tokens)
            grads = self.weights.take_gradients()
        finally:
            self.model.train(training)
        grads = torch_ranks.sum_gradients(grads, self.weights.masters)
        return self._finish(loss, grads, (tokens, trained, samples), learning_rate, number)

    def _finish(
        self, loss: Tensor, grads: list[Tensor | None], counts: Sequence[int], learning_rate: float | None, number: int
    ) -> StepResult:
        """Apply this step's gradients. `counts` are tokens, trained tokens and samples of all ranks, `loss` is this rank's sum."""
        tokens, trained, samples = counts
        mean_loss = float(torch_ranks.sum_tensor(loss)) / trained
        norm = self._norm(grads)
        assert self.optimizer is not None
        if learning_rate is None:
            learning_rate = float(self.optimizer.param_groups[0]["lr"])
        else:
            torch_optim.set_learning_rate(self.optimizer, learning_rate)
        finite = math.isfinite(mean_loss) and math.isfinite(norm)
        if finite:
            self._apply(grads, norm)
        elif self.settings.on_nonfinite == "stop":
            raise NonFiniteLoss(f"loss {mean_loss}, gradient norm {norm}: not finite", where="train")
        return StepResult(mean_loss, tokens, trained, samples, learning_rate, norm, int(not finite), number)

    def _norm(self, grads: Sequence[Tensor | None]) -> float:
        present = [grad for grad in grads if grad is not None]
        if not present:
            return 0.0
        if all(torch_native.offered(grad, 16) and grad.is_contiguous() for grad in present):
            return math.sqrt(sum(torch_native.squares(grad) for grad in present))
        norms = torch._foreach_norm(present, 2, dtype=torch.float32)
        return float(torch.linalg.vector_norm(torch.stack([norm.to(self.device) for norm in norms])))

    @torch.no_grad()
    def _apply(self, grads: list[Tensor | None], norm: float) -> None:
        limit = self.settings.max_grad_norm
        scale = limit / (norm + 1e-6) if limit and norm > limit else 1.0
        assert self.optimizer is not None
        if isinstance(self.optimizer, AdamW) and self.optimizer.step_with(self.weights.masters, grads, scale):
            self.weights.publish()
            return
        for number, master in enumerate(self.weights.masters):
            grad, grads[number] = grads[number], None
            if grad is not None:
                grad = grad.to(master.dtype)
                master.grad = grad if scale == 1.0 else grad.mul_(scale)
        try:
            self.optimizer.step()
        finally:
            for master in self.weights.masters:
                master.grad = None
        self.weights.publish()
