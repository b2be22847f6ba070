"""The training kernels in C, and the blocks that are computed with them, against the same in torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from train_helpers import caught_gradients, largest_error, model, some_rows, weights

from iterative_sft_cli import native
from iterative_sft_cli.train import torch_adamw, torch_blocks, torch_native, torch_norms
from iterative_sft_cli.train.torch_core import TrainCore
from iterative_sft_cli.train.torch_settings import StepSettings

pytestmark = pytest.mark.skipif(
    native.load("training", 1) is None, reason="no C compiler, or none that shares torch's threads"
)
needs_attention = pytest.mark.skipif(
    not torch_native.attends(torch.empty(0, dtype=torch.bfloat16), 64), reason="the processor has no bfloat16 products"
)
WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""A tiny Llama with heads of 64, as the attention kernel takes them."""


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def by_autograd(function: Any, up: Tensor, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [one.float().requires_grad_() for one in inputs]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, up.float())


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that switches the kernels off until the test is over."""
    yield lambda: monkeypatch.setattr(torch_native, "load", lambda *_: None)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_row_kernels_are_autograds(dtype: torch.dtype, tolerance: float) -> None:
    x, up, weight = numbers(37, 48, dtype=dtype), numbers(37, 48, seed=1, dtype=dtype), numbers(48, seed=2, dtype=dtype)
    want, grads = by_autograd(lambda a, w: functional.rms_norm(a, (48,), w, 1e-5), up, x, weight)
    out, factors = torch_native.norm(x, weight, 1e-5)
    found = torch_native.norm_back(x, weight, factors, up)
    assert error(out, want) < tolerance
    assert max(error(got, grad) for got, grad in zip(found, grads, strict=True)) < tolerance
    both = numbers(37, 96, seed=3, dtype=dtype) * 3
    gate, other = both.split(48, dim=1)
    want, grads = by_autograd(lambda g, u: functional.silu(g) * u, up, gate, other)
    to_gate, to_other = torch.empty_like(both).split(48, dim=1)
    assert error(torch_native.swiglu(gate, other), want) < tolerance
    assert error(torch_native.swiglu_back(gate, other, up.clone(), to_gate, to_other), want) < tolerance
    assert max(error(to_gate, grads[0]), error(to_other, grads[1])) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_turning_and_its_transpose(dtype: torch.dtype, tolerance: float) -> None:
    line, up = numbers(9, 3 * 32, dtype=dtype), numbers(9, 3 * 32, seed=1, dtype=dtype)
    cosine, sine = numbers(9, 32, seed=2, dtype=dtype), numbers(9, 32, seed=3, dtype=dtype)

    def turned(x: Tensor) -> Tensor:
        heads = x.view(9, 3, 32)
        half = torch.cat([-heads[..., 16:], heads[..., :16]], -1)
        out = heads * cosine.float()[:, None] + half * sine.float()[:, None]
        return torch.cat([out[:, :2], heads[:, 2:]], 1).flatten(1)

    want, (grad,) = by_autograd(turned, up, line)
    forth, back = line.clone(), up.clone()
    torch_native.turn(forth, cosine, sine, 2, 32, back=False)
    torch_native.turn(back, cosine, sine, 2, 32, back=True)
    assert error(forth, want) < tolerance and error(back, grad) < tolerance


@needs_attention
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 64), (2, 2, 128)])
def test_attention_within_rows(heads: int, kv_heads: int, width: int) -> None:
    lengths = [1, 2, 47, 48, 49, 64, 65, 130]
    total = sum(lengths)
    line = numbers(total, (heads + 2 * kv_heads) * width, dtype=torch.bfloat16)
    up = numbers(total, heads * width, seed=1, dtype=torch.bfloat16)

    def attention(x: Tensor) -> Tensor:
        parts = []
        for row in x.split(lengths):
            shaped = row.view(len(row), -1, width).transpose(0, 1)
            query, *others = shaped.split([heads, kv_heads, kv_heads])
            key, value = (one.repeat_interleave(heads // kv_heads, 0) for one in others)
            out = functional.scaled_dot_product_attention(
                query[None], key[None], value[None], is_causal=True, scale=0.3
            )
            parts.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(parts)

    want, (grad,) = by_autograd(attention, up, line)
    out, logs = torch_native.attend(line, lengths, heads, kv_heads, width, 0.3)
    assert error(out, want) < 0.01
    found = torch_native.attend_back(line, lengths, heads, kv_heads, width, 0.3, out, logs, up)
    ends = [heads * width, kv_heads * width, kv_heads * width]
    assert max(error(a, b) for a, b in zip(found.split(ends, 1), grad.split(ends, 1), strict=True)) < 0.015


def test_what_is_not_a_number_stays_visible() -> None:
    logits = numbers(3, 50)
    logits[1, 7] = float("nan")
    found = torch_native.softmax(logits, torch.tensor([1, 2, 3]), keep=True)
    assert found.isnan().tolist() == [False, True, False] and logits[1].isnan().all()
    x = numbers(2, 16)
    x[0, 3] = float("nan")
    assert torch_native.norm(x, torch.ones(16), 1e-5)[0].isnan().any(1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 50])
def test_softmax_in_place(dtype: torch.dtype, width: int) -> None:
    logits, targets = numbers(5, width, dtype=dtype) * 4, torch.arange(5)
    want = logits.float().log_softmax(-1)
    down = want.exp()
    down[range(5), targets] -= 1
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    assert torch.equal(
        torch_native.softmax(logits.clone(), targets, keep=False), torch_native.softmax(logits, targets, keep=True)
    )
    assert error(logits, down) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_gradients(dtype: torch.dtype) -> None:
    for count in (1, 15, 16, 70_001, 200_000):
        grad = numbers(count, dtype=dtype)
        assert torch_native.squares(grad) == pytest.approx(float(grad.double().square().sum()), rel=1e-5)
    grad[3] = float("inf")
    assert torch_native.squares(grad) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs(dtype: torch.dtype) -> None:
    shapes = [(70_001,), (3, 5), (64, 64)]
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = ([nn.Parameter(numbers(*shape, seed=n)) for n, shape in enumerate(shapes)] for _ in range(2))
    one, other = torch_adamw.AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(4):
        grads = [numbers(*shape, seed=9 + step, dtype=dtype) for shape in shapes]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.float() * 0.3
        if step == 2:  # a parameter that got no gradient stays where it is
            grads[1] = theirs[1].grad = None
        assert one.step_with(ours, list(grads), 0.3)
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        assert error(a.detach(), b.detach()) < 1e-6
        assert error(one.state[a]["exp_avg_sq"], other.state[b]["exp_avg_sq"]) < 1e-6
        assert one.state[a]["step"] == other.state[b]["step"] and one.state[a].keys() == other.state[b].keys()


def test_a_step_with_clipping_and_decay_is_the_step_without_kernels(without: Any) -> None:
    settings = StepSettings(max_grad_norm=0.01, weight_decay=0.1)
    found, heard = [], []
    for way in ("kernels", "hooked", "torch"):
        if way == "torch":
            without()
        core = TrainCore(model("llama"), settings)
        assert core.optimizer is not None
        if way == "hooked":
            core.optimizer.register_step_post_hook(lambda *_: heard.append(1))
        for seed in range(3):
            core.step(some_rows("llama", seed=seed), learning_rate=0.01, seed=0)
        found.append(weights(core.model))
    assert len(heard) == 3
    for other in found[1:]:
        assert max(error(found[0][name], other[name]) for name in other) < 1e-3
    assert max(error(found[0][name], tensor) for name, tensor in weights(model("llama")).items()) > 0.01


def gradients(subject: nn.Module, dtype: torch.dtype, rows: Any = None) -> tuple[float, dict[str, Tensor], TrainCore]:
    core = TrainCore(subject, StepSettings(), compute_dtype=dtype)
    caught = caught_gradients(core)
    result = core.step(rows or some_rows("llama", 12), learning_rate=0.0, seed=0)
    return result.loss, {name: grad.float() for name, grad in caught.items()}, core


@needs_attention
def test_blocks_in_bf16_are_as_near_to_fp32_as_the_models_own_code(without: Any) -> None:
    subject = model("llama", **WIDE)
    loss, found, core = gradients(subject, torch.bfloat16)
    assert len(core._blocks) == 4
    layer = subject.model.layers[0].self_attn
    copies = [core.weights._copies[part.weight] for part in (layer.q_proj, layer.k_proj, layer.v_proj)]
    assert torch_blocks._joined(copies) is not None
    want_loss, want, _ = gradients(subject, torch.float32)
    without()
    plain_loss, plain, core = gradients(subject, torch.bfloat16)
    assert len(core._blocks) == 0
    assert abs(loss - want_loss) < 0.01 and abs(loss - plain_loss) < 0.01
    assert largest_error(found, want) < 1.5 * largest_error(plain, want)


def test_fp32_blocks_change_nothing(without: Any) -> None:
    subject = model("llama")
    loss, found, core = gradients(subject, torch.float32)
    assert len(core._blocks) == 2
    without()
    plain_loss, plain, core = gradients(subject, torch.float32)
    assert len(core._blocks) == 0
    assert abs(loss - plain_loss) < 1e-6 and largest_error(found, plain) < 1e-5


def test_checkpointing_and_frozen_weights_go_through_the_blocks() -> None:
    subject = model("llama", **WIDE)
    for name, parameter in subject.named_parameters():
        parameter.requires_grad_("down_proj" in name or "k_proj" in name)
    _, want, _ = gradients(subject, torch.bfloat16)
    core = TrainCore(subject, StepSettings(gradient_checkpointing=True), compute_dtype=torch.bfloat16)
    caught = caught_gradients(core)
    core.step(some_rows("llama", 12), learning_rate=0.0, seed=0)
    assert want.keys() == caught.keys() and len(want) == 4
    assert all(torch.equal(want[name], caught[name].float()) for name in want)


def test_only_what_was_found_alike_is_stood_in_for() -> None:
    assert len(torch_blocks.Blocks(model("llama", hidden_act="gelu"))) == 0
    assert len(torch_blocks.Blocks(model("llama", mlp_bias=True))) == 0
    assert len(torch_blocks.Blocks(model("gpt2"))) == 0
    dropping = model("llama")
    for layer in dropping.model.layers:
        layer.mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    assert len(torch_blocks.Blocks(dropping)) == 0


@needs_attention
def test_another_rotary_embedding_is_not_stood_in_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    assert len(torch_blocks.Blocks(model("llama", **WIDE))) == 4
    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: -x.flip(-1))
    assert len(torch_blocks.Blocks(model("llama", **WIDE))) == 2


def test_hooks_and_adapters_keep_the_models_own_code() -> None:
    from peft import LoraConfig, get_peft_model

    subject = model("llama")
    blocks = torch_blocks.Blocks(subject)
    assert len(blocks) == 2
    heard: list[int] = []
    hooked = subject.model.layers[0].mlp
    hooked.up_proj.register_forward_hook(lambda *_: heard.append(1))
    with blocks.standing_in():
        assert "forward" not in hooked.__dict__ and "forward" in subject.model.layers[1].mlp.__dict__
    assert "forward" not in subject.model.layers[1].mlp.__dict__
    adapted = get_peft_model(model("llama"), LoraConfig(r=2, target_modules=["gate_proj"]))
    assert len(torch_blocks.Blocks(adapted)) == 0


def test_norms_are_fused_in_c_with_results_that_no_thread_count_changes() -> None:
    x, weight, up = numbers(301, 64), numbers(64, seed=1), numbers(301, 64, seed=2)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaf, scale = x.clone().requires_grad_(), weight.clone().requires_grad_()
            out: Any = torch_norms._RmsNorm.apply(leaf, scale, 1e-5)
            out.backward(up)
            found.append((out.detach(), leaf.grad, scale.grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
