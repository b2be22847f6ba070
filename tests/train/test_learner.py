"""The loop's trainer: where its weights come from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from train_helpers import some_rows

from iterative_sft_cli import native
from iterative_sft_cli.config import AdapterConfig, ModelConfig
from iterative_sft_cli.config.schema import TrainConfig
from iterative_sft_cli.loop import place_weights
from iterative_sft_cli.model import load_model
from iterative_sft_cli.train import torch_native
from iterative_sft_cli.train.torch_learner import TorchLearner


@pytest.fixture
def learner(tmp_path: Path) -> TorchLearner:
    folder = tiny.save_tiny(tmp_path / "base", model=tiny.tiny_llama(), tokenizer=tiny.tiny_tokenizer())
    section = ModelConfig(path=str(folder), dtype="float32", adapter=AdapterConfig(type="lora", r=2, alpha=4))
    train = TrainConfig(start_from="base", data="replace", learning_rate=0.01)
    return TorchLearner(train, loaded=load_model(section, seed=3, base_dir=tmp_path))


def adapter(learner: TorchLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.loaded.model.state_dict().items() if "lora_" in name}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def from_base(learner: Any, round_index: int) -> None:
    """As the loop does it for a round under `start_from: base`."""
    config = SimpleNamespace(train=SimpleNamespace(start_from="base"))
    place_weights(SimpleNamespace(learner=learner), config, round_index)  # type: ignore[arg-type]


def test_each_round_from_base_has_an_adapter_of_its_own(learner: TorchLearner) -> None:
    from_base(learner, 1)
    first = adapter(learner)
    learner.begin(learner.section, 1, seed=0, keep_optimizer=False)
    learner.step(some_rows("llama"), 0, None)
    assert not same(first, adapter(learner))
    from_base(learner, 2)
    second = adapter(learner)
    assert not same(first, second)
    torch.manual_seed(99)
    from_base(learner, 1)
    assert same(first, adapter(learner))
    for found in (first, second):
        assert all(tensor.any() if "lora_A" in name else not tensor.any() for name, tensor in found.items())


def test_what_was_trained_is_forgotten_by_the_optimizer_too(learner: TorchLearner) -> None:
    from_base(learner, 1)
    learner.begin(learner.section, 1, seed=0, keep_optimizer=False)
    learner.step(some_rows("llama"), 0, None)
    trained = adapter(learner)
    from_base(learner, 1)
    learner.begin(learner.section, 1, seed=0, keep_optimizer=True)
    learner.step(some_rows("llama"), 0, None)
    assert same(trained, adapter(learner))


def test_the_kernels_that_bytes_depend_on_have_a_name(learner: TorchLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.load("training", 1)
    assert learner.kernels == (None if library is None else Path(library._name).stem)
    monkeypatch.setattr(torch_native, "load", lambda *_: None)
    assert learner.kernels is None


@pytest.mark.parametrize("mode", ["none", "host", "disk", "auto"])
def test_what_generation_does_not_need_is_away_and_comes_back(learner: TorchLearner, mode: str) -> None:
    found = []
    for away in (True, False):
        learner.load_weights(None)
        learner.begin(learner.section.model_copy(update={"offload": mode}), 2, seed=0, keep_optimizer=False)
        learner.step(some_rows("llama"), 0, None)
        if away:
            learner.offload()
            assert learner.core.optimizer is not None
            held = [value for state in learner.core.optimizer.state.values() for value in state.values()]
            assert any(isinstance(value, torch.Tensor) for value in held) == (mode != "disk")
            learner.offload()
            learner.reload()
            learner.reload()
        learner.step(some_rows("llama", seed=1), 1, None)
        found.append(adapter(learner))
    assert same(*found)
