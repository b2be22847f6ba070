"""Run by test_trl_rows.py in two processes: what must hold over ranks, written down as JSON by each of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from train_helpers import arguments, caught_gradients, model, some_rows, tensors, trainer, weights

from iterative_sft_cli.train import torch_ranks
from iterative_sft_cli.train.torch_core import TrainCore
from iterative_sft_cli.train.torch_learner import TorchLearner
from iterative_sft_cli.train.torch_settings import StepSettings


def digest(subject: Any) -> str:
    """A text that is equal only for equal parameters."""
    import hashlib

    found = hashlib.sha256()
    for parameter in weights(subject).values():
        found.update(parameter.numpy().tobytes())
    return found.hexdigest()


def main(folder: Path) -> None:
    """All checks in one pair of processes, because starting them costs more than running them."""
    rank = int(sys.argv[2])
    arguments(folder)  # transformers starts the process group here
    found: dict[str, Any] = {"world": dist.get_world_size()}
    data = [list(row.input_ids) for row in some_rows("llama", 12)]

    seen: list[list[int]] = []
    one = trainer(folder, per_device_train_batch_size=2, max_steps=10, disable_tqdm=True)
    original = one.core.step

    def watched(rows: Any, **options: Any) -> Any:
        seen.extend(list(row.input_ids) for row in rows)
        return original(rows, **options)

    one.core.step = watched
    stats = one.step(input_ids=tensors(*data))
    found["shared"] = {"seen": seen, "stats": stats, "lr": [row["learning_rate"] for row in one.state.log_history]}
    found["shared"]["digest"] = digest(one.model)

    own = tensors(*(data[:7] if rank == 0 else data[7:9]))
    two = trainer(folder, per_device_train_batch_size=2)
    calls = [two.step(input_ids=own), two.step(input_ids=own if rank == 0 else [])]
    found["uneven"] = {"stats": calls, "digest": digest(two.model), "samples": len(own)}

    subject = model("llama", seed=rank)
    three = trainer(folder, torch.nn.parallel.DistributedDataParallel(model("llama")), save_strategy="no")
    three.create_model_card(model_name="card")
    four = trainer(folder, subject)
    found["start"] = digest(four.model)
    found["unwrapped"] = type(three.model).__name__

    rows = some_rows("llama", 12)
    core = TrainCore(model("llama"), StepSettings())
    caught = caught_gradients(core)
    result = core.step(rows[:5] if rank == 0 else rows[5:], learning_rate=1e-3, seed=0)
    found["loss"] = result.loss
    if rank == 0:
        from safetensors.torch import save_file

        save_file(caught, folder / "grads.safetensors")

    try:
        four.step(texts=["no tokenizer here"] if rank == 0 else None, input_ids=None if rank == 0 else own)
        found["refused"] = None
    except ValueError as error:
        found["refused"] = str(error)

    from types import SimpleNamespace

    loaded = SimpleNamespace(model=model("llama"), compute_dtype=torch.float32, device="cpu")
    learner = TorchLearner(SimpleNamespace(learning_rate=1e-3), loaded=loaded)
    learner.begin(SimpleNamespace(learning_rate=1e-3), 2, seed=0, keep_optimizer=False)
    found["learner"] = [learner.step(rows, index, None) for index in range(2)]
    found["learner_digest"] = digest(loaded.model)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch_ranks.sum_ints([1], torch.device("cpu"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
