"""Weights between memory and safetensors folders, and their hashes.

The guarantee: reading changes parameters in place (nobody's reference goes stale), the same weights are written as the same
bytes, and no folder of a checkpoint states where it was written.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.tensor_files import read_headers, weight_files

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_CHUNK = 64 << 20


# -- hashes ------------------------------------------------------------------------------------------------------------


def content_hash(files: Sequence[Path]) -> str:
    """sha256 over names and contents of `files`, in 64 MiB chunks hashed by all cores; where the files lie does not matter."""
    jobs = [(path, start) for path in files for start in range(0, max(1, path.stat().st_size), _CHUNK)]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_chunk_hash, jobs))
    total = hashlib.sha256()
    for (path, start), digest in zip(jobs, digests, strict=True):
        total.update(f"{path.name}\0{start}\0{digest}\n".encode())
    return total.hexdigest()


def _chunk_hash(job: tuple[Path, int]) -> str:
    path, start = job
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    left = _CHUNK
    with path.open("rb") as file:
        file.seek(start)
        while left > 0 and (count := file.readinto(buffer[: min(left, len(buffer))])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def state_hash(model: nn.Module, prefix: str) -> str:
    """sha256 over `prefix`, names, dtypes and bytes of the weights in memory."""
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_into(model: Any, folder: Path) -> bool:
    """Copy the weights in `folder` into the parameters of `model`, upcasting. Raises DataError when they do not fit.

    False, with nothing changed, when the files name tensors in another way than the model does (transformers then has a
    conversion for them).
    """
    if hasattr(model, "peft_config"):
        _read_adapter(model, folder)
        return True
    if (folder / ADAPTER_CONFIG).is_file():
        raise DataError("the checkpoint is an adapter, but the model has none", where=str(folder))
    files = weight_files(folder)
    headers = read_headers(files)
    state = model.state_dict()
    if not set(headers) <= set(state):
        return False
    given = {state[name].data_ptr() for name in headers}
    if any(name not in headers and tensor.data_ptr() not in given for name, tensor in state.items()):
        return False
    for name, header in headers.items():
        if tuple(state[name].shape) != header.shape:
            raise DataError(
                f"{name} has the shape {list(header.shape)}", where=str(folder), expected=str(list(state[name].shape))
            )
    for path in files:
        for name, tensor in _tensors(path):
            state[name].copy_(tensor)
    return True


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            yield name, file.get_tensor(name)


def _adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names peft gives them on disk."""
    from peft import get_peft_model_state_dict

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def _read_adapter(model: Any, folder: Path) -> None:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise DataError("the checkpoint holds no adapter, but an adapter is trained", where=str(folder))
    headers = read_headers([path])
    state = _adapter_state(model)
    wrong = [
        name
        for name in sorted({*headers, *state})
        if name not in headers or name not in state or headers[name].shape != tuple(state[name].shape)
    ]
    if wrong:
        raise DataError(f"the adapter does not fit the model (such as {wrong[0]})", where=str(path))
    for name, tensor in _tensors(path):
        state[name].copy_(tensor)


@torch.no_grad()
def fill_adapter(model: nn.Module, seed: int) -> None:
    """LoRA's own initialisation (A uniform as a linear layer's, B zero), drawn on the CPU from `seed`, in order of names."""
    generator = torch.Generator().manual_seed(seed & ((1 << 63) - 1))
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.zero_()
        elif "lora_A" in name:
            bound = 1 / math.sqrt(parameter[0].numel())
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        elif "lora_embedding_B" in name:
            parameter.copy_(torch.empty(parameter.shape).normal_(generator=generator))


# -- writing -----------------------------------------------------------------------------------------------------------


def write_full(
    model: Any,
    folder: Path,
    dtype: torch.dtype,
    exceptions: Mapping[str, torch.dtype],
    eos_token_ids: Sequence[int],
) -> None:
    """Weights in `dtype` (a tensor in `exceptions` in its own), config and generation_config, as transformers writes them."""
    from transformers import GenerationConfig

    copies: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))  # tied weights stay tied, so that they are written once
        if key not in copies:
            wanted = exceptions.get(name, dtype) if tensor.is_floating_point() else tensor.dtype
            copies[key] = tensor.detach().to("cpu", wanted, copy=True)
        state[name] = copies[key]
    generation, said = model.generation_config, model.config.dtype
    model.generation_config = GenerationConfig()  # transformers refuses to write some that it reads
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.generation_config, model.config.dtype = generation, said
    config = copy.deepcopy(model.config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        generation = copy.deepcopy(generation)
        ids = list(eos_token_ids)
        generation.eos_token_id = ids[0] if len(ids) == 1 else ids or None
        (folder / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
    for path in folder.glob("model*.safetensors"):
        _follow_umask(path)


def write_adapter(model: Any, folder: Path) -> None:
    """The adapter alone, in float32, with its config in an order that never varies."""
    state = {
        name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in _adapter_state(model).items()
    }
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / ADAPTER_CONFIG).write_text(
        json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
    )
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    _follow_umask(folder / ADAPTER_WEIGHTS)


def _follow_umask(path: Path) -> None:
    """safetensors makes its files private; give them the mode of a file that was made the ordinary way beside them."""
    beside = path.parent / (ADAPTER_CONFIG if path.name == ADAPTER_WEIGHTS else "config.json")
    os.chmod(path, beside.stat().st_mode & 0o777)
