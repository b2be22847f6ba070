"""Names that try to lead elsewhere: in run directories that somebody sent, data, configs and command lines. Nothing outside changes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_config import write_toy

from iterative_sft_cli.cli import run as isft
from iterative_sft_cli.console import Console
from iterative_sft_cli.errors import DataError, IsftError
from iterative_sft_cli.experiment import run_experiment
from iterative_sft_cli.rundir import RunDir
from iterative_sft_cli.rundir.integrity import Damage, parse_document, render_document, stamp_bytes

UP = "../../../outside/victim"
ABSOLUTE = "{outside}/victim"
"""Spelled out by `spell`: no test names a file of the machine it runs on, because what it tries may work."""


def spell(text: str, root: Path) -> str:
    return text.replace("{outside}", str(root / "outside"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished toy run of two rounds."""
    folder = tmp_path_factory.mktemp("finished")
    run_experiment(write_toy(folder, {"rounds": 2}), view=Console(io.StringIO()))
    return folder / "run"


@pytest.fixture
def arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`work/` to play in, current; whatever is beside it must be afterwards as it was before."""
    outside, work = tmp_path / "outside", tmp_path / "work"
    (outside / "sub").mkdir(parents=True)
    (outside / "victim").write_text("mine")
    (outside / "victim.jsonl").write_text('{"completion": "mine"}\n')
    (outside / "victim.py").write_text("raise SystemExit('ran')\n")
    (outside / "victim.yaml").write_text("model: mine\n")
    work.mkdir()
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    before = contents(tmp_path, work)
    yield work
    assert contents(tmp_path, work) == before


def contents(root: Path, leave_out: Path) -> dict[str, str]:
    """Hash of every file below `root`, links by where they lead, but for what is in `leave_out`."""
    found = {}
    for folder, names, files in os.walk(root):
        if Path(folder) == leave_out:
            names.clear()
            continue
        for name in [*names, *files]:
            path = Path(folder, name)
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = "folder"
    return found


# --- run directories that somebody sent ---------------------------------------------------------------------------------


def copy(finished: Path, arena: Path) -> Path:
    return Path(shutil.copytree(finished, arena / "a" / "run"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a document and give it a checksum that fits, as an attacker would."""
    content = parse_document(path.read_bytes(), path)
    change(content)
    path.write_bytes(render_document(content))


MANIFEST_NAMES = {
    "up": "../../../../../outside/victim",
    "far up": "../" * 40 + "{outside}/victim",
    "absolute": ABSOLUTE,
    "through a folder": "state/../../../../../../outside/victim",
    "backslashes": "..\\..\\..\\outside\\victim",
    "a drive": "C:\\victim",
    "a NUL": "model.json\0/../x",
    "the folder": ".",
    "the parent": "..",
    "nothing": "",
}


@pytest.mark.parametrize("name", MANIFEST_NAMES)
@pytest.mark.parametrize("how", ["export", "fork", "resume", "verify"])
def test_a_manifest_names_files_of_its_checkpoint_only(name: str, how: str, finished: Path, arena: Path) -> None:
    run = copy(finished, arena)
    checkpoint = run / "checkpoints" / ("0001" if how == "fork" else "0002")
    (checkpoint / "config.json").write_text("{}")
    named = spell(MANIFEST_NAMES[name], arena.parent)
    # what is there already has the right bytes, so that only the name is wrong
    payload = b"mine"

    def change(content: dict[str, Any]) -> None:
        content["files"][named] = stamp_bytes(payload).to_json()
        content["files"]["config.json"] = stamp_bytes(b"{}").to_json()

    rewrite(checkpoint / "MANIFEST.json", change)
    command = {
        "export": ["export", str(run), "--to", "hf", "--out", str(arena / "out"), "--checkpoint", "0002"],
        "fork": ["refilter", str(run), "--round", "2", "--fork", str(arena / "forked")],
        "resume": ["train", str(finished.parent / "toy.yaml"), "rounds=3", "--output-dir", str(run)],
        "verify": ["verify", str(run)],
    }[how]
    code = isft(command)
    # a resumed run puts the checkpoint into quarantine and makes the round again
    assert code == (0 if how == "resume" else 4)
    assert not (arena / "out").exists() and not (arena / "forked").exists()


SEAL_NAMES = [
    "../../../../../outside/victim",
    "../../../../../outside/victim.jsonl",
    ABSOLUTE,
    "../0002/generated-00000.jsonl",
    "generated-00000.jsonl",
    "..\\x.jsonl",
    "",
    ".",
]


@pytest.mark.parametrize("named", SEAL_NAMES)
def test_a_seal_vouches_for_its_own_shard_only(named: str, finished: Path, arena: Path) -> None:
    run = copy(finished, arena)
    rewrite(
        run / "rounds" / "0002" / "generated-00000.seal.json",
        lambda content: content.update(file=spell(named, arena.parent)),
    )
    assert isft(["samples", str(run), "--round", "2"]) == (0 if named == "generated-00000.jsonl" else 4)


@pytest.mark.parametrize("named", SEAL_NAMES)
def test_giving_up_a_shard_removes_that_shard_only(named: str, finished: Path, arena: Path) -> None:
    run = copy(finished, arena)
    seal = run / "rounds" / "0001" / "train.seal.json"
    rewrite(seal, lambda content: content.update(file=spell(named, arena.parent)))
    from iterative_sft_cli.rundir.fs import FileSystem
    from iterative_sft_cli.rundir.quarantine import Quarantine
    from iterative_sft_cli.rundir.seal import Shards

    fs = FileSystem()
    shards = sorted(run.rglob("*.jsonl"))
    with pytest.raises(Damage, match="the seal of another shard"):
        Shards(run, fs, Quarantine(run, fs)).remove(1, "train")
    assert sorted(run.rglob("*.jsonl")) == shards


NAMES = {
    "up": "../x",
    "far up": UP,
    "absolute": ABSOLUTE,
    "a folder": "a/b",
    "backslash": "a\\b",
    "the parent": "..",
    "the folder": ".",
    "nothing": "",
    "a drive": "C:x",
    "a NUL": "x\0y",
    "a newline": "x\n",
    "escaped": "%2e%2e%2fx",
    "wide dots": "\uff0e\uff0e/x",
    "a slash look-alike": "..\u2215x",
    "300 letters": "a" * 300,
    "a hidden file": ".x",
    "an option": "-rf",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_shard_has_a_plain_name(name: str, arena: Path) -> None:
    with RunDir.create(arena / "run", config_source=b"", resolved={}, environment={}) as run:
        for call in (
            lambda: run.shards.seal(1, NAMES[name], [{"a": 1}], {}),
            lambda: run.shards.read(1, NAMES[name]),
            lambda: run.shards.remove(1, NAMES[name]),
            lambda: run.shards.discard(1, NAMES[name], "x"),
        ):
            with pytest.raises(ValueError, match="not a shard name"):
                call()
    assert not (arena / "run" / "rounds" / "0001").exists() or not list((arena / "run" / "rounds" / "0001").iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_has_a_number_for_a_name(name: str, finished: Path, arena: Path, capsys: Any) -> None:
    with RunDir.create(arena / "run", config_source=b"", resolved={}, environment={}) as run:
        with pytest.raises(ValueError, match="not a checkpoint key"):
            run.checkpoints.commit(spell(NAMES[name], arena.parent), lambda folder: None, {})
        with pytest.raises(ValueError, match="not a checkpoint key"):
            run.checkpoints.verified(spell(NAMES[name], arena.parent))
    code = isft(
        [
            "export",
            str(finished),
            "--to",
            "hf",
            "--checkpoint",
            spell(NAMES[name], arena.parent),
            "--out",
            str(arena / "out"),
        ]
    )
    assert code == 2 and not (arena / "out").exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("nothing", "an option", "a NUL")])
@pytest.mark.parametrize("command", ["init", "docs", "filters show", "export --to", "samples", "why", "report"])
def test_a_name_on_the_command_line_leads_nowhere(
    name: str, command: str, finished: Path, arena: Path, capsys: Any
) -> None:
    given = spell(NAMES[name], arena.parent)
    argv = {
        "init": ["init", given],
        "docs": ["docs", given],
        "filters show": ["filters", "show", given],
        "export --to": ["export", str(finished), "--to", given],
        "samples": ["samples", str(finished), "--prompt", given, "--json"],
        "why": ["why", str(finished), given],
        "report": ["report", str(arena / "no" / given.replace("\0", "")), "--out", str(arena / "page.html")],
    }[command]
    code = isft(argv)
    out, err = capsys.readouterr()
    assert code in ((0,) if command == "samples" else (2, 4)), err
    assert "Traceback" not in err and "mine" not in out + err
    assert [path for path in arena.rglob("*")] == []


@pytest.mark.parametrize("name", ["up", "absolute", "a newline", "the parent", "the folder", "backslash"])
def test_a_repository_of_the_hub_has_a_plain_name(name: str, finished: Path, arena: Path, capsys: Any) -> None:
    code = isft(["export", str(finished), "--to", "hub", "--repo", f"me/{NAMES[name]}"])
    assert code in (2, 4) and "Traceback" not in capsys.readouterr().err


# --- links ----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
@pytest.mark.parametrize("what", ["checkpoints/0001", "checkpoints/0002", "rounds/0001", "quarantine", "cache"])
def test_what_a_link_leads_to_is_not_removed(what: str, finished: Path, arena: Path) -> None:
    """Pruning, repairing and going on treat a link as a link."""
    run = copy(finished, arena)
    elsewhere = arena.parent / "elsewhere"
    place = run / what
    if place.exists():
        shutil.copytree(place, elsewhere)
        shutil.rmtree(place)
    else:
        elsewhere.mkdir()
        (elsewhere / "file").write_text("mine")
    place.symlink_to(elsewhere)
    before = contents(elsewhere, arena)
    isft(["train", str(finished.parent / "toy.yaml"), "rounds=4", "--output-dir", str(run)])
    assert before.items() <= contents(elsewhere, arena).items()
    if place.is_symlink():
        place.unlink()
    shutil.rmtree(elsewhere)


# --- data and configs -----------------------------------------------------------------------------------------------------

IDS = [
    UP,
    ABSOLUTE,
    "..",
    ".",
    "..\\..\\x",
    "a\0b",
    "con",
    "~root",
    "$(touch victim)",
    "`touch victim`",
    "; touch victim",
    "%s%n%p",
    "${HOME}",
    "file://{outside}/victim",
    "a\nb",
    "-rf",
    "a" * 400,
]


def test_prompt_ids_are_never_paths(toy: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    config = toy(rounds=1, output_dir="deep/er/run", prompts={"id": "id", "per_round": "all"}, eval=None)
    (tmp_path / "outside").mkdir()
    ids = [spell(one, tmp_path) for one in IDS]
    rows = [{"id": one, "question": f"{i}+1", "answer": str(i + 1)} for i, one in enumerate(ids)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "deep" / "er" / "run"
    run.parent.mkdir(parents=True)
    before = contents(tmp_path, tmp_path / "deep")
    assert isft(["train", str(config)]) == 0
    for argv in (
        ["samples", str(run), "--json"],
        ["show", str(run)],
        ["report", str(run)],
        ["verify", str(run)],
        ["export", str(run), "--to", "sft-jsonl"],
        *(["why", str(run), f"1-{one}-0"] for one in ids if "\0" not in one),
    ):
        assert isft(argv) == 0, argv
    capsys.readouterr()
    assert contents(tmp_path, tmp_path / "deep") == before
    files = {str(path.relative_to(run)) for path in run.rglob("*")}
    assert not any(one in name for name in files for one in ("victim", "root", "touch"))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("nothing", "a NUL", "a newline")])
def test_a_filters_name_is_no_path(name: str, toy: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "f.py").write_text("def keep(sample):\n    return True\n")
    entry = {"use": "f.py:keep", "name": spell(NAMES[name], tmp_path), "workers": 1}
    config = toy(rounds=1, output_dir="deep/er/run", filters=[entry], eval=None, prompts={"limit": 2})
    (tmp_path / "deep" / "er").mkdir(parents=True)
    before = contents(tmp_path, tmp_path / "deep")
    code = isft(["train", str(config)])
    capsys.readouterr()
    assert code in (0, 2)
    assert contents(tmp_path, tmp_path / "deep") == before
    if code == 0:
        run = tmp_path / "deep" / "er" / "run"
        assert [path.parent.name for path in run.rglob("*-*.jsonl") if "rounds" not in path.parts] == ["cache"]


@pytest.mark.parametrize(
    "value", ["../../../x", "/abs/olute", "..", ".", "~", "~root/x", "a/../../b", "\\\\host\\share", "x/..", "-x"]
)
def test_placeholders_of_output_dir_stay_in_their_place(value: str, tmp_path: Path, monkeypatch: Any) -> None:
    from iterative_sft_cli.config.rules import fill_placeholders

    filled, wrong = fill_placeholders("runs/{model.path}/{seed}", {"model": {"path": value}, "seed": 3})
    assert not wrong
    monkeypatch.chdir(tmp_path)
    place = Path(filled).expanduser().resolve()
    assert place.parent.parent == tmp_path / "runs" and place.name == "3"


@pytest.mark.parametrize("key", ["model", "generate.from", "prompts.dataset", "filters"])
@pytest.mark.parametrize("value", ["../outside/sub", "../outside/victim", ABSOLUTE, "..\\outside"])
def test_models_and_data_are_read_where_they_are_named_and_never_written(
    key: str, value: str, toy: Callable[..., Path], arena: Path, capsys: Any
) -> None:
    """A path in one's own config may lead anywhere; what is wrong there is told, and nothing is made or run there."""
    value = spell(value, arena.parent)
    changes: dict[str, Any] = {
        "model": {"model": {"path": value, "use": None}},
        "generate.from": {"generate": {"from": value}},
        "prompts.dataset": {"prompts": {"path": None, "dataset": {"id": value}}},
        "filters": {"filters": [f"{value}.py:keep"]},
    }[key]
    config = toy(rounds=1, output_dir=str(arena / "run"), **changes)
    shutil.move(config, arena / "toy.yaml")
    for name in ("prompts.jsonl", "dev.jsonl"):
        shutil.move(config.with_name(name), arena / name)
    code = isft(["train", str(arena / "toy.yaml")])
    err = capsys.readouterr().err
    assert code in (2, 4, 5), err
    assert "Traceback" not in err and "mine" not in err


def test_there_are_more_than_forty_five() -> None:
    cases = len(MANIFEST_NAMES) * 4 + len(SEAL_NAMES) * 2 + len(NAMES) * 9 + len(IDS) + 10 + 16
    assert cases > 200


def test_an_error_is_one_of_ours() -> None:
    assert issubclass(DataError, IsftError)
