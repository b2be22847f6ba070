"""Each objective against its closed form, through the whole core and by autograd; plug-in objectives and their errors."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_helpers import caught_gradients, largest_error, model, some_rows

from iterative_sft_cli.errors import ConfigError, DataError, PluginError
from iterative_sft_cli.train.objectives import TokenBatch, resolve_objective
from iterative_sft_cli.train.torch_core import TrainCore
from iterative_sft_cli.train.torch_head import token_logprobs
from iterative_sft_cli.train.torch_settings import StepSettings
from iterative_sft_cli.types import TrainRow

Closed = Callable[[Tensor, TrainRow], Tensor]


def by_hand(subject: Any, rows: list[TrainRow], loss_of_row: Closed) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of sum(loss_of_row(logprobs of the trained tokens, row)) / trained tokens."""
    subject.train()
    subject.zero_grad()
    total: Any = 0
    count = 0
    for row in rows:
        logits = subject(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        keep = labels != -100
        logprobs = logits.log_softmax(-1)[keep].gather(1, labels[keep, None]).squeeze(1)
        total = total + loss_of_row(logprobs, row)
        count += int(keep.sum())
    (total / count).backward()
    grads = {name: parameter.grad.clone() for name, parameter in subject.named_parameters()}
    return float((total / count).detach()), grads


def with_reference(rows: list[TrainRow]) -> list[TrainRow]:
    out = []
    for number, row in enumerate(rows):
        trained = sum(label != -100 for label in row.labels[1:])
        out.append(replace(row, ref_logprobs=tuple(-4.0 - 0.1 * (place + number) for place in range(trained))))
    return out


def importance(logprobs: Tensor, row: TrainRow, tau: float, top: float) -> float:
    gap = [float(a) - b for a, b in zip(logprobs.detach(), row.ref_logprobs or (), strict=True)]
    return min(top, max(0.0, math.exp(tau * sum(gap) / len(gap))))


CASES: dict[str, tuple[Any, Closed]] = {
    "nll": ("nll", lambda p, row: -row.weight * p.sum()),
    "dft": ("dft", lambda p, row: -row.weight * (p.detach().exp() * p).sum()),
    "iw": ("iw", lambda p, row: -row.weight * importance(p, row, 1.0, 16.0) * p.sum()),
    "iw with arguments": (
        {"use": "iw", "args": {"tau": 2.0, "max_weight": 0.9}},
        lambda p, row: -row.weight * importance(p, row, 2.0, 0.9) * p.sum(),
    ),
    "rwr": ("rwr", lambda p, row: -math.exp(row.weight) * p.sum()),
    "rwr with arguments": (
        {"use": "rwr", "args": {"temperature": 0.5, "max_weight": 2.0}},
        lambda p, row: -min(2.0, math.exp(row.weight / 0.5)) * p.sum(),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [24, None])
def test_objective_is_its_closed_form(name: str, budget: int | None) -> None:
    spec, closed = CASES[name]
    rows = with_reference(some_rows("llama"))
    loss, grads = by_hand(model("llama"), rows, closed)
    core = TrainCore(model("llama"), StepSettings(objective=spec))
    caught = caught_gradients(core)
    result = core.step(rows, learning_rate=1e-3, seed=0, micro_batch_tokens=budget)
    assert result.loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert largest_error(caught, grads) <= 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("smooth", [True, False])
def test_the_fused_head_is_autograds(bias: bool, smooth: bool) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(600, 16), torch.randn(40, 16), torch.randn(40)]
    targets = torch.randint(0, 40, (600,))
    coefficient, other = torch.randn(600), torch.randn(600)

    def run(fused: bool) -> tuple[Tensor, list[Tensor]]:
        hidden, weight, offset = (leaf.clone().requires_grad_() for leaf in leaves)
        given = offset if bias else None
        if fused:
            logprobs, mean = token_logprobs(hidden, weight, given, targets, smooth)
        else:
            wide = torch.nn.functional.linear(hidden, weight, given).log_softmax(-1)
            logprobs, mean = wide.gather(1, targets[:, None]).squeeze(1), wide.mean(-1)
        total = (coefficient * logprobs).sum() + ((other * mean).sum() if smooth and mean is not None else 0)
        total.backward()  # type: ignore[no-untyped-call]
        found = [hidden.grad, weight.grad, offset.grad if bias else torch.zeros(1)]
        return total.detach(), [grad for grad in found if grad is not None]

    (mine, mine_grads), (theirs, their_grads) = run(True), run(False)
    assert float(mine) == pytest.approx(float(theirs), rel=1e-5)
    for a, b in zip(mine_grads, their_grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_sure_tokens_gradient_survives_bf16() -> None:
    """p - 1 computed in bf16 would be 0 or 0.4 percent where the truth is 0.02 percent."""
    hidden = torch.tensor([[8.5, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16)
    logprobs, _ = token_logprobs(hidden, weight, None, torch.tensor([0]))
    (-logprobs.sum()).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert float(hidden.grad[0, 0]) == pytest.approx(math.expm1(-math.log1p(math.exp(-8.5))), rel=0.01)


def test_importance_weights_need_the_reference() -> None:
    core = TrainCore(model("llama"), StepSettings(objective="iw"))
    with pytest.raises(DataError, match="ref_logprob.*got none") as caught:
        core.step(some_rows("llama"), learning_rate=1e-3, seed=0)
    assert "s0" in str(caught.value)


def test_plug_in_objectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
class Focal:
    def __init__(self, gamma=1.0):
        self.gamma = gamma
    def __call__(self, batch):
        return batch.token_weights * (1 - batch.logprobs.detach().exp()) ** self.gamma * batch.nll

def focal(batch, gamma=1.0):
    return Focal(gamma)(batch)

def wrong_shape(batch):
    return batch.nll.sum()
"""
    (tmp_path / "my_objectives_for_test.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = some_rows("llama")

    def focal(p: Tensor, row: TrainRow) -> Tensor:
        return -row.weight * ((1 - p.detach().exp()) ** 2 * p).sum()

    loss, grads = by_hand(model("llama"), rows, focal)
    for name in ("Focal", "focal"):
        for place in ("my_objectives_for_test", str(tmp_path / "my_objectives_for_test.py")):
            spec = {"use": f"{place}:{name}", "args": {"gamma": 2}}
            core = TrainCore(model("llama"), StepSettings(objective=spec))
            caught = caught_gradients(core)
            assert core.step(rows, learning_rate=1e-3, seed=0).loss == pytest.approx(loss, rel=1e-5)
            assert largest_error(caught, grads) <= 1e-5
    with pytest.raises(DataError, match="one loss a trained token"):
        core = TrainCore(model("llama"), StepSettings(objective="my_objectives_for_test:wrong_shape"))
        core.step(rows, learning_rate=1e-3, seed=0)
    for spec, text in {
        "nlll": "there is no objective 'nlll'. Did you mean `nll`?",
        "my_objectives_for_test:nope": "no attribute `nope`",
        "no_such_module_at_all:f": "no_such_module_at_all",
        "nowhere.py:f": "no such file",
    }.items():
        with pytest.raises(ConfigError, match=text):
            resolve_objective(spec)
    (tmp_path / "broken_objective.py").write_text("def fine(batch):\n    return batch.nll\n1 / 0\n")
    for use in ("broken_objective.py:fine", "broken_objective:fine"):
        with pytest.raises(PluginError, match=r"inside the import of .*broken_objective.*ZeroDivisionError.*py:3"):
            resolve_objective(use, tmp_path)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'temprature'"):
        resolve_objective({"use": "rwr", "args": {"temprature": 1.0}})
    sys.modules.pop("my_objectives_for_test")


def test_entry_points_are_found_and_clashes_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata as metadata

    point = metadata.EntryPoint("mine", "iterative_sft_cli.train.objectives:dft", "isft.objectives")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [point])
    assert resolve_objective("mine") is resolve_objective("dft")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [point, point])
    with pytest.raises(ConfigError, match="several packages"):
        resolve_objective("mine")


def test_row_mean() -> None:
    batch = TokenBatch(torch.zeros(3), torch.zeros(3), torch.tensor([0, 0, 2]), torch.ones(3))
    assert batch.row_mean(torch.tensor([1.0, 3.0, 5.0])).tolist() == [2.0, 0.0, 5.0]
