"""The launch file of the documentation under a played Slurm: signalled, requeued, complete."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rank_helpers import contents, write_toy_many

from iterative_sft_cli.report.documents import page

HERE = Path(__file__).resolve().parent


def launch_file() -> str:
    """The batch script of the page on several GPUs."""
    found = re.findall(r"```sh\n(#!/bin/sh\n#SBATCH.*?)```", page("several-gpus"), re.DOTALL)
    assert len(found) == 1
    return found[0]


def test_the_launch_file_asks_for_what_the_run_needs():
    text = launch_file()
    assert "--signal=TERM@600" in text and "--open-mode=append" in text and "--requeue" in text
    assert "-eq 75" in text and "scontrol requeue" in text


def play(folder, *options):
    """What Slurm saw of each start of the launch file, once the run is complete and has the bytes of an undisturbed one."""
    write_toy_many(folder, "run", rounds=2).rename(folder / "config.yaml")
    write_toy_many(folder, "whole", rounds=2)
    (folder / "job.sh").write_text(launch_file())
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TOY_DELAY_S": "0.005", "PYTHONPATH": str(HERE.parents[1])}
    environ["ISFT_RANK_PATIENCE_S"] = "0.5,20,60,60"
    command = [sys.executable, str(HERE / "play_slurm.py"), str(folder / "job.sh"), str(folder), *options]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=400)
    starts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr
    assert len(starts) >= 2 and starts[-1] == {"code": 0, "requeued": False, "killed": False}, starts
    alone = [sys.executable, "-m", "iterative_sft_cli", "train", str(folder / "whole.yaml")]
    subprocess.run(alone, env={**environ, "TOY_DELAY_S": "0"}, check=True, capture_output=True)
    assert contents(folder / "run") == contents(folder / "whole")
    return starts


@pytest.mark.slow
def test_a_job_is_requeued_until_it_is_complete(tmp_path):
    starts = play(tmp_path, "--after", "12")
    assert all(one["code"] == 75 and one["requeued"] for one in starts[:-1]), starts


@pytest.mark.slow
def test_a_job_that_is_killed_before_it_has_saved_goes_on_all_the_same(tmp_path):
    """No grace at all: the signal and SIGKILL come in one breath."""
    starts = play(tmp_path, "--after", "12", "--grace", "0")
    assert all(one["killed"] for one in starts[:-1]), starts
