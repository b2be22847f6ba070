"""What `IterativeSFTTrainer` is made of: model, tokenizer, optimizer and callbacks, from what a caller passes.

Guarantee: what cannot be trained as it is (sharded, wrapped, foreign) is refused with its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import DefaultFlowCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from iterative_sft_cli.train.torch_core import bare_model
from iterative_sft_cli.train.torch_window import LogWindow


def open_model(model: Any, args: Any, peft_config: Any) -> Any:
    """The model on its device, with its adapter; by name the class that its config asks for, in fp32 unless told otherwise."""
    kwargs = getattr(args, "model_init_kwargs", None)
    if isinstance(model, str):
        options = dict(kwargs or {})
        passed = {k: v for k, v in options.items() if k in ("revision", "trust_remote_code", "token", "cache_dir")}
        config = transformers.AutoConfig.from_pretrained(model, **passed)
        if config.is_encoder_decoder:
            kind: Any = transformers.AutoModelForSeq2SeqLM
        else:
            kind = transformers.AutoModelForCausalLM
        if "dtype" not in options and "torch_dtype" not in options:
            options["dtype"] = torch.float32
        # a pickle is never loaded unless it is asked for by name
        options.setdefault("use_safetensors", True)
        model = kind.from_pretrained(model, **options)
    elif kwargs:
        raise ValueError("model_init_kwargs act only when the model is given by name")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if isinstance(model, nn.DataParallel):
        raise ValueError("the model is wrapped in DataParallel: pass the model itself, one process a device")
    if type(model).__name__.startswith(("FullyShardedDataParallel", "FSDP", "DeepSpeedEngine")):
        raise ValueError(f"the model is sharded ({type(model).__name__}): step() trains whole copies only")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a name, a folder or a torch module, got {type(model).__name__}")
    if peft_config is not None:
        import peft

        if isinstance(model, peft.PeftModel):
            raise ValueError("peft_config given, but the model already has an adapter")
        model = peft.get_peft_model(model, peft_config)
    if getattr(model, "hf_device_map", None) is None:
        model.to(torch.device(args.device))
    return model


def find_tokenizer(name: str | None, model: Any) -> Any:
    """The tokenizer that lies beside the model, or None."""
    name = name or getattr(bare_model(model).config, "_name_or_path", "")
    if not name:
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None


def check_optimizer(optimizer: Any, scheduler: Any, model: nn.Module) -> None:
    """Raises ValueError or TypeError for a pair that does not train `model`."""
    if optimizer is None:
        if scheduler is not None:
            raise ValueError("optimizers: a scheduler without its optimizer")
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizers[0] must be a torch optimizer, got {type(optimizer).__name__}")
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not held & trained:
        raise ValueError(
            "optimizers[0] holds none of the model's trainable parameters (was the model wrapped or moved since?)"
        )


class Flow(DefaultFlowCallback):  # type: ignore[misc]
    """When to log, evaluate and save; it runs before the caller's callbacks, which may overrule it."""

    def __init__(self, window: LogWindow) -> None:
        self.window = window

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """After each optimizer step. At the end of max_steps whatever goes by steps is done once more."""
        window, last = self.window, self.window.ends_call
        at_end = state.global_step == args.max_steps
        control.should_log |= window.due("logging", state) or last
        control.should_evaluate |= window.due("eval", state) or (at_end and window.steps_of("eval") > 0)
        control.should_save |= window.due("save", state) or (at_end and window.steps_of("save") > 0)
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """The end of a step() call is the end of its last optimizer step."""
        return control


def make_handler(
    args: Any, callbacks: Sequence[Any], model: Any, tokenizer: Any, optimizers: tuple[Any, Any], window: LogWindow
) -> CallbackHandler:
    """The caller's callbacks behind `Flow` and those that `report_to` and `disable_tqdm` ask for."""
    from transformers.integrations import get_reporting_integration_callbacks

    chosen: list[Any] = [Flow(window), *get_reporting_integration_callbacks(args.report_to), *callbacks]
    if args.disable_tqdm:
        chosen.append(PrinterCallback)
    elif args.max_steps > 0:
        chosen.append(ProgressCallback)
    return CallbackHandler(chosen, model, tokenizer, *optimizers)
