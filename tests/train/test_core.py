"""One optimizer step against a plain reference, whatever the batching; state; policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import CAUSAL, caught_gradients, largest_error, model, reference, same, some_rows, weights

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.train import torch_rows, torch_state
from iterative_sft_cli.train.base import TrainOutOfMemory
from iterative_sft_cli.train.torch_core import NonFiniteLoss, TrainCore
from iterative_sft_cli.train.torch_settings import Schedule, StepSettings
from iterative_sft_cli.types import TrainRow

TOLERANCE = 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("budget", [16, 64, None])
@pytest.mark.parametrize("layout", ["padded", "auto"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_reference(
    kind: str, budget: int | None, layout: str, checkpointing: bool
) -> None:
    rows = some_rows(kind)
    loss, grads = reference(model(kind), rows)
    core = TrainCore(model(kind), StepSettings(layout=layout, gradient_checkpointing=checkpointing))
    caught = caught_gradients(core)
    result = core.step(rows, learning_rate=1e-3, seed=0, micro_batch_tokens=budget)
    assert result.loss == pytest.approx(loss, rel=TOLERANCE)
    assert largest_error(caught, grads) <= TOLERANCE
    assert core.row_format().packed == (layout == "auto" and kind in CAUSAL)
    assert result.num_tokens == sum(torch_rows.row_cost(row, kind == "t5") for row in rows)


@pytest.mark.parametrize("tied", [True, False])
def test_untied_heads_and_biases_too(tied: bool) -> None:
    subject = model("llama", tied=tied, attention_bias=True)
    rows = some_rows("llama")
    loss, grads = reference(subject, rows)
    core = TrainCore(subject, StepSettings())
    caught = caught_gradients(core)
    assert core.step(rows, learning_rate=1e-3, seed=0).loss == pytest.approx(loss, rel=TOLERANCE)
    assert largest_error(caught, grads) <= TOLERANCE


def test_a_head_that_is_not_plain_keeps_the_models_own_logits() -> None:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logit_scale=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    subject = CohereForCausalLM(config)
    rows = some_rows("llama")
    loss, grads = reference(subject, rows)
    core = TrainCore(subject, StepSettings())
    caught = caught_gradients(core)
    assert core.step(rows, learning_rate=1e-3, seed=0).loss == pytest.approx(loss, rel=TOLERANCE)
    assert largest_error(caught, grads) <= TOLERANCE
    assert core._plain_head is False


def test_a_sliding_window_is_never_packed() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    subject = MistralForCausalLM(config)
    rows = some_rows("llama")
    loss, grads = reference(subject, rows)
    core = TrainCore(subject, StepSettings())
    caught = caught_gradients(core)
    assert core.step(rows, learning_rate=1e-3, seed=0).loss == pytest.approx(loss, rel=TOLERANCE)
    assert largest_error(caught, grads) <= TOLERANCE
    assert not core.row_format().packed
    with pytest.raises(ConfigError, match="packing"):
        TrainCore(subject, StepSettings(layout="packed")).row_format()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_bf16_is_the_reference_up_to_its_rounding_and_masters_stay_fp32(kind: str) -> None:
    rows = some_rows(kind, weighted=False)
    subject = model(kind)
    loss, grads = reference(subject, rows)
    for budget in (24, None):
        core = TrainCore(model(kind), StepSettings(), compute_dtype=torch.bfloat16)
        caught = caught_gradients(core)
        assert core.step(rows, learning_rate=1e-3, seed=0, micro_batch_tokens=budget).loss == pytest.approx(
            loss, rel=5e-3
        )
        wrong = sum(float((caught[name].float() - grads[name]).square().sum()) for name in grads)
        assert wrong <= 0.05**2 * sum(float(grad.square().sum()) for grad in grads.values())
    core = TrainCore(subject, StepSettings(), compute_dtype=torch.bfloat16)
    core.step(rows, learning_rate=1e-7, seed=0)
    assert {p.dtype for p in subject.parameters()} == {torch.float32}


def test_updates_too_small_for_bf16_weights_are_not_lost() -> None:
    subject = model("llama").to(torch.bfloat16)
    core = TrainCore(subject, StepSettings(), compute_dtype=torch.bfloat16)
    before = [master.detach().clone() for master in core.weights.masters]
    published = weights(subject)
    for step in range(3):
        core.step(some_rows("llama"), learning_rate=1e-6, seed=step)
    assert all(not torch.equal(a, b) for a, b in zip(core.weights.masters, before, strict=True))
    assert sum(torch.equal(p.detach(), published[n]) for n, p in subject.named_parameters()) >= 1
    for name, master in zip(core.weights.names, core.weights.masters, strict=True):
        assert torch.equal(dict(subject.named_parameters())[name], master.to(torch.bfloat16))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_after_load_is_the_step_without_it(tmp_path: Path, optimizer: str, dtype: torch.dtype) -> None:
    def fresh() -> TrainCore:
        subject = model("llama", attention_dropout=0.1).to(dtype)
        settings = StepSettings(optimizer=optimizer, weight_decay=0.1)
        return TrainCore(subject, settings, compute_dtype=torch.bfloat16)

    one = fresh()
    for step in range(3):
        one.step(some_rows("llama", seed=step), learning_rate=1e-3, seed=step)
    torch_state.save_state(one, tmp_path, {"note": 1})
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    other = fresh()
    assert torch_state.load_state(other, tmp_path)["note"] == 1
    for core in (one, other):
        core.step(some_rows("llama", seed=9), learning_rate=1e-3, seed=9)
    assert same(weights(one.model), weights(other.model))
    assert all(torch.equal(a, b) for a, b in zip(one.weights.masters, other.weights.masters, strict=True))


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    core = TrainCore(model("llama"), StepSettings())
    torch_state.save_state(core, tmp_path, {})
    with pytest.raises(DataError, match="parameters differ"):
        torch_state.load_state(TrainCore(model("gpt2"), StepSettings()), tmp_path)
    with pytest.raises(DataError, match="AdamW"):
        torch_state.load_state(TrainCore(model("llama"), StepSettings(optimizer="adafactor")), tmp_path)
    (tmp_path / torch_state.MASTERS).write_bytes(b"torn")
    with pytest.raises(DataError, match="damaged"):
        torch_state.load_state(core, tmp_path)


def test_dropout_is_a_function_of_the_seed_and_leaves_the_callers_generator_alone() -> None:
    losses = []
    for seed in (1, 1, 2):
        core = TrainCore(model("gpt2", resid_pdrop=0.3), StepSettings())
        torch.manual_seed(5)
        state = torch.get_rng_state()
        losses.append(core.step(some_rows("gpt2"), learning_rate=1e-3, seed=seed).loss)
        assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1] != losses[2]


def test_neftune_moves_each_row_by_its_own_length() -> None:
    rows = some_rows("llama", weighted=False)
    plain = TrainCore(model("llama"), StepSettings()).step(rows, learning_rate=0.0, seed=0).loss
    for layout in ("padded", "auto"):
        seen: list[torch.Tensor] = []
        core = TrainCore(model("llama"), StepSettings(neftune_noise_alpha=5.0, layout=layout))
        embedding = core.bare.get_input_embeddings()
        assert core.row_format()
        handle = core.bare.model.layers[0].register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0].detach())
        )
        batch = torch_rows.build(rows, range(len(rows)), core.row_format())
        core.model.train()
        core.loss_sum(batch)
        handle.remove()
        noise = (seen[0] - embedding(batch.inputs["input_ids"])).detach()
        start = 0
        for number, row in enumerate(rows):
            length = len(row.input_ids)
            own = noise[0, start : start + length] if layout == "auto" else noise[number, :length]
            bound = 5.0 / (length * 32) ** 0.5
            assert 0.9 * bound < float(own.abs().max()) <= bound * 1.0001
            start += length
        assert core.step(rows, learning_rate=0.0, seed=0).loss != plain


def test_label_smoothing_is_hugging_faces() -> None:
    from transformers.modeling_outputs import CausalLMOutput
    from transformers.trainer_pt_utils import LabelSmoother

    rows = some_rows("llama", weighted=False)
    subject = model("llama")
    total, count = 0.0, 0
    for row in rows:
        logits = subject(input_ids=torch.tensor([row.input_ids])).logits
        labels = torch.tensor([row.labels])
        trained = int((labels[:, 1:] != -100).sum())
        loss = LabelSmoother(0.1)(CausalLMOutput(logits=logits), labels, shift_labels=True)
        total, count = total + float(loss.detach()) * trained, count + trained
    core = TrainCore(subject, StepSettings(label_smoothing=0.1))
    assert core.step(rows, learning_rate=0.0, seed=0).loss == pytest.approx(total / count, rel=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_skipped_counted_or_stops(dtype: torch.dtype) -> None:
    rows = [TrainRow("big", (9, 10, 11), (9, 10, 11), weight=3e38), *some_rows("llama")]
    for policy in ("skip", "stop"):
        core = TrainCore(model("llama"), StepSettings(on_nonfinite=policy), compute_dtype=dtype)
        core.step(some_rows("llama"), learning_rate=1e-3, seed=0)
        before = weights(core.model)
        moments = [v.clone() for s in core.optimizer.state.values() for v in s.values()]  # type: ignore[union-attr]
        if policy == "skip":
            result = core.step(rows, learning_rate=1e-3, seed=1)
            assert result.skipped_nonfinite == 1
            assert result.to_dict()["grad_norm"] is None
        else:
            with pytest.raises(NonFiniteLoss):
                core.step(rows, learning_rate=1e-3, seed=1)
        assert same(weights(core.model), before)
        after = [v for s in core.optimizer.state.values() for v in s.values()]  # type: ignore[union-attr]
        assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_out_of_memory_and_a_stop_leave_everything_as_it_was() -> None:
    core = TrainCore(model("llama"), StepSettings(), compute_dtype=torch.bfloat16)
    before = weights(core.model)
    beats: list[int] = []

    def beat(tokens: int) -> None:
        beats.append(tokens)
        if len(beats) == 2:
            raise KeyboardInterrupt

    core.heartbeat = beat
    with pytest.raises(KeyboardInterrupt):
        core.step(some_rows("llama"), learning_rate=1e-3, seed=0, micro_batch_tokens=30)
    core.heartbeat = lambda _tokens: None
    original = core.loss_sum

    def fail(_batch: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    core.loss_sum = fail  # type: ignore[method-assign]
    with pytest.raises(TrainOutOfMemory):
        core.step(some_rows("llama"), learning_rate=1e-3, seed=0)
    core.loss_sum = original  # type: ignore[method-assign]
    assert same(weights(core.model), before)
    assert not core.model.training
    fresh = TrainCore(model("llama"), StepSettings(), compute_dtype=torch.bfloat16)
    for each in (core, fresh):
        each.step(some_rows("llama"), learning_rate=1e-3, seed=0)
    assert same(weights(core.model), weights(fresh.model))


def test_clipping_scales_to_the_norm_and_off_means_off() -> None:
    rows = some_rows("llama")
    norms = {}
    for limit in (None, 0.0, 0.01):
        core = TrainCore(model("llama"), StepSettings(max_grad_norm=limit))
        seen: list[torch.Tensor] = []
        assert core.optimizer is not None
        step = core.optimizer.step
        core.optimizer.step = lambda seen=seen, core=core, step=step: (  # type: ignore[method-assign,misc]
            seen.extend(m.grad.clone() for m in core.weights.masters if m.grad is not None),
            step(),
        )
        result = core.step(rows, learning_rate=1e-3, seed=0)
        norms[limit] = float(torch.stack([g.norm() for g in seen]).norm())
        assert result.grad_norm > 0.02
    assert norms[None] == norms[0.0]
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)


def test_weight_decay_spares_biases_and_norms() -> None:
    core = TrainCore(model("gpt2"), StepSettings(weight_decay=0.5))
    assert core.optimizer is not None
    names = {id(m): n for n, m in zip(core.weights.names, core.weights.masters, strict=True)}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in core.optimizer.param_groups)
    assert "transformer.h.0.attn.c_attn.weight" in decayed
    assert {"transformer.h.0.ln_1.weight", "transformer.ln_f.bias", "transformer.h.0.mlp.c_fc.bias"} <= others
    core.configure(StepSettings(weight_decay=0.1))
    assert [group["weight_decay"] for group in core.optimizer.param_groups] == [0.1, 0.0]


def test_a_row_that_cannot_be_trained_is_named() -> None:
    core = TrainCore(model("llama"), StepSettings())
    cases = {
        "no trained token": TrainRow("r7", (9, 10), (-100, -100)),
        "outside the embedding": TrainRow("r7", (9, 64), (9, 64)),
        "labels for": TrainRow("r7", (9, 10), (9,)),
        "no tokens": TrainRow("r7", (), ()),
        "not finite": TrainRow("r7", (9, 10), (9, 10), weight=float("nan")),
    }
    for text, row in cases.items():
        with pytest.raises(DataError, match=text) as caught:
            core.step([*some_rows("llama"), row], learning_rate=1e-3, seed=0)
        assert "r7" in str(caught.value)


def test_unknown_optimizers_and_missing_packages_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    with pytest.raises(ConfigError, match="adamw_8bit or adafactor"):
        TrainCore(model("llama"), StepSettings(optimizer="sgd"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"iterative-sft-cli\[quant\]"):
        TrainCore(model("llama"), StepSettings(optimizer="adamw_8bit"))


def test_an_8_bit_optimizer_is_saved_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = StepSettings(optimizer="adamw_8bit")
    whole, first, second = (TrainCore(model("llama", hidden_size=64, vocab_size=128), settings) for _ in range(3))
    rows = some_rows("llama")
    for core in (whole, first):
        core.step(rows, learning_rate=1e-3, seed=0)
    torch_state.save_state(first, tmp_path, {})
    torch_state.load_state(second, tmp_path)
    for core in (whole, second):
        core.step(rows, learning_rate=1e-3, seed=1)
    states = [core.optimizer.state[core.weights.masters[0]] for core in (whole, second) if core.optimizer is not None]
    assert any(value.dtype == torch.uint8 for value in states[0].values() if isinstance(value, torch.Tensor))
    for one, other in zip(whole.weights.masters, second.weights.masters, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("packed", [True, False])
def test_a_plan_has_every_row_once_and_keeps_to_its_budget(packed: bool) -> None:
    rows = some_rows("llama", 40)
    for budget in (5, 20, 64, 10_000):
        groups = torch_rows.plan(rows, budget, packed=packed)
        assert sorted(index for group in groups for index in group) == list(range(40))
        for group in groups:
            lengths = [len(rows[index].input_ids) for index in group]
            cost = sum(lengths) if packed else len(lengths) * max(lengths)
            assert cost <= budget or len(group) == 1
    assert torch_rows.plan([], 10, packed=packed) == []


def test_schedules_are_hugging_faces_and_never_train_nothing() -> None:
    from transformers import get_scheduler

    for name in ("linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"):
        ours = Schedule(StepSettings(learning_rate=0.1, lr_scheduler_type=name, warmup=0.2), 10)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        theirs = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=10)
        for step in range(10):
            assert ours(step) == pytest.approx(theirs.get_last_lr()[0])
            optimizer.step()
            theirs.step()
    assert Schedule(StepSettings(warmup=0.1), 1)(0) > 0
    assert Schedule(StepSettings(warmup=100), 2)(1) > 0
    with pytest.raises(ConfigError, match="lr_scheduler_type"):
        Schedule(StepSettings(lr_scheduler_type="zigzag"), 10)
