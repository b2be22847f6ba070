"""The real loop with the toy model of `tests/toy_backend.py` as a subject of the crash suites."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

from crash_base import Subject
from crash_process import real_contents

from iterative_sft_cli.console import Console
from iterative_sft_cli.experiment import run_experiment

CHANGES = {
    "checkpoints": {"every_steps": 2, "keep": 1},
    "train": {"data": "accumulate"},
    "generate": {"samples_per_prompt": 3},
    "prompts": {"per_round": 5},
}


def shared_fixtures() -> Any:
    """`tests/conftest.py` by its path: several folders have a module of that name."""
    path = Path(__file__).resolve().parents[1] / "conftest.py"
    spec = importlib.util.spec_from_file_location("isft_toy_experiment", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loop_subject(folder: Path, run: Path, *, rounds: int = 2) -> Subject:
    """A toy experiment whose config is in `folder` and whose run directory is `run`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = shared_fixtures().write_toy(folder, {**CHANGES, "rounds": rounds, "output_dir": str(run)})

    def train(path: Path) -> object:
        assert path == run
        return run_experiment(config, view=Console(io.StringIO()))

    return Subject(train, real_contents)
