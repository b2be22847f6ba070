"""Training on accepted samples. `open_learner` is the loop's door; `trainer.IterativeSFTTrainer` is the library's.

Guarantee: importing this package imports no torch.
"""

from __future__ import annotations

from typing import Any

from iterative_sft_cli.train.base import Learner


def open_learner(section: Any, *, loaded: Any, encoder: Any, config: Any) -> Learner:
    """The learner over `loaded` (a `LoadedModel`) for the `train` section. Raises ConfigError for what it cannot honour."""
    from iterative_sft_cli.train.torch_learner import TorchLearner

    return TorchLearner(section, loaded=loaded, config=config)
