"""The loop's trainer: where its weights come from."""

from __future__ import annotations

from collections.abc import Iterable
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
from iterative_sft_cli.errors import DataError
from iterative_sft_cli.loop import place_weights
from iterative_sft_cli.model import load_model
from iterative_sft_cli.train import torch_away, torch_native
from iterative_sft_cli.train.torch_learner import TorchLearner


@pytest.fixture
def learner(tmp_path: Path) -> TorchLearner:
    folder = tiny.save_tiny(tmp_path / "base", model=tiny.tiny_llama(), tokenizer=tiny.tiny_tokenizer())
    section = ModelConfig(path=str(folder), dtype="float32", adapter=AdapterConfig(type="lora", r=2, alpha=4))
    train = TrainConfig(start_from="base", data="replace", learning_rate=0.01)
    return TorchLearner(train, loaded=load_model(section, seed=3, base_dir=tmp_path))


def whole_learner(folder: Path) -> TorchLearner:
    """Every weight trained in fp32 and computed with in bfloat16."""
    tiny.save_tiny(folder / "whole", model=tiny.tiny_llama(), tokenizer=tiny.tiny_tokenizer(), dtype="float32")
    section = ModelConfig(path=str(folder / "whole"), dtype="bfloat16")
    train = TrainConfig(start_from="base", data="replace", learning_rate=0.01)
    return TorchLearner(train, loaded=load_model(section, seed=3, base_dir=folder))


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


def bytes_held(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def moments(learner: TorchLearner) -> list[torch.Tensor]:
    assert learner.core.optimizer is not None
    states = learner.core.optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("mode", ["none", "host", "disk", "auto"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_generation_does_not_need_is_away_and_comes_back(
    request: pytest.FixtureRequest, tmp_path: Path, mode: str, weights: bool, kind: str
) -> None:
    learner = request.getfixturevalue("learner") if kind == "lora" else whole_learner(tmp_path)
    found = []
    for away in (True, False):
        learner.load_weights(None)
        learner.begin(learner.section.model_copy(update={"offload": mode}), 2, seed=0, keep_optimizer=False)
        learner.step(some_rows("llama"), 0, None)
        if away:
            before = [id(one) for one in learner.loaded.model.parameters()]
            held = bytes_held(learner.loaded.model.parameters())
            for _ in range(2):
                learner.offload()
                if weights:
                    learner.offload_weights()
            # on a CPU only `disk` is somewhere else
            assert bool(bytes_held(moments(learner))) == (mode != "disk")
            empty = weights and mode == "disk"
            everything = [*learner.loaded.model.parameters(), *learner.loaded.model.buffers()]
            everything += learner.core.weights.masters
            assert bool(bytes_held(everything)) == (not empty)
            learner.reload()
            learner.reload()
            assert bytes_held(learner.loaded.model.parameters()) == held
            assert [id(one) for one in learner.loaded.model.parameters()] == before
        learner.step(some_rows("llama", seed=1), 1, None)
        found.append({name: tensor.clone() for name, tensor in learner.loaded.model.state_dict().items()})
    assert same(*found)


def test_a_full_disk_leaves_everything_as_it_was(learner: TorchLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    learner.load_weights(None)
    learner.begin(learner.section.model_copy(update={"offload": "disk"}), 2, seed=0, keep_optimizer=False)
    learner.step(some_rows("llama"), 0, None)
    before = {name: tensor.clone() for name, tensor in learner.loaded.model.state_dict().items()}
    learner.offload()
    written = torch_away.Away._write
    calls: list[int] = []

    def full(self: Any, piece: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        written(self, piece)

    monkeypatch.setattr(torch_away.Away, "_write", full)
    with pytest.raises(DataError, match="could not be put on disk") as error:
        learner.offload_weights()
    assert error.value.hint is not None and "TMPDIR" in error.value.hint
    monkeypatch.undo()
    assert same(before, learner.loaded.model.state_dict())
    learner.reload()
    learner.step(some_rows("llama", seed=1), 1, None)
