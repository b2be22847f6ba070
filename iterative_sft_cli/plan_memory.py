"""Memory a process needs in both phases of a round, and what a round writes and reads, from shapes alone: no weights are loaded.

Guarantee: held against measured peaks of SmolLM2 within 25 % (tests/test_plan_memory.py, slow); what cannot fit is refused with ways out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.config import LoadedConfig
from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.machine import total_memory
from iterative_sft_cli.tensor_files import read_headers, weight_files
from iterative_sft_cli.types import Prompt

GB = 1e9
LIBRARIES_CPU, LIBRARIES_GPU = 0.55 * GB, 1.2 * GB
"""What torch, transformers and, on a GPU, the CUDA context and its libraries take before a model is there."""
SERVER_CPU = 1.3 * GB
"""What a vLLM server takes on a CPU beside weights, keys and values: two processes with its libraries."""
SHARE = 0.25
"""Of the device's memory: what the cache of a shard, and the activations of a micro-batch, are sized by when they are `auto`."""
HEAD_TOKENS = 256
"""Tokens whose logits are held at once."""
PROMPT_TOKENS = 256
"""A prompt's length where nothing is known of it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A causal model's dimensions, its parameters, and bytes of a parameter in its checkpoints."""

    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    parameters: int
    stored: int

    @property
    def linear(self) -> int:
        """Rows plus columns of a layer's matrices: what a LoRA rank adds to each layer."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * (self.hidden + wide) + 2 * (self.hidden + narrow) + 3 * (self.hidden + self.inner)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process by what holds them, in each phase; and what a round writes and reads."""

    train: Mapping[str, float]
    generate: Mapping[str, float]
    checkpoint: float
    state: float
    read: float
    served: float
    """What each vLLM server reads; 0 where isft starts none."""

    @property
    def peak(self) -> float:
        """The larger phase."""
        return max(sum(self.train.values()), sum(self.generate.values()))


def shape_of(section: Any, base_dir: Path) -> Shape | None:
    """The shape of `model` from its config, where that is at hand (a local folder or `init`); None otherwise."""
    folder: Path | None = None
    if section.init is not None:
        values: Mapping[str, Any] = section.init
    else:
        folder = next((p for p in (base_dir / str(section.path), Path(str(section.path))) if p.is_dir()), None)
        if section.path is None or folder is None or not (folder / "config.json").is_file():
            return None
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        values = values.get("text_config") or values
    try:
        hidden, layers = int(values["hidden_size"]), int(values["num_hidden_layers"])
        heads = int(values.get("num_attention_heads", 1))
        kv_heads = int(values.get("num_key_value_heads") or heads)
        head_dim = int(values.get("head_dim") or hidden // heads)
        inner, vocabulary = int(values.get("intermediate_size", 4 * hidden)), int(values["vocab_size"])
    except (KeyError, TypeError, ValueError):
        return None
    tied = bool(values.get("tie_word_embeddings", False))
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    parameters = layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden + vocabulary * hidden * (2 - tied)
    stored = 4 if str(values.get("dtype") or values.get("torch_dtype")) == "float32" else 2
    if folder is not None and any(folder.glob("*.safetensors")):
        headers = read_headers(weight_files(folder))
        parameters = sum(one.numel for one in headers.values())
    return Shape(hidden, layers, inner, heads, kv_heads, head_dim, vocabulary, tied, parameters, stored)


def estimate(
    config: Any, shape: Shape, *, processes: int, device_bytes: float, gpu: bool, prompt_tokens: int | None = None
) -> Memory:
    """Bytes of one of `processes`, on a device of `device_bytes`, in a round of `config` (of that round)."""
    train, generate = config.train, config.generate
    cut = processes if train.parallel.type == "fsdp2" and processes > 1 else 1
    low = 4 if config.model.dtype == "float32" else 2
    total = shape.parameters
    adapter = config.model.adapter
    trained = total if adapter is None else shape.layers * shape.linear * int(adapter.r)
    frozen = 0 if adapter is None else total
    moments = {"adamw": 8.0, "adamw_8bit": 2.1, "adafactor": 0.02}[train.optimizer]
    frozen_bytes = {"none": float(low), "8bit": 1.06, "4bit": 0.56}[config.model.quantization]
    longest = int(train.max_length or (prompt_tokens or PROMPT_TOKENS) + int(generate.max_new_tokens))
    base = LIBRARIES_GPU if gpu else LIBRARIES_CPU

    rows = max(1, math.ceil(int(train.batch_size) / processes))
    at_once = activation_bytes(shape, low, longest, bool(train.gradient_checkpointing), gpu)
    budget = train.micro_batch_tokens
    tokens = budget if budget != "auto" else min(device_bytes * SHARE / at_once, 65536 if gpu else 4096)
    several = processes > 1 or tokens < rows * longest
    tokens = max(longest, min(tokens, rows * longest))
    whole = 0.0 if cut == 1 or gpu else float(low * total)  # on a GPU it waits in the host's memory
    cast = 0.0 if low == 4 or cut > 1 else 2.0 * trained
    kept = 0.0 if gpu or low == 4 or cut > 1 else 2.0 * trained  # a CPU keeps the copy that generation read
    training = {
        "libraries": base,
        "weights": (4.0 * trained + frozen_bytes * frozen) / cut + cast + kept + whole,
        "gradients": (4.0 if several else float(low)) * trained / cut,
        "optimizer": moments * trained / cut,
        "activations": tokens * at_once + HEAD_TOKENS * shape.vocabulary * (4 + low),
    }
    off = train.offload == "disk" or (gpu and train.offload != "none")
    servers = server_bytes(generate, low * total, device_bytes, gpu, processes)
    if servers and not gpu and generate.vllm.while_training != "stop":
        training["servers"] = servers
    cache = 2.0 * shape.layers * shape.kv_heads * shape.head_dim * low
    allowed = device_bytes * SHARE if generate.memory_gb == "auto" else float(generate.memory_gb) * 2**30
    samples = 512 if gpu else 192 * max(1, (os.cpu_count() or 1) // processes)
    live = (4.0 * trained + frozen_bytes * frozen) / cut
    read_from = 0.0 if cut == 1 and low == 4 and adapter is None else float(low * total)  # what generation reads
    generating = {
        "libraries": base,
        "weights": live + read_from,
        "optimizer": 0.0 if off else moments * trained / cut,
        "cache": min(allowed, samples * longest * cache),
    }
    if generate.engine != "transformers":
        del generating["cache"]
        # where isft starts servers the trainer's weights leave with the optimizer
        generating["weights"] = 0.0 if servers and off else live
        if servers:
            generating["servers"] = servers
    saved = shape.stored * total if adapter is None else 4.0 * trained
    keeps = train.start_from == "previous"
    reads = 0.0 if keeps else float(shape.stored * total if adapter is None else 4.0 * trained)
    served = float(saved) if servers else 0.0
    return Memory(training, generating, saved, 12.0 * trained if keeps else 0.0, reads, served)


def server_bytes(generate: Any, weights: float, device_bytes: float, gpu: bool, processes: int) -> float:
    """What the vLLM servers that isft starts take of one process's device: of a GPU its part of a server, of the host's memory this
    process's share of all servers of the host. 0.0 where none is started."""
    if generate.engine != "vllm" or generate.vllm is None or generate.vllm.base_urls:
        return 0.0
    section = generate.vllm
    if gpu:
        # vLLM fills its part of the GPU with keys and values, and has to fit its weights
        return max(float(section.gpu_memory_utilization) * device_bytes, weights / int(section.tensor_parallel_size))
    cache = 2.0 if generate.memory_gb == "auto" else max(int(generate.memory_gb), 1)
    each = SERVER_CPU + weights + cache * 2**30
    return each * (1 if section.servers == "auto" else int(section.servers)) / processes


def activation_bytes(shape: Shape, low: int, longest: int, checkpointing: bool, gpu: bool) -> float:
    """Bytes that a token leaves for the backward pass."""
    hidden, narrow = shape.hidden, shape.kv_heads * shape.head_dim
    layer = low * (8 * hidden + 3 * narrow + 5 * shape.inner)
    if not gpu:
        # blocks of our own keep less; attention keeps its probabilities for rows of this length
        layer = low * (3 * hidden + 2 * narrow + 2 * shape.inner)
        layer += low * shape.heads * longest if longest <= 640 else 0
    if checkpointing:
        return float(low * shape.layers * hidden + layer)
    return float(shape.layers * layer)


def describe_memory(
    loaded: LoadedConfig, prompts: Sequence[Prompt], *, gpus: int, gpu_gb: float | None
) -> dict[str, Any] | None:
    """Bytes of each process in both phases, as plain data; None where the model's shape is not at hand.

    A prompt's tokens are taken to be a third of its characters.
    """
    config = loaded.config.at_round(1)
    shape = shape_of(config.model, loaded.base_dir)
    if shape is None:
        return None
    gpu = gpu_gb is not None
    room = gpu_gb * GB if gpu_gb is not None else total_memory()
    longest = max((len(str(prompt.prompt)) for prompt in prompts), default=0) // 3 + 32
    found = estimate(config, shape, processes=gpus, device_bytes=room, gpu=gpu, prompt_tokens=longest)
    return {
        "processes": gpus,
        "device_bytes": room,
        "gpu": gpu,
        "parameters": shape.parameters,
        "train": dict(found.train),
        "generate": dict(found.generate),
        "checkpoint_bytes": found.checkpoint,
        "state_bytes": found.state,
        "read_bytes": found.read,
        "served_bytes": found.served,
    }


def check_memory(found: Mapping[str, Any] | None) -> None:
    """Raises ConfigError, with three ways out, when a process needs more than its part of the memory."""
    if found is None:
        return
    room = found["device_bytes"] if found["gpu"] else found["device_bytes"] / found["processes"]
    phase = max(("train", "generate"), key=lambda name: sum(found[name].values()))
    parts = found[phase]
    need = sum(parts.values())
    if need <= room:
        return
    largest = max((key for key in parts if key != "libraries"), key=lambda key: parts[key])
    raise ConfigError(
        f"{phase} needs {need / GB:.1f} GB in each process, most of it for {largest}, and there are {room / GB:.1f} GB",
        where="memory",
        hint="(1) train an adapter: model.adapter: {type: lora, r: 16}; (2) cut the model over more GPUs: "
        "train.parallel: fsdp2 and a larger --gpus; (3) take a smaller model, or where activations or the cache are "
        "largest, train.gradient_checkpointing, train.micro_batch_tokens and generate.memory_gb",
    )


def render_memory(found: Mapping[str, Any] | None) -> list[str]:
    """The estimate as lines."""
    if found is None:
        return []
    each = f"each of {found['processes']} processes" if found["processes"] > 1 else "the process"
    room = f"{found['device_bytes'] / GB:.0f} GB " + ("on its GPU" if found["gpu"] else "in this machine")
    lines = [f"memory of {each} ({found['parameters'] / 1e9:.2f} B parameters, {room}):"]
    for phase in ("train", "generate"):
        parts = found[phase]
        named = ", ".join(f"{key} {value / GB:.1f}" for key, value in parts.items() if value >= 0.05 * GB)
        lines.append(f"  {phase:<9} {sum(parts.values()) / GB:.1f} GB: {named}")
    reads = f"{found['read_bytes'] / GB:.2f} GB of weights" if found["read_bytes"] else "no weights"
    if found["served_bytes"]:
        reads += f" in the trainer, {found['served_bytes'] / GB:.2f} GB in each vLLM server"
    saved = f"{found['checkpoint_bytes'] / GB:.2f} GB" + (
        f" and {found['state_bytes'] / GB:.2f} GB of state" if found["state_bytes"] else ""
    )
    return [*lines, f"  a round writes a checkpoint of {saved}, and reads {reads}"]
