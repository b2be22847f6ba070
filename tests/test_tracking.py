"""Trackers get every round's numbers and samples; one that fails costs the run nothing."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from test_loop import rows, run

from iterative_sft_cli.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def test_tensorboard_holds_every_rounds_numbers_and_samples(toy, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(toy(rounds=2, tracking=["tensorboard"]))
    events = EventAccumulator(str(next((tmp_path / "run" / "tracking").rglob("events*")).parent))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert "eval/pass@1" in scalars and "filters/numeric_answer/dropped" in scalars
    assert [event.step for event in events.Scalars("eval/pass@1")] == [0, 1, 2]
    texts = [name for name in events.Tags()["tensors"] if name.startswith("samples")]
    assert texts and b"accepted:" in events.Tensors(texts[0])[0].tensor_proto.string_val[0]


def test_trackio_holds_every_round_and_needs_no_network(toy, tmp_path):
    pytest.importorskip("trackio")
    config = toy(rounds=2, tracking=["trackio"])
    # the library reads its folder when it is imported: a process of its own
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "iterative_sft_cli", "train", str(config)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "" and "warning: trackio" not in done.stderr, done.stderr
    [file] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        stored = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by step")]
    stats = rows(tmp_path / "run" / "stats.jsonl")
    for row, values in zip(stats, stored, strict=True):
        assert values["eval/pass@1"] == row["eval/pass@1"]
        assert values.get("filters/numeric_answer/dropped") == row.get("filters/numeric_answer/dropped")
    assert "accepted: " in stored[1]["samples"] and "rejected: " in stored[2]["samples"]


def test_wandb_keeps_everything_on_this_machine_in_its_offline_mode(toy, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    # a loaded machine may take long to start the library's helper process
    settings = {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "_SERVICE_WAIT": "300"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    outcome, screen = run(toy(rounds=1, tracking=["wandb"]))
    assert outcome.code == 0 and "warning: wandb" not in screen
    [file] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    data = file.read_bytes()
    for text in (b"filters/numeric_answer/dropped", b"eval/pass@1", b"accepted: ", b"rejected: "):
        assert text in data, text


def test_wandb_without_an_account_costs_a_line(toy, tmp_path):
    pytest.importorskip("wandb")
    # the library keeps what it was told for as long as its process lives: one of its own
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"WANDB_DIR": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path), "NETRC": os.devnull}
    command = [sys.executable, "-m", "iterative_sft_cli", "train", str(toy(rounds=1, tracking=["wandb"]))]
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("warning: wandb did not start: ") == 1 and "wandb login" in done.stderr


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_fails_costs_a_line(toy, tmp_path, monkeypatch, where):
    pytest.importorskip("tensorboard")
    from accelerate import tracking

    class Failing:
        requires_logging_directory = False

        def __init__(self, name):
            self.seen = []

    def fail(self, *values, **options):
        raise OSError("the server\nis gone")

    for name in ("start", "log", "finish"):
        setattr(Failing, name, fail if name == where else lambda self, *values, **options: None)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Failing)
    outcome, screen = run(toy(rounds=1, tracking=["tensorboard"]))
    lines = {"start": "did not start", "log": "did not take round 1", "finish": "did not end well"}
    assert outcome.code == 0 and f"warning: tensorboard {lines[where]}: the server" in screen
    assert [row["round"] for row in rows(tmp_path / "run" / "stats.jsonl")] == [0, 1]


def test_an_unknown_tracker_is_refused_before_anything_runs(toy, tmp_path):
    with pytest.raises(ConfigError, match="tracker"):
        run(toy(tracking=["tensorbord"]))
    assert not (tmp_path / "run").exists()
