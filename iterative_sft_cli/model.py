"""Loads the model that generates and is trained, in the precisions the config asks for, and knows its base weights by content.

The guarantee: what is loaded is complete (no weight is left random), comes from safetensors or GGUF only, and its
`base_hash` depends on the bytes of weights, config and tokenizer and on nothing else.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iterative_sft_cli.encoding import UNBOUNDED
from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.model_load import add_adapter, load_folder, load_gguf, load_tokenizer, make_fresh, quiet
from iterative_sft_cli.model_source import ModelSource, find_model, main_dtype
from iterative_sft_cli.model_weights import content_hash, fill_adapter, read_into, state_hash, write_adapter, write_full
from iterative_sft_cli.tensor_files import read_headers, weight_files
from iterative_sft_cli.types import derive_seed

MAX_PARAMETERS_ON_CPU = 1_000_000_000
"""`device: auto` refuses larger models where there is no GPU."""


@dataclass(slots=True)
class LoadedModel:
    """A model in memory and what others need to know of it.

    Trained parameters are float32 and frozen ones `compute_dtype`; checkpoints are written in `base_dtype`. `base_hash` is
    the content of the base model. `revision` is the commit of a hub model. `folder` holds the base weights (None for
    GGUF and `init`). `notes` are lines worth showing to the user.
    """

    model: Any
    tokenizer: Any
    base_dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    base_hash: str
    eos_token_ids: tuple[int, ...]
    context_length: int
    is_encoder_decoder: bool
    source: Any
    files: ModelSource
    seed: int
    num_parameters: int
    tensor_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path | None:
        """The folder of the base weights."""
        return self.files.folder

    @property
    def revision(self) -> str | None:
        """The commit of a hub model."""
        return self.files.revision

    @property
    def has_adapter(self) -> bool:
        """Whether only an adapter is trained."""
        return hasattr(self.model, "peft_config")


def load_model(section: Any, *, seed: int = 0, base_dir: Path = Path(".")) -> LoadedModel:
    """Load `config.model`. Raises ConfigError for settings that cannot be met here and DataError for missing or broken files.

    `seed` decides fresh weights: those of `init` and of the adapter.
    """
    files = find_model(section, base_dir)
    if section.quantization != "none" and section.adapter is None:
        raise ConfigError(
            "quantized weights cannot be trained", where="model.quantization", expected="an `adapter` beside them"
        )
    device = choose_device(section.device)
    compute = choose_compute_dtype(section.dtype, device)
    headers = read_headers(weight_files(files.folder)) if files.folder else {}
    if section.device == "auto" and device.type == "cpu":
        _refuse_large(files, sum(header.numel for header in headers.values()))
    frozen = compute if section.adapter is not None else torch.float32
    with quiet(), ThreadPoolExecutor(1) as pool:
        pending = pool.submit(content_hash, files.files())
        tokenizer = load_tokenizer(files, section)
        if files.gguf:
            model, base_dtype = load_gguf(files.gguf, section).to(frozen), torch.bfloat16
        elif files.init is not None:
            model, base_dtype = make_fresh(files.init, tokenizer, seed, section).to(frozen), torch.float32
        else:
            model = load_folder(files, section, frozen, device)
            base_dtype = getattr(torch, main_dtype(headers))
        base_hash = pending.result()
        if files.init is not None:
            base_hash = state_hash(model, base_hash)
        if section.quantization == "none":
            model = model.to(device)
        plain = model
        if section.adapter is not None:
            model = add_adapter(model, section, files)
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        base_dtype=base_dtype,
        compute_dtype=compute,
        device=device,
        base_hash=base_hash,
        eos_token_ids=_eos_ids(plain, tokenizer),
        context_length=_context_length(plain.config, tokenizer),
        is_encoder_decoder=bool(getattr(plain.config, "is_encoder_decoder", False)),
        source=section,
        files=files,
        seed=seed,
        num_parameters=sum(header.numel for header in headers.values())  # packed weights do not count themselves
        or sum(parameter.numel() for parameter in plain.parameters()),
        tensor_dtypes={
            name: getattr(torch, main_dtype({name: header}))
            for name, header in headers.items()
            if main_dtype({name: header}) != main_dtype(headers)
        },
    )
    if loaded.has_adapter:
        fresh_adapter(loaded, derive_seed(seed, "adapter", 0))
    model.eval()
    return loaded


def reset_to_base(loaded: LoadedModel, round_index: int = 0) -> None:
    """Put the base model's weights back, read from their bytes again; with an adapter, a fresh one from (seed, round)."""
    if loaded.has_adapter:
        fresh_adapter(loaded, derive_seed(loaded.seed, "adapter", round_index))
    elif loaded.files.folder:
        load_weights_into(loaded, loaded.files.folder)
    else:
        with quiet():
            if loaded.files.gguf:
                again = load_gguf(loaded.files.gguf, loaded.source)
            else:
                again = make_fresh(loaded.files.init or {}, loaded.tokenizer, loaded.seed, loaded.source)
        _copy_from(loaded.model, again)


def fresh_adapter(loaded: LoadedModel, seed: int) -> None:
    """Give the adapter new weights that depend on `seed` alone (the loop derives it from run seed and round)."""
    if not loaded.has_adapter:
        raise ValueError("the model has no adapter")
    fill_adapter(loaded.model, seed)


def load_weights_into(loaded: LoadedModel, folder: Path) -> None:
    """Take the weights (or the adapter) in a checkpoint folder, upcast, into the parameters that are there.

    Raises DataError when the folder does not fit the model.
    """
    if read_into(loaded.model, folder):
        return
    with quiet():
        again = load_folder(ModelSource(str(folder), folder=folder), loaded.source, torch.float32, torch.device("cpu"))
    _copy_from(loaded.model, again)


def save_pretrained(loaded: LoadedModel, folder: Path) -> None:
    """Write a folder that loads with `from_pretrained`: weights in the base dtype, config, generation_config, tokenizer.

    With an adapter, the adapter in float32 and the tokenizer. The same weights give the same bytes. No fsync.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        if loaded.has_adapter:
            write_adapter(loaded.model, folder)
        else:
            write_full(loaded.model, folder, loaded.base_dtype, loaded.tensor_dtypes, loaded.eos_token_ids)
        loaded.tokenizer.save_pretrained(folder)


@torch.no_grad()
def _copy_from(model: nn.Module, other: nn.Module) -> None:
    source = other.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(source[name])


# -- where and in which precision --------------------------------------------------------------------------------------


def choose_device(setting: str) -> torch.device:
    """The device `model.device` means here. Raises ConfigError for one that is not there."""
    if setting == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return torch.device("cpu")
    device = torch.device(setting)
    there = device.type == "cpu"
    if device.type == "cuda":
        there = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    elif device.type == "mps":
        there = torch.backends.mps.is_available()
    elif device.type == "xpu":
        there = torch.xpu.is_available()
    if not there:
        raise ConfigError(
            f"there is no device {setting!r} here", where="model.device", expected="auto, cpu or one that is there"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies matrices in bfloat16 natively; emulation does not count."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "xpu":
        return True
    if device.type != "cpu":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of all compute under `model.dtype`. Raises ConfigError for float16."""
    if setting == "float16":
        raise ConfigError(
            "float16 overflows in training and would need a loss scale",
            where="model.dtype",
            expected="auto, bfloat16 or float32",
        )
    if setting == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    chosen: torch.dtype = getattr(torch, setting)
    return chosen


def _refuse_large(files: ModelSource, num_parameters: int) -> None:
    if files.gguf:
        num_parameters = int(files.gguf.stat().st_size / 0.55)  # 4 bits a weight and a little more
    if num_parameters > MAX_PARAMETERS_ON_CPU:
        raise ConfigError(
            f"the model has about {num_parameters / 1e9:.1f} billion parameters and there is no GPU",
            where="model.device",
            expected="a GPU, or `device: cpu` if the wait is acceptable",
        )


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    found: set[int] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return tuple(sorted(found))


def _context_length(config: Any, tokenizer: Any) -> int:
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    stated = tokenizer.model_max_length
    return int(stated) if stated < UNBOUNDED else UNBOUNDED
