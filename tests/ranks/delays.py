"""Run before a rank starts: the rank that `LATE` names sleeps in one phase, at one of its calls there.

`LATE` is `rank,phase,seconds,call`; the file that `LATE_MARK` names is made as the sleep begins.
"""

import os
import time
from pathlib import Path

late, phase, seconds, call = os.environ["LATE"].split(",")
if int(late) == RANK:  # noqa: F821
    import torch.distributed

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
        "reduce": (torch.distributed, "all_reduce"),
        "save": (TorchLearner, "save"),
    }[phase]
    original = getattr(owner, name)
    calls = []

    def slow(*args, **options):
        calls.append(True)
        if len(calls) == int(call):
            if "LATE_MARK" in os.environ:
                Path(os.environ["LATE_MARK"]).touch()
            time.sleep(float(seconds))
        return original(*args, **options)

    setattr(owner, name, slow)
