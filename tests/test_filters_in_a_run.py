"""Filters in a whole run: loaded once, paid for once, and nothing of them is left when it ends."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iterative_sft_cli.cli import run as isft
from iterative_sft_cli.console import Console
from iterative_sft_cli.experiment import run_experiment
from iterative_sft_cli.filters.cache import FOLDER
from iterative_sft_cli.rundir.seal import Shards

GRADER = """
import os
from iterative_sft_cli.types import Verdict

def note(log, text):
    with open(log, "a") as file:
        file.write(f"{text} {os.getpid()}\\n")

class Grader:
    def __init__(self, log: str, word: str = "The", min_chars: int = 1):
        self.log, self.word, self.min_chars = log, word, min_chars
    def setup(self):
        note(self.log, "setup")
    def __call__(self, sample):
        note(self.log, f"call:{sample.sample_id}")
        return Verdict(self.word in sample.completion and len(sample.completion) >= self.min_chars, 0.5)

def counts(sample, log: str):
    note(log, f"call:{sample.sample_id}")
    return Verdict(True, len(sample.completion) / 100)
"""


@pytest.fixture
def grader(toy: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A toy config with Grader in its filters, one worker; what it does is in `log`."""
    (tmp_path / "grader.py").write_text(GRADER)

    def make(args: dict[str, Any] | None = None, **changes: Any) -> Path:
        entry = {
            "use": "grader.py:Grader",
            "args": {"log": str(tmp_path / "log"), **(args or {})},
            "workers": 1,
            "name": "g",
        }
        return toy(**{"filters": ["finished", "numeric_answer", entry, "dedup"], **changes})

    return make


def train(config: Path, **options: Any) -> None:
    run_experiment(config, view=Console(io.StringIO()), **options)


def log(tmp_path: Path) -> Counter[str]:
    """How often each thing was noted; the process ids stand under `pids`."""
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    return Counter(what.split(":")[0] for what, _ in lines) + Counter({"pids": len({pid for _, pid in lines})})


def test_a_class_is_loaded_once_a_run_and_serves_rounds_and_evaluations(
    grader: Callable[..., Path], tmp_path: Path
) -> None:
    train(grader(rounds=3))
    noted = log(tmp_path)
    assert noted["setup"] == 1 and noted["pids"] == 1
    # every round's answers that the filters before it kept, and the evaluations'
    assert noted["call"] > 48
    pid = int((tmp_path / "log").read_text().split()[-1])
    assert not Path(f"/proc/{pid}").exists()


def test_a_schedule_loads_it_anew_when_its_arguments_change(grader: Callable[..., Path], tmp_path: Path) -> None:
    train(grader({"min_chars": {"by_round": [1, 1, 2]}}, rounds=3))
    assert log(tmp_path)["setup"] == 2


def stop_at_verdicts(patch: pytest.MonkeyPatch) -> None:
    """The process ends when the first verdicts are about to be sealed: all of them are made, none is stored."""
    seal = Shards.seal

    def stop(self: Shards, round_index: int, name: str, *more: Any, **options: Any) -> None:
        if name.startswith("verdicts"):
            raise KeyboardInterrupt
        seal(self, round_index, name, *more, **options)

    patch.setattr(Shards, "seal", stop)


def test_a_resumed_run_pays_once(grader: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = grader(rounds=1, eval=None)
    with monkeypatch.context() as patch:
        stop_at_verdicts(patch)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    before = log(tmp_path)["call"]
    assert before > 5
    train(config)
    noted = log(tmp_path)
    assert noted["call"] == before
    calls = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines() if line.startswith("call")]
    assert len(set(calls)) == len(calls)


def test_an_edited_plugin_pays_again(
    grader: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = grader(rounds=1, eval=None)
    with monkeypatch.context() as patch:
        stop_at_verdicts(patch)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    before = log(tmp_path)["call"]
    code = tmp_path / "grader.py"
    code.write_text(code.read_text() + "# mended\n")
    os.utime(code)
    train(config, allow_change=["filters"])
    assert log(tmp_path)["call"] == 2 * before


def test_a_refiltered_run_pays_once(
    grader: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_file = str(tmp_path / "log")
    entry = {"use": "grader.py:counts", "args": {"log": log_file}, "workers": 1}
    threshold = {"threshold": {"by": "counts", "min": 0.0}}
    train(grader(rounds=1, eval=None, filters=["finished", entry, threshold]))
    before = log(tmp_path)["call"]
    assert before == 48
    assert isft(["refilter", str(tmp_path / "run"), "filters[2].threshold.min=0.175", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lost"] > 0
    assert log(tmp_path)["call"] == before
    assert list((tmp_path / "run" / FOLDER).iterdir())


def test_without_its_cache_a_run_is_the_same(grader: Callable[..., Path], tmp_path: Path) -> None:
    config = grader(rounds=2)
    train(config)
    for file in (tmp_path / "run" / FOLDER).iterdir():
        file.write_bytes(b"no cache\n" * 9)
    train(grader(rounds=3), allow_change=[])
    train(grader(rounds=3, output_dir="whole"))
    for name in ("rounds/0003/verdicts-00000.jsonl", "stats.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("damage", ["none", "cut", "gone"])
def test_dedups_index_survives_a_resume(toy: Callable[..., Path], tmp_path: Path, damage: str) -> None:
    pytest.importorskip("datasketch")
    entry = {"dedup": {"scope": "run", "level": "near", "similarity": 0.99}}
    changes: dict[str, Any] = {"filters": ["finished", entry], "eval": None, "guards": {"on_empty": "skip"}}
    train(toy(rounds=2, **changes))
    [index] = (tmp_path / "run" / FOLDER).glob("dedup-near*.index")
    if damage != "none":
        data = index.read_bytes()
        index.unlink()
        if damage == "cut":
            index.write_bytes(data[: len(data) // 2])
    train(toy(rounds=3, **changes))
    train(toy(rounds=3, output_dir="whole", **changes))
    for round_index in (1, 2, 3):
        name = f"rounds/{round_index:04d}/verdicts-round.jsonl"
        said = (tmp_path / "run" / name).read_bytes()
        assert said == (tmp_path / "whole" / name).read_bytes()
    assert b"duplicate" in said
    assert index.read_bytes() == (tmp_path / "whole" / FOLDER / index.name).read_bytes()
