"""The shipped experiments with SmolLM2-135M-Instruct itself: minutes each, run by scripts/test-slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = os.environ.get("ISFT_TEST_MODEL", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODEL, reason="ISFT_TEST_MODEL names no model folder")]


def isft(*argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "iterative_sft_cli", *argv], capture_output=True, text=True, cwd=ROOT, env=env
    )


def stats(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def test_the_quickstart_at_least_doubles_held_out_accuracy(tmp_path):
    out = isft("train", "configs/quickstart.yaml", f"model.path={MODEL}", f"output_dir={tmp_path / 'run'}")
    assert out.returncode == 0, out.stderr
    rows = stats(tmp_path / "run")
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["eval/pass@1"] >= 2 * rows[0]["eval/pass@1"]
    assert "estimate: about" in out.stderr and "next: isft" in out.stderr
    again = isft("train", "configs/quickstart.yaml", f"model.path={MODEL}", f"output_dir={tmp_path / 'run'}")
    assert again.returncode == 0 and "nothing to do" in again.stderr


def test_gsm8k_runs_a_round_on_a_local_file(tmp_path):
    pytest.importorskip("math_verify")
    rows = [
        {
            "question": f"Tom has {a} apples and buys {b} more. How many has he now?",
            "answer": f"{a} + {b} = {a + b}\n#### {a + b}",
        }
        for a in range(2, 6)
        for b in range(1, 5)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = isft(
        "train",
        "configs/gsm8k.yaml",
        "--limit",
        "16",
        f"model.path={MODEL}",
        f"prompts.path={tmp_path / 'train.jsonl'}",
        f"output_dir={tmp_path / 'run'}",
        "generate.max_new_tokens=96",
    )
    assert out.returncode == 0, out.stderr
    [row] = stats(tmp_path / "run-limit16")
    assert row["generate/num_prompts"] == 16 and row["filters/math_verify/entered"] > 0


def test_reasoning_gym_runs_on_chain_sum(tmp_path):
    pytest.importorskip("reasoning_gym")
    out = isft(
        "train", "configs/reasoning-gym.yaml", "--limit", "16", f"model.path={MODEL}", f"output_dir={tmp_path / 'run'}"
    )
    assert out.returncode == 0, out.stderr
    rows = stats(tmp_path / "run-limit16")
    assert rows[-1]["filters/num_accepted"] > 0
