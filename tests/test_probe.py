"""`isft plan --probe`: what it predicts is what a run then takes, and it leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iterative_sft_cli.cli import run as isft
from iterative_sft_cli.config import load_config
from iterative_sft_cli.probe import probe_overrides, rates_of

ROOT = Path(__file__).resolve().parent.parent


def probed(path, capsys):
    capsys.readouterr()
    code = isft(["plan", str(path), "--probe", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)["probe"]


def folder_bytes(run):
    return sum(path.stat().st_size for path in run.rglob("*") if path.is_file())


def test_time_and_disk_are_those_of_the_run_that_follows(toy, tmp_path, capsys, monkeypatch):
    # the toy sleeps in every step, so its time does not depend on what else runs here
    monkeypatch.setenv("TOY_DELAY_S", "0.03")
    config = toy(rounds=4, prompts={"limit": 12, "per_round": 6}, train={"data": "accumulate"})
    apart = []
    for attempt in range(3):  # a machine that is busy with something else in one of the two says nothing of the other
        run = tmp_path / f"run-{attempt}"
        found = probed(config, capsys)
        assert not (tmp_path / "run").exists()
        start = time.monotonic()
        command = [sys.executable, "-m", "iterative_sft_cli", "train", str(config), f"output_dir={run}"]
        subprocess.run(command, check=True, cwd=ROOT, env=dict(os.environ), capture_output=True)
        apart.append(found["seconds"] / (time.monotonic() - start) - 1)
        if abs(apart[-1]) < 0.25:
            break
    assert abs(apart[-1]) < 0.25, (found, apart)
    parts = found["disk_parts"]
    real = folder_bytes(run / "rounds")
    assert abs((parts["samples"] + parts["evals"]) / real - 1) < 0.25, (parts, real)
    assert found["peak_bytes"] > 20_000_000 and found["trained"] and len(found["accept_rates"]) == 4


def test_its_text(toy, capsys):
    assert isft(["plan", str(toy()), "--probe"]) == 0
    out = capsys.readouterr().out
    for word in ("round 3:", "time:   about", "memory: ", "while a checkpoint is saved", "probe:  "):
        assert word in out, word


def test_the_short_run_is_short_and_stops_for_nothing(toy, tmp_path):
    config = load_config(
        toy(rounds=9, generate={"samples_per_prompt": 64, "max_new_tokens": 4}, prompts={"per_round": "all"}), []
    )
    short = config.with_overrides(probe_overrides(config.config, tmp_path / "x")).config
    assert (short.rounds, short.prompts.limit, short.prompts.per_round, short.tracking) == (2, 16, 8, [])
    assert short.guards.on_empty == "skip" and short.guards.stop_if is None
    long = load_config(toy(rounds=1, generate={"samples_per_prompt": 8, "max_new_tokens": 65536}), [])
    assert long.with_overrides(probe_overrides(long.config, tmp_path / "x")).config.prompts.per_round == 4


def test_nothing_accepted_is_said(toy, capsys):
    assert isft(["plan", str(toy(filters=[{"length": {"max": 1}}])), "--probe"]) == 0
    assert "the time for training is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mine", "code", "said"),
    [
        ("def right(sample):\n    raise RuntimeError('grader is down')\n", 5, "grader is down"),
        ("def wrong(x):\n    pass\n", 2, "right"),
    ],
)
def test_what_stops_a_run_stops_the_probe_with_the_same_code(toy, tmp_path, capsys, mine, code, said):
    (tmp_path / "mine.py").write_text(mine)
    assert isft(["plan", str(toy(filters=["mine.py:right"])), "--probe"]) == code
    assert said in capsys.readouterr().err


def test_rates_are_sums_over_what_was_measured():
    telemetry = [
        {"event": "eval", "round": 0, "seconds": 4.0},
        {"event": "generate", "round": 1, "seconds": 10.0},
        {"event": "filters", "round": 1, "seconds": 2.0},
        {"event": "train", "round": 1, "seconds": 20.0, "num_tokens": 1000},
        {"event": "save", "key": "0001", "seconds": 1.0},
        {"event": "generate", "round": 2, "seconds": 12.0},
    ]
    measured = {
        "telemetry": telemetry,
        "stats": [{"round": 0}, {"round": 1, "generate/num_samples": 100, "filters/num_accepted": 10}],
        "last": {"num_samples": 100, "num_accepted": 20, "num_prompts": 25},
        "start_s": 3.0,
        "phases_s": 55.0,
        "eval_samples": 40,
        "first": {"num_rows": 10, "row_tokens": 500, "num_steps": 4},
    }
    rates = rates_of(measured)
    assert (rates.sample_s, rates.eval_sample_s, rates.token_s, rates.save_s) == (24 / 200, 0.1, 0.02, 1.0)
    assert (rates.samples_per_prompt, rates.accept_rate, rates.row_tokens, rates.other_s) == (4.0, 0.2, 50.0, 3.0)
