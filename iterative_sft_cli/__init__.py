"""isft: iterative supervised fine-tuning from one YAML file. Generate, filter, train, repeat.

Importing this package imports no torch; the trainer and the reader are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from iterative_sft_cli.experiment import run_experiment
    from iterative_sft_cli.report.reader import Run
    from iterative_sft_cli.train.trainer import IterativeSFTTrainer
    from iterative_sft_cli.types import Sample, Verdict

__all__ = ["IterativeSFTTrainer", "Run", "Sample", "Verdict", "__version__", "run_experiment"]

_WHERE = {
    "IterativeSFTTrainer": "iterative_sft_cli.train.trainer",
    "IterativeSFTConfig": "iterative_sft_cli.train.trainer",
    "Run": "iterative_sft_cli.report.reader",
    "Sample": "iterative_sft_cli.types",
    "Verdict": "iterative_sft_cli.types",
    "run_experiment": "iterative_sft_cli.experiment",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'iterative_sft_cli' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
