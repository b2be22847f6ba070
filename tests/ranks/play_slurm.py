"""Plays Slurm for one batch script: srun's environment, the signal before the end, the kill after it, and requeue.

    play_slurm.py SCRIPT FOLDER --after 5 --grace 20 --tasks 2

The script's `srun` starts `--tasks` processes with the variables that Slurm sets, its `scontrol requeue` has the script run
again. SIGTERM goes to the tasks of the step after `--after` seconds (the script's `--signal=TERM@...`), SIGKILL to everything
`--grace` seconds later. Prints a line of JSON a start: exit code, requeued, killed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SRUN = """#!{python}
import os, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
while words and words[0].startswith("-"):
    words.pop(0)
number = int(os.environ["SLURM_NTASKS"])
tasks = []
for rank in range(number):
    environ = {{**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_ID": "0",
               "SLURM_STEP_NUM_TASKS": str(number), "SLURM_STEP_NODELIST": "localhost"}}
    tasks.append(subprocess.Popen(words, env=environ))
Path({folder!r}, "tasks").write_text(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
Path({folder!r}, "tasks").unlink()
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = '#!/bin/sh\n[ "$1" = requeue ] && : > {folder}/requeue\n'
ISFT = '#!/bin/sh\nexec {python} -m iterative_sft_cli "$@"\n'


def play(script: Path, folder: Path, *, after: float, grace: float, tasks: int, most: int) -> int:
    bin_dir = folder / "bin"
    bin_dir.mkdir(parents=True, exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("isft", ISFT)):
        (bin_dir / name).write_text(text.format(python=sys.executable, folder=str(folder)))
        (bin_dir / name).chmod(0o755)
    environ = {
        **os.environ,
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": "0",  # a batch script has it too
        "SLURM_JOB_NODELIST": "localhost",
    }
    for _ in range(most):
        for name in ("requeue", "tasks"):
            (folder / name).unlink(missing_ok=True)
        job = subprocess.Popen(["sh", str(script)], env=environ, cwd=folder, start_new_session=True)
        killed = False
        try:
            job.wait(after)
        except subprocess.TimeoutExpired:
            if (folder / "tasks").exists():
                for pid in (folder / "tasks").read_text().split():
                    os.kill(int(pid), signal.SIGTERM)
            try:
                job.wait(grace)
            except subprocess.TimeoutExpired:
                killed = True
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
                time.sleep(0.2)
        requeued = (folder / "requeue").exists()
        print(json.dumps({"code": job.returncode, "requeued": requeued, "killed": killed}), flush=True)
        if not requeued and not killed:
            return job.returncode
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--after", type=float, default=10.0)
    parser.add_argument("--grace", type=float, default=30.0)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--most", type=int, default=20)
    given = parser.parse_args()
    return play(
        given.script.resolve(),
        given.folder.resolve(),
        after=given.after,
        grace=given.grace,
        tasks=given.tasks,
        most=given.most,
    )


if __name__ == "__main__":
    sys.exit(main())
