"""Weights on their way to servers: announced with sizes and hashes, copied once, refused when they are not what was announced."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from iterative_sft_cli.errors import DataError, StorageError
from iterative_sft_cli.generate import vllm_weights
from iterative_sft_cli.generate.vllm_weights import MANIFEST, Announced, Publisher, Stage


def write(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "config.json").write_text("{}")


def nothing() -> None:
    """No tick."""


def seen_elsewhere(weights: Announced) -> Announced:
    return Announced.from_json(json.loads(json.dumps(weights.to_json())))


def test_the_manifest_is_there_last_and_names_every_file(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "shared")

    def watched(folder: Path) -> None:
        write(folder)
        assert not (folder / MANIFEST).exists()

    first, second = publisher.publish(watched), publisher.publish(watched)
    assert first.folder != second.folder and first.run == second.run
    assert json.loads((first.folder / MANIFEST).read_text())["files"] == first.files
    assert sorted(first.files) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in first.folder.iterdir()) == [MANIFEST, "config.json", "model.safetensors"]
    publisher.forget(second)
    assert not first.folder.exists() and second.folder.exists()
    publisher.forget(None)
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("I/O error (os error 28)")])
def test_a_full_disk_is_a_named_error_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    def fails(folder: Path) -> None:
        write(folder)
        raise error

    with pytest.raises(StorageError, match="No space left"):
        Publisher(tmp_path / "shared").publish(fails)
    assert not list((tmp_path / "shared").iterdir())


def test_a_host_copies_once_and_forgets_what_no_server_reads(tmp_path: Path) -> None:
    publisher, other = Publisher(tmp_path / "shared"), Publisher(tmp_path / "another run")
    stage = Stage(tmp_path / "stage")
    (tmp_path / "stage").mkdir()
    theirs = stage.take(other.publish(write), nothing)
    first = publisher.publish(write)
    copy = stage.take(seen_elsewhere(first), nothing)
    assert copy.parent == tmp_path / "stage" and (copy / "model.safetensors").read_bytes() == b"weights" * 1000
    made = (copy / "model.safetensors").stat().st_mtime_ns
    assert stage.take(seen_elsewhere(first), nothing) == copy
    assert (copy / "model.safetensors").stat().st_mtime_ns == made
    second = publisher.publish(write)
    again = stage.take(second, nothing)
    stage.forget(second, keep=True)
    assert sorted((tmp_path / "stage").iterdir()) == sorted([theirs, again])
    stage.forget(second, keep=False)
    assert list((tmp_path / "stage").iterdir()) == [theirs]


def change(kind: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    if kind == "torn":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "missing":
        path.unlink()
    else:
        path.write_bytes(b"Weights" + path.read_bytes()[7:])


@pytest.mark.parametrize(
    ("kind", "words"),
    [("torn", "6999 bytes long, 7000 were announced"), ("missing", "missing"), ("different", "SHA-256 differs")],
)
@pytest.mark.parametrize("staged", [True, False])
def test_what_is_not_what_was_announced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: str, staged: bool
) -> None:
    monkeypatch.setattr(vllm_weights, "SEEN_S", 0.3)
    weights = Publisher(tmp_path / "shared").publish(write)
    stage = Stage(tmp_path / "stage" if staged else None)
    change(kind, weights.folder)
    with pytest.raises(DataError, match="weights") as error:
        stage.take(seen_elsewhere(weights), nothing)
    assert error.value.hint and error.value.exit_code == 4
    if not (staged and kind == "missing"):
        assert words in str(error.value)
    assert not list((tmp_path / "stage").glob("*"))


@pytest.mark.parametrize("kind", ["torn", "missing", "different"])
def test_a_copy_that_changes_is_not_served_again(tmp_path: Path, kind: str) -> None:
    weights = Publisher(tmp_path / "shared").publish(write)
    stage = Stage(tmp_path / "stage")
    change(kind, stage.take(weights, nothing))
    with pytest.raises(DataError, match="not whole") as error:
        stage.take(weights, nothing)
    assert error.value.hint is not None and "stage_to" in error.value.hint


def test_another_host_may_see_files_a_little_later(tmp_path: Path) -> None:
    weights = Publisher(tmp_path / "shared").publish(write)
    hidden = tmp_path / "hidden"
    weights.folder.rename(hidden)
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 2:
            hidden.rename(weights.folder)

    assert Stage(None).take(seen_elsewhere(weights), tick) == weights.folder


def test_a_folder_of_somebody_else_is_announced_as_it_is(tmp_path: Path) -> None:
    """As the hub's cache is laid out: links to files elsewhere; a trainer's state is left out, and nothing is written there."""
    write(tmp_path / "blobs")
    folder = tmp_path / "model"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "masters.safetensors").write_bytes(b"x")
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(tmp_path / "blobs" / name)
    (folder / MANIFEST).write_text('{"something": "else"}')
    weights = Publisher(tmp_path / "shared").announce(folder)
    assert sorted(weights.files) == ["config.json", "model.safetensors"] and weights.folder == folder
    assert Stage(None).take(seen_elsewhere(weights), nothing) == folder
    copy = Stage(tmp_path / "stage").take(weights, nothing)
    assert sorted(path.name for path in copy.iterdir()) == ["config.json", "model.safetensors"]
    assert not any(path.is_symlink() for path in copy.iterdir())


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../b"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    weights = Publisher(tmp_path / "shared").publish(write)
    bad = replace(seen_elsewhere(weights), files={name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(DataError):
        Stage(None).take(bad, nothing)
    with pytest.raises(DataError):
        Stage(tmp_path / "stage").take(bad, nothing)
    assert not (tmp_path / "stage").exists() or not list((tmp_path / "stage").glob("*"))
