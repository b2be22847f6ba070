"""What a shard's making leaves beside its samples: what was paid for, and a word on limits that cannot be reached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from test_loop import rows, run

BACKEND = """
import toy_backend
from iterative_sft_cli.generate.openai import Usage


def make(config):
    toy = toy_backend.make(config)
    toy.engine.usage = Usage(num_requests=5, completion_tokens=70, cost=0.25)
    return toy
"""


def test_what_a_server_counted_stands_in_the_telemetry(toy: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "backend.py").write_text(BACKEND)
    run(toy(rounds=1, model={"use": f"{tmp_path / 'backend.py'}:make"}))
    found = [row for row in rows(tmp_path / "run" / "telemetry.jsonl") if row["event"] == "usage"]
    assert [row["shard"] for row in found] == ["eval-00000", "generated-00000", "eval-00000"]
    assert (found[0]["num_requests"], found[0]["completion_tokens"], found[0]["cost"]) == (5, 70, 0.25)


def test_more_new_tokens_than_the_context_holds_are_told_once(toy: Callable[..., Path], tmp_path: Path) -> None:
    _, said = run(toy(rounds=2, generate={"max_new_tokens": 600}, train={"max_length": 512}))
    assert said.count("max_new_tokens 600 is beyond the model's context of 512 tokens") == 1
    _, said = run(toy(rounds=1, output_dir="other", generate={"max_new_tokens": 64}))
    assert "beyond the model's context" not in said
