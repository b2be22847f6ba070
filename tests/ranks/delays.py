"""Run before a rank starts (test_ranks_hard.py): the rank that `LATE` names sleeps for longer than a collective's time-out in one phase."""

import os
import time

late, phase, seconds = os.environ["LATE"].split(",")
if int(late) == RANK:  # noqa: F821
    from iterative_sft_cli import build
    from iterative_sft_cli.filters import FilterChain
    from iterative_sft_cli.generate.embedded import EmbeddedEngine
    from iterative_sft_cli.train.torch_core import TrainCore
    from iterative_sft_cli.train.torch_learner import TorchLearner

    owner, name = {
        "load": (build, "open_parts"),
        "serve": (EmbeddedEngine, "begin"),
        "generate": (EmbeddedEngine, "plan"),
        "filters": (FilterChain, "open_shard"),
        "weights": (TorchLearner, "load_weights"),
        "begin": (TorchLearner, "begin"),
        "batches": (TrainCore, "micro_batches"),
        "backward": (TrainCore, "loss_sum"),
        "save": (TorchLearner, "save"),
    }[phase]
    original = getattr(owner, name)
    slept = []

    def slow(*args, **options):
        if not slept:
            slept.append(True)
            time.sleep(float(seconds))
        return original(*args, **options)

    setattr(owner, name, slow)
