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


@pytest.mark.slow
def test_a_job_is_requeued_until_it_is_complete(tmp_path):
    write_toy_many(tmp_path, "run", rounds=2).rename(tmp_path / "config.yaml")
    write_toy_many(tmp_path, "whole", rounds=2)
    (tmp_path / "job.sh").write_text(launch_file())
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TOY_DELAY_S": "0.005", "PYTHONPATH": str(HERE.parents[1])}
    environ["ISFT_RANK_PATIENCE_S"] = "0.5,20,60,60"
    command = [sys.executable, str(HERE / "play_slurm.py"), str(tmp_path / "job.sh"), str(tmp_path), "--after", "12"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    starts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr
    assert len(starts) >= 2 and starts[-1] == {"code": 0, "requeued": False, "killed": False}, starts
    assert all(one["code"] == 75 and one["requeued"] for one in starts[:-1]), starts
    alone = [sys.executable, "-m", "iterative_sft_cli", "train", str(tmp_path / "whole.yaml")]
    subprocess.run(alone, env={**environ, "TOY_DELAY_S": "0"}, check=True, capture_output=True)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
