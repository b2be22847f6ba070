"""The real loop with the toy model of `tests/toy_backend.py` as a subject of the crash suites."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from crash_base import Subject
from crash_process import real_contents

from iterative_sft_cli.console import Console
from iterative_sft_cli.experiment import run_experiment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CHANGES = {
    "checkpoints": {"every_steps": 2, "keep": 1},
    "train": {"data": "accumulate"},
    "generate": {"samples_per_prompt": 3},
    "prompts": {"per_round": 5},
}


def loop_subject(folder: Path, run: Path, *, rounds: int = 2) -> Subject:
    """A toy experiment whose config is in `folder` and whose run directory is `run`."""
    folder.mkdir(parents=True, exist_ok=True)
    from toy_config import write_toy

    config = write_toy(folder, {**CHANGES, "rounds": rounds, "output_dir": str(run)})

    def train(path: Path) -> object:
        assert path == run
        return run_experiment(config, view=Console(io.StringIO()))

    return Subject(train, real_contents)
