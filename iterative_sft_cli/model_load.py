"""Reads tokenizers and models with transformers: folders, GGUF files, fresh models, adapters; silently, and completely or not at all."""

from __future__ import annotations

import difflib
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.model_source import ModelSource
from iterative_sft_cli.types import derive_seed


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of transformers and tqdm, which would tear the screen; restores what was set."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    bar = gguf_reader.tqdm
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf_reader.tqdm = partial(bar, disable=True)  # it asks nobody whether bars are wanted
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gguf_reader.tqdm = bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(files: ModelSource, section: Any) -> Any:
    from transformers import AutoTokenizer

    if files.gguf and not files.tokenizer:
        _need_gguf()
    try:
        if files.tokenizer:
            found = AutoTokenizer.from_pretrained(files.tokenizer, trust_remote_code=section.trust_remote_code)
        else:
            assert files.gguf is not None
            found = AutoTokenizer.from_pretrained(files.gguf.parent, gguf_file=files.gguf.name)
    except Exception as error:  # many kinds, down to a bare Exception of tokenizers
        raise DataError(
            f"the tokenizer cannot be loaded: {_first_line(error)}", where=str(files.tokenizer or files.gguf)
        ) from error
    for name in ("is_local", "local_files_only"):
        # how it was found, HF_HUB_OFFLINE among it: a checkpoint's bytes are the same either way
        getattr(found, "init_kwargs", {}).pop(name, None)
    return found


def load_folder(files: ModelSource, section: Any, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoConfig

    assert files.folder is not None
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": section.attention,
        "use_safetensors": True,
        "trust_remote_code": section.trust_remote_code,
        "local_files_only": True,
    }
    if section.quantization != "none":
        options["quantization_config"] = _quantization(section.quantization, dtype)
        options["device_map"] = {"": device}
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=section.trust_remote_code)
        model, report = _auto_class(config).from_pretrained(
            files.folder, config=config, output_loading_info=True, **options
        )
    except Exception as error:  # many kinds, down to a bare Exception of tokenizers
        hint = None
        if "trust_remote_code" in str(error):
            hint = "the model brings its own code: trust_remote_code: true with a pinned revision, if you trust it"
        elif "attn_implementation" in str(error) or "scaled_dot_product" in str(error):
            hint = "attention: eager works with every model"
        raise DataError(
            f"the model cannot be loaded: {_first_line(error)}", where=str(files.folder), hint=hint
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise DataError(
            f"the weights lack {len(missing)} tensors of a {type(model).__name__} (such as {missing[0]})",
            where=str(files.folder),
            hint="they would stay random: the folder is damaged, or not a model that generates text",
        )
    if section.quantization == "4bit":
        _keep_differentiable(model)
    return model


def _keep_differentiable(model: Any) -> None:
    """No repacking of 4-bit weights by a forward in evaluation mode on a CPU.

    bitsandbytes multiplies repacked weights without a gradient, so that after one generation the adapters of all layers but
    the last would train on wrong gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _auto_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def load_gguf(path: Path, section: Any) -> Any:
    """The weights of a GGUF file as a plain bfloat16 model, which can be trained and saved."""
    import transformers
    from transformers import AutoModelForCausalLM

    _need_gguf()
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, attn_implementation=section.attention, **options
        )
    except Exception as error:  # many kinds, down to a bare Exception of tokenizers
        raise DataError(f"the model cannot be loaded: {_first_line(error)}", where=str(path)) from error
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _need_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            "reading a .gguf file needs the package gguf",
            where="model.path",
            hint="pip install 'iterative-sft-cli[gguf]'",
        )


def make_fresh(init: dict[str, Any], tokenizer: Any, seed: int, section: Any) -> Any:
    """A fresh float32 model from config values; the same for the same values and seed."""
    from transformers import CONFIG_MAPPING, AutoConfig

    values = dict(init)
    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), n=1)
        raise ConfigError(
            f"{kind!r} is no model type of transformers" if kind else "missing",
            where="model.init.model_type",
            expected="such as llama, gpt2 or t5",
            hint=f"did you mean {close[0]}?" if close else None,
        )
    values.setdefault("vocab_size", len(tokenizer))
    blank = CONFIG_MAPPING[kind]()
    known = {*blank.to_dict(), *blank.attribute_map}
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            raise ConfigError(
                f"a {kind} config has no value {name!r}",
                where=f"model.init.{name}",
                hint=f"did you mean {close[0]}?" if close else None,
            )
    if values["vocab_size"] < len(tokenizer):
        raise ConfigError(
            f"{values['vocab_size']} tokens",
            where="model.init.vocab_size",
            expected=f"at least the tokenizer's {len(tokenizer)}",
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        values.setdefault(name, getattr(tokenizer, name))
    if "decoder_start_token_id" in known:
        values.setdefault("decoder_start_token_id", values["pad_token_id"])
    try:
        config = AutoConfig.for_model(kind, **values)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "init"))
            return _auto_class(config).from_config(config, attn_implementation=section.attention, dtype=torch.float32)
    except Exception as error:
        raise ConfigError(
            f"no model can be made from these values: {_first_line(error)}", where="model.init"
        ) from error


def _quantization(setting: str, dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "quantization needs the package bitsandbytes",
            where="model.quantization",
            hint="pip install 'iterative-sft-cli[quant]', or quantization: none",
        )
    from transformers import BitsAndBytesConfig

    if setting == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def add_adapter(model: Any, section: Any, files: ModelSource) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

    if section.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapter = section.adapter
    target = adapter.target_modules
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=target if isinstance(target, str) else list(target),
        task_type=TaskType.SEQ_2_SEQ_LM if getattr(model.config, "is_encoder_decoder", False) else TaskType.CAUSAL_LM,
        base_model_name_or_path=str(files.folder) if files.revision is None else files.name,
        revision=files.revision,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(_first_line(error), where="model.adapter.target_modules") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
