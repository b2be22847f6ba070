"""Full-precision weights, optimizer and counters in a folder of safetensors and JSON.

Guarantee: load after save gives the same bytes back; nothing is unpickled; what does not fit the model is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.tensor_files import read_headers
from iterative_sft_cli.train import torch_optim
from iterative_sft_cli.train.torch_core import TrainCore

FORMAT = 1
MASTERS = "masters.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"


def save_state(core: TrainCore, folder: Path, extra: dict[str, Any]) -> None:
    """Write masters, optimizer and `extra` (JSON-able) into the existing `folder`."""
    weights = core.weights
    assert core.optimizer is not None
    masters = {n: m.detach().contiguous().cpu() for n, m in zip(weights.names, weights.masters, strict=True)}
    save_file(masters, folder / MASTERS)
    tensors, scalars = torch_optim.state_tensors(core.optimizer, weights.names, weights.masters)
    save_file(_apart(tensors), folder / OPTIMIZER)
    record = {
        "format": FORMAT,
        "optimizer": type(core.optimizer).__name__,
        "scalars": scalars,
        **extra,
    }
    (folder / TRAINER).write_text(json.dumps(record, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in host memory of their own: 8-bit states of all parameters share their code books."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in tensors.items():
        host = value.contiguous().cpu()
        found[key] = host.clone() if host.data_ptr() in seen else host
        seen.add(host.data_ptr())
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    read_headers([path])
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from None


def read_record(folder: Path, optimizer: str) -> dict[str, Any]:
    """The JSON record of a state. Raises DataError when it is none, or another optimizer's."""
    try:
        record = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=str(folder / TRAINER)) from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(
            "not a trainer state this version reads", where=str(folder / TRAINER), expected=f"format {FORMAT}"
        )
    if record.get("optimizer") != optimizer:
        raise DataError(
            f"state of {record.get('optimizer')}",
            where=str(folder / TRAINER),
            expected=optimizer,
        )
    return record


@torch.no_grad()
def load_state(core: TrainCore, folder: Path) -> dict[str, Any]:
    """Put back what `save_state` wrote; returns the JSON record. Raises DataError naming what does not fit."""
    assert core.optimizer is not None
    record = read_record(folder, type(core.optimizer).__name__)
    weights = core.weights
    masters = read_tensors(folder / MASTERS)
    if set(masters) != set(weights.names):
        odd = sorted(set(masters) ^ set(weights.names))
        raise DataError(f"parameters differ from the model's: {', '.join(odd[:3])}", where=str(folder / MASTERS))
    for name, master in zip(weights.names, weights.masters, strict=True):
        if masters[name].shape != master.shape or masters[name].dtype != master.dtype:
            raise DataError(
                f"{name} is {masters[name].dtype} {tuple(masters[name].shape)}",
                where=str(folder / MASTERS),
                expected=f"{master.dtype} {tuple(master.shape)}",
            )
    tensors = read_tensors(folder / OPTIMIZER)
    for name, master in zip(weights.names, weights.masters, strict=True):
        master.copy_(masters[name])
    weights.publish()
    scalars = record.get("scalars", {})
    torch_optim.load_state_tensors(core.optimizer, weights.names, weights.masters, tensors, scalars)
    return record
