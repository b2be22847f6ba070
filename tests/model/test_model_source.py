from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from huggingface_hub import errors

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.model_source import find_model, main_dtype
from iterative_sft_cli.tensor_files import read_headers, weight_files


def section(path: str | None = None, **settings: Any) -> SimpleNamespace:
    blank = dict(path=path, revision=None, trust_remote_code=False, init=None, tokenizer=None)
    return SimpleNamespace(**{**blank, **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def test_a_folder_is_found_beside_the_config_or_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert find_model(section("tiny"), folder.parent).folder == folder
    monkeypatch.chdir(folder.parent)
    assert find_model(section("./tiny"), tmp_path).folder == folder
    assert find_model(section(str(folder)), tmp_path).revision is None


def test_headers_tell_dtype_and_size(folder: Path) -> None:
    headers = read_headers(weight_files(folder))
    assert main_dtype(headers) == "bfloat16"
    assert sum(header.numel for header in headers.values()) == tiny.tiny_llama().num_parameters()


def copy(folder: Path, to: Path, leave_out: str = "") -> Path:
    to.mkdir()
    for path in folder.iterdir():
        if path.name != leave_out:
            (to / path.name).write_bytes(path.read_bytes())
    return to


def test_broken_folders_are_named(folder: Path, tmp_path: Path) -> None:
    def message(broken: Path) -> str:
        with pytest.raises(DataError) as caught:
            read_headers(weight_files(find_model(section(str(broken)), tmp_path).folder or tmp_path))
        return str(caught.value)

    assert "no config.json" in message(copy(folder, tmp_path / "a", "config.json"))
    assert "no weights" in message(copy(folder, tmp_path / "b", "model.safetensors"))
    pickle = copy(folder, tmp_path / "c", "model.safetensors")
    (pickle / "pytorch_model.bin").write_bytes(b"x")
    assert "are a pickle (pytorch_model.bin), which is never loaded" in message(pickle)
    cut = copy(folder, tmp_path / "d")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-10])
    assert "damaged" in message(cut)
    (cut / "model.safetensors").write_bytes(data[:100])
    assert "damaged" in message(cut)
    (cut / "model.safetensors").write_bytes(b"not a safetensors file")
    assert "damaged" in message(cut)
    sharded = copy(folder, tmp_path / "e", "model.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))
    assert "a weights file is missing" in message(sharded)
    (sharded / "model.safetensors.index.json").write_text("{")
    assert "index of the weights is damaged" in message(sharded)
    adapter = tmp_path / "f"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in message(adapter)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./tni", "no such folder"),
        ("/no/such/model", "no such folder"),
        ("runs/x/checkpoints/0001", "no such folder"),
        ("none.gguf", "no such file"),
        ("two words/model", "neither a folder here nor a hub id"),
        ("org/model", "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_missing_model_is_a_data_error(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=message) as caught:
        find_model(section(name), tmp_path)
    assert caught.value.exit_code == 4
    assert name in str(caught.value)


def test_the_nearest_name_is_offered(folder: Path) -> None:
    with pytest.raises(DataError, match="did you mean .*tiny"):
        find_model(section("./tinny"), folder.parent)


def hub_error(kind: type[Exception], status: int, message: str) -> Exception:
    response = SimpleNamespace(headers={}, status_code=status, request=None)
    return kind(message, response=response)  # type: ignore[call-arg]


GATED_TEXT = "Access to model org/model is restricted and you are not in the authorized list."
FINE_GRAINED = "Please enable access to public gated repositories in your fine-grained token settings."


@pytest.mark.parametrize(
    ("error", "token", "expected"),
    [
        (hub_error(errors.GatedRepoError, 401, "Cannot access gated repo"), None, "gated and there is no token"),
        (hub_error(errors.GatedRepoError, 403, GATED_TEXT), "t", "licence was not accepted"),
        (hub_error(errors.GatedRepoError, 403, FINE_GRAINED), "t", "token has no right to read gated models"),
        (hub_error(errors.RepositoryNotFoundError, 404, "x"), None, "nor a model on the hub.*\n?.*set HF_TOKEN"),
        (hub_error(errors.RepositoryNotFoundError, 404, "x"), "t", "the token must have the right"),
        (hub_error(errors.RevisionNotFoundError, 404, "x"), None, "no revision 'abc'"),
        (
            hub_error(errors.HfHubHTTPError, 401, "Invalid credentials in Authorization header"),
            "t",
            "refuses the token",
        ),
        (hub_error(errors.HfHubHTTPError, 500, "oh no"), None, "the hub answered: oh no"),
        (errors.LocalEntryNotFoundError("x"), None, "the hub cannot be reached"),
        (OSError("disk full"), None, "cannot be fetched: disk full"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(
    error: Exception, token: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        assert kwargs["revision"] == "abc"
        raise error

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with pytest.raises(DataError, match=expected) as caught:
        find_model(section("org/model", revision="abc"), tmp_path)
    if "licence" in expected or token is None and "gated" in expected:
        assert "https://huggingface.co/org/model" in str(caught.value)


COMMIT = "0123456789" * 4


def test_a_hub_model_is_known_by_its_commit_and_runs_no_code_unless_pinned(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = copy(folder, tmp_path / COMMIT)
    asked: list[Any] = []

    def download(name: str, **kwargs: Any) -> str:
        asked.append(kwargs["allow_patterns"])
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = find_model(section("org/model"), tmp_path)
    assert (found.folder, found.revision, found.name) == (snapshot, COMMIT, "org/model")
    with pytest.raises(ConfigError, match=f"pinned commit(.|\n)*revision: {COMMIT}"):
        find_model(section("org/model", trust_remote_code=True), tmp_path)
    with pytest.raises(ConfigError, match="pinned commit"):
        find_model(section("org/model", trust_remote_code=True, revision="main"), tmp_path)
    assert find_model(section("org/model", trust_remote_code=True, revision=COMMIT), tmp_path).folder == snapshot
    assert "*.py" not in asked[0] and "*.py" in asked[-1]
    assert not any("bin" in pattern for pattern in asked[-1])


def test_init_needs_a_tokenizer_and_a_model_a_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without a tokenizer"):
        find_model(section(init={"model_type": "llama"}), tmp_path)
    with pytest.raises(ConfigError, match="no model is named"):
        find_model(section(), tmp_path)
    found = find_model(section(init={"model_type": "llama"}, tokenizer=str(folder)), tmp_path)
    assert found.tokenizer == folder and found.folder is None


def test_finding_a_model_imports_no_torch() -> None:
    code = "import sys, iterative_sft_cli.model_source; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
