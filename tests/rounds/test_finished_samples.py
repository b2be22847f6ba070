"""Samples of an engine that would not make them again: what was finished before a crash is kept, nothing is asked twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_loop import rows, run

BACKEND = """
import json
import os
from pathlib import Path

import toy_backend

ASKED = Path(__file__).with_name("asked.jsonl")


class Engine(toy_backend.ToyEngine):
    deterministic = False

    def generate(self, requests, decoding, plan):
        left = int(os.environ.get("ENDS_AFTER", "1000000"))
        with open(ASKED, "a") as file:
            asked = [[r.prompt_id, i] for r in requests for i in r.sample_indices]
            file.write(json.dumps([type(self.learner).__name__, self.weights["digest"], asked]) + chr(10))
        for completion in super().generate(requests, decoding, plan):
            if left <= 0:
                os.environ["ENDS_AFTER"] = "1000000"
                raise KeyboardInterrupt("power cut")
            left -= 1
            yield completion


def make(config):
    toy = toy_backend.make(config)
    toy.engine = Engine(toy.learner)
    return toy
"""


@pytest.fixture
def config(toy: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    (tmp_path / "backend.py").write_text(BACKEND)

    def make(**changes: Any) -> Path:
        return toy(**{"rounds": 1, "model": {"use": f"{tmp_path / 'backend.py'}:make"}, "eval": None, **changes})

    return make


def asked(tmp_path: Path) -> list[list[list[Any]]]:
    found = [json.loads(line)[2] for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    (tmp_path / "asked.jsonl").unlink()
    return found


def test_a_resumed_shard_asks_only_for_what_is_missing(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config(output_dir="whole", generate={"keep_logprobs": True}))
    (everything,) = asked(tmp_path)
    monkeypatch.setenv("ENDS_AFTER", "30")
    with pytest.raises(KeyboardInterrupt, match="power cut"):
        run(config(generate={"keep_logprobs": True}))
    run(config(generate={"keep_logprobs": True}))
    first, second = asked(tmp_path)
    assert first == everything and second == everything[30:] and len(everything) == 48
    for name in ("rounds/0001/generated-00000.jsonl", "stats.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "run/rounds/0001").glob("*.journal"))
    kept = [row for row in rows(tmp_path / "run" / "telemetry.jsonl") if row["event"] == "journal"]
    assert [row["num"] for row in kept] == [30]


def test_a_shard_that_was_finished_but_not_sealed_asks_for_nothing(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iterative_sft_cli.rundir.seal import Shards

    seal = Shards.seal

    def cut(self: Any, round_index: int, name: str, *rest: Any) -> None:
        if name.startswith("generated"):
            monkeypatch.setattr(Shards, "seal", seal)
            raise KeyboardInterrupt("power cut")
        seal(self, round_index, name, *rest)

    monkeypatch.setattr(Shards, "seal", cut)
    with pytest.raises(KeyboardInterrupt, match="power cut"):
        run(config())
    run(config())
    assert len(asked(tmp_path)) == 1


@pytest.mark.parametrize("changes", [{"generate": {"temperature": 0.5}}, {"deterministic": True}])
def test_samples_of_other_work_are_not_taken(
    config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setenv("ENDS_AFTER", "30")
    with pytest.raises(KeyboardInterrupt, match="power cut"):
        run(config(**changes))
    run(config(), allow_change=["generate", "deterministic"])
    first, second = asked(tmp_path)
    assert first == second
