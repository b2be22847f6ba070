"""Hostile safetensors files: everything of ours that reads one says which file is wrong (exit 4), runs nothing, allocates nothing."""

from __future__ import annotations

import resource
import shutil
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_safetensors import HOSTILE, make

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.tensor_files import read_headers, weight_files

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder with a tokenizer."""
    import tiny

    return tiny.save_tiny(tmp_path_factory.mktemp("good") / "tiny")


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What a pickle would make if it were loaded."""
    place = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(place))
    yield place
    assert not place.exists()


def test_there_are_at_least_forty() -> None:
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("name", HOSTILE)
def test_the_header_is_refused_with_the_file_named(name: str, good: Path, tmp_path: Path, canary: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(make(name, good / "model.safetensors"))
    before = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            read_headers([file])
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert caught.value.exit_code == 4 and caught.value.where == str(file)
    assert "damaged" in caught.value.what and len(caught.value.what) < 400
    assert peak < (64 << 20) and time.monotonic() - before < 5


def test_a_good_file_passes(good: Path) -> None:
    assert len(read_headers(weight_files(good))) > 10


def read_as_a_model(folder: Path, good: Path) -> None:
    from iterative_sft_cli.config import ModelConfig
    from iterative_sft_cli.model import load_model

    load_model(ModelConfig.model_validate({"path": str(folder), "device": "cpu"}), seed=0, base_dir=folder)


def read_as_a_checkpoint(folder: Path, good: Path) -> None:
    from iterative_sft_cli.model import load_weights_into

    load_weights_into(live(good), folder)


def read_as_an_adapter(folder: Path, good: Path) -> None:
    from iterative_sft_cli.model import load_weights_into

    (folder / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    load_weights_into(live(good, adapter={"type": "lora", "r": 2}), folder)


def read_as_an_engine(folder: Path, good: Path) -> None:
    from iterative_sft_cli.generate.embedded import EmbeddedEngine

    adapter = {"adapter": {"type": "lora", "r": 2}} if (folder / "adapter_config.json").exists() else {}
    engine = EmbeddedEngine.__new__(EmbeddedEngine)
    engine.loaded = live(good, **adapter)
    engine._load(folder)


def read_as_an_engines_adapter(folder: Path, good: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    read_as_an_engine(folder, good)


def read_as_trainer_state(folder: Path, good: Path) -> None:
    from iterative_sft_cli.train.torch_state import read_tensors

    read_tensors(folder / "model.safetensors")


def read_as_a_reward_model(folder: Path, good: Path) -> None:
    from iterative_sft_cli.filters.builtin.scoring_models import ScoringModel

    ScoringModel("AutoModelForSequenceClassification", str(folder), None, "reward_model").load()


LIVE: dict[str, Any] = {}


def live(good: Path, **settings: Any) -> Any:
    """A loaded model, one for each setting."""
    from iterative_sft_cli.config import ModelConfig
    from iterative_sft_cli.model import load_model

    key = repr(settings)
    if key not in LIVE:
        section = ModelConfig.model_validate({"path": str(good), "device": "cpu", **settings})
        LIVE[key] = load_model(section, seed=0, base_dir=good)
    return LIVE[key]


READERS: dict[str, Callable[[Path, Path], None]] = {
    "the model of a config": read_as_a_model,
    "a checkpoint": read_as_a_checkpoint,
    "an adapter's checkpoint": read_as_an_adapter,
    "the engine's weights": read_as_an_engine,
    "the engine's adapter": read_as_an_engines_adapter,
    "the trainer's state": read_as_trainer_state,
    "a reward model": read_as_a_reward_model,
}


@pytest.mark.parametrize("reader", READERS)
def test_everything_that_reads_safetensors_refuses_all_of_them(
    reader: str, good: Path, tmp_path: Path, canary: Path
) -> None:
    before: dict[str, Any] = {}
    peak = 0
    for number, name in enumerate(["", *HOSTILE]):
        folder = tmp_path / f"{number}"
        shutil.copytree(good, folder)
        if name:
            (folder / "model.safetensors").write_bytes(make(name, good / "model.safetensors"))
            with pytest.raises(DataError) as caught:
                READERS[reader](folder, good)
            assert caught.value.exit_code == 4 and "safetensors" in f"{caught.value.where}", name
            assert "damaged" in caught.value.what, (name, caught.value.what)
            if sys.platform == "linux":
                assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 256 << 10, name
        else:
            try:
                READERS[reader](folder, good)
            except DataError as error:
                # a model that is not for this reader is refused for another reason than its bytes
                assert "damaged" not in error.what
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if reader == "a checkpoint":
                before = {key: value.clone() for key, value in live(good).model.state_dict().items()}
        shutil.rmtree(folder)
    for key, value in before.items():
        assert torch.equal(live(good).model.state_dict()[key], value)


INDEXES: dict[str, Any] = {
    "up and out": "../outside.safetensors",
    "far up": "../../../../../../../{outside}/outside.safetensors",
    "absolute": "{outside}/outside.safetensors",
    "backslashes": "..\\outside.safetensors",
    "a drive": "C:outside.safetensors",
    "in a folder": "sub/model.safetensors",
    "through a folder": "sub/../../outside.safetensors",
    "the folder": ".",
    "its parent": "..",
    "nothing": "",
    "a pickle": "pytorch_model.bin",
    "a NUL": "model.safetensors\0.safetensors",
    "a number": 3,
    "a list": ["model.safetensors"],
    "null": None,
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_names_files_of_its_folder_only(name: str, good: Path, tmp_path: Path, canary: Path) -> None:
    import json

    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    (folder / "sub").mkdir()
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "model.safetensors"):
        shutil.copy(good / "model.safetensors", place)
    named = INDEXES[name]
    if isinstance(named, str):
        named = named.replace("{outside}", str(tmp_path))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": named}}))
    with pytest.raises(DataError) as caught:
        weight_files(folder)
    assert caught.value.exit_code == 4 and caught.value.where == str(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000, "\xff"])
def test_a_damaged_index_is_told(text: str, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="index of the weights is damaged"):
        weight_files(folder)


@pytest.mark.skipif(not hasattr(__import__("os"), "mkfifo"), reason="named pipes are POSIX")
def test_a_pipe_in_place_of_the_weights_does_not_hang(good: Path, tmp_path: Path) -> None:
    import os

    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(DataError, match="no weights"):
        weight_files(folder)


def test_through_the_command_line_it_is_exit_4_without_a_traceback(
    good: Path, toy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], canary: Path
) -> None:
    from iterative_sft_cli.cli import run

    for number, name in enumerate(["a pickle", "shape of 2**62 squared", "length of 2**64 - 1", "overlapping tensors"]):
        folder = tmp_path / f"m{number}"
        shutil.copytree(good, folder)
        (folder / "model.safetensors").write_bytes(make(name, good / "model.safetensors"))
        config = toy(model={"path": str(folder), "use": None}, rounds=1)
        assert run(["train", str(config)]) == 4
        err = capsys.readouterr().err
        assert "Traceback" not in err and str(folder) in err and "damaged" in err
