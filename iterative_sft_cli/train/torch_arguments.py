"""`transformers.TrainingArguments` as `step()` reads them, and our own `IterativeSFTConfig`.

Guarantee: every field acts or raises. What is listed nowhere below raises when it differs from its default, so a field that a
newer transformers adds is never silently ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from iterative_sft_cli.train.torch_settings import StepSettings

ACTING = frozenset(
    """output_dir per_device_train_batch_size max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim
    weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm label_smoothing_factor bf16
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps logging_first_step
    logging_nan_inf_filter include_num_input_tokens_seen disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    prediction_loss_only eval_on_start save_only_model save_strategy save_steps save_total_limit hub_model_id hub_token
    hub_private_repo hub_revision metric_for_best_model greater_is_better full_determinism seed data_seed use_cpu
    train_sampling_strategy resume_from_checkpoint eval_accumulation_steps
    model_init_kwargs max_length truncation_mode optimize_device_cache append_eos objective objective_args on_nonfinite
    micro_batch_tokens packing""".split()
)
"""Fields that `IterativeSFTTrainer` reads."""

ACTED_ON_BY_TRANSFORMERS = frozenset(
    """log_level log_level_replica log_on_each_node tf32 ddp_backend ddp_timeout local_rank do_train do_eval do_predict
    remove_unused_columns dataloader_pin_memory""".split()
)
"""Fields that take effect when the arguments are made, that are flags for a caller's own script, or that concern columns and
pinned pages which `step()` does not have under either value."""

_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adafactor": "adafactor",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
}

_WHY = {
    "num_train_epochs": "step() is one pass over what it is given; call it again for another",
    "fp16": "use bf16",
    "fsdp": "shard with the loop's own launcher, or train one process a model",
    "deepspeed": "shard with the loop's own launcher, or train one process a model",
    "load_best_model_at_end": "a trainer driven by step() has no end; reload state.best_model_checkpoint yourself",
    "push_to_hub": "call push_to_hub() when you want it",
}


@dataclass
class IterativeSFTConfig(TrainingArguments):  # type: ignore[misc]
    """Arguments of `IterativeSFTTrainer`: all of `TrainingArguments`, and these.

    model_init_kwargs: keyword arguments of `from_pretrained` when the model is given by name.
    max_length: sequences longer than this are cut; None never cuts.
    truncation_mode: "keep_end" or "keep_start".
    optimize_device_cache: free cached device memory after each `step()`.
    append_eos: end every text with one EOS token unless it has one.
    objective: nll, dft, iw, rwr, an entry point of isft.objectives, pkg.mod:attr or file.py:attr; objective_args: its arguments.
    on_nonfinite: "skip" leaves the weights alone when loss or gradient is not finite and counts it; "stop" raises.
    micro_batch_tokens: tokens a forward pass may hold; None is a function of model and machine.
    packing: rows lie end to end in one sequence and cannot see each other; None where that is faster and the model can.
    bf16: None means where the hardware computes in it.
    """

    logging_steps: float = 10
    bf16: bool | None = None
    model_init_kwargs: dict[str, Any] | str | None = None
    max_length: int | None = None
    truncation_mode: str = "keep_end"
    optimize_device_cache: bool = False
    append_eos: bool = True
    objective: str = "nll"
    objective_args: dict[str, Any] | None = None
    on_nonfinite: str = "skip"
    micro_batch_tokens: int | None = None
    packing: bool | None = None
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        """Raises ValueError for values outside their choices."""
        accelerator: bool = torch.accelerator.is_available()
        if not accelerator:
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and computes_bf16(torch.device("cpu" if self.use_cpu else "cuda"))
        super().__post_init__()
        _choice("truncation_mode", self.truncation_mode, ("keep_end", "keep_start"))
        _choice("on_nonfinite", self.on_nonfinite, ("skip", "stop"))


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bf16 natively."""
    if device.type == "cuda":
        return bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool((capable and capable()) or (amx and amx()))


def check_arguments(args: TrainingArguments) -> None:
    """Raises ValueError for every field that `step()` cannot honour and that differs from its default, all in one message."""
    plain = {"output_dir": args.output_dir, "use_cpu": args.use_cpu}
    usual = type(args)(**plain)
    problems: list[str] = []
    for entry in dataclasses.fields(args):
        name = entry.name
        if name.startswith("_") or name in ACTING or name in ACTED_ON_BY_TRANSFORMERS:
            continue
        value = getattr(args, name)
        if value == getattr(usual, name) or (name == "num_train_epochs" and value == 1):
            continue
        why = _WHY.get(name, "step() cannot honour it")
        problems.append(f"{name}={value!r} ({why}; the default is {getattr(usual, name)!r})")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer not in _OPTIMIZERS:
        problems.append(f"optim={optimizer!r} (one of {', '.join(_OPTIMIZERS)})")
    sampling = str(getattr(args, "train_sampling_strategy", "random"))
    if sampling not in ("random", "sequential"):
        problems.append(
            f"train_sampling_strategy={sampling!r} (random or sequential; steps sort by length on their own)"
        )
    save = str(getattr(args.save_strategy, "value", args.save_strategy))
    if save == "best":
        problems.append("save_strategy='best' (no, steps or epoch)")
    for kind in ("logging", "eval", "save"):
        strategy = getattr(args, f"{kind}_strategy")
        steps = getattr(args, f"{kind}_steps")
        active = str(getattr(strategy, "value", strategy)) == "steps"
        if active and steps is not None and 0 < steps < 1 and args.max_steps <= 0:
            problems.append(f"{kind}_steps={steps} (a fraction of max_steps, which is not set)")
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        problems.append(f"lr_scheduler_type={schedule!r} (its rate is no function of the step)")
    if problems:
        raise ValueError("IterativeSFTTrainer cannot honour: " + "; ".join(problems))


def settings_from_arguments(args: TrainingArguments) -> StepSettings:
    """The arguments as the core's settings."""
    kwargs: Any = getattr(args, "lr_scheduler_kwargs", None) or {}
    checkpointing: Any = args.gradient_checkpointing_kwargs
    objective: Any = getattr(args, "objective", "nll")
    arguments: Mapping[str, Any] | None = getattr(args, "objective_args", None)
    packing = getattr(args, "packing", None)
    return StepSettings(
        learning_rate=args.learning_rate,
        lr_scheduler_type=str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        lr_scheduler_kwargs=dict(kwargs),
        warmup=float(args.warmup_steps),
        optimizer=_OPTIMIZERS[str(getattr(args.optim, "value", args.optim))],
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_epsilon=args.adam_epsilon,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        label_smoothing=args.label_smoothing_factor,
        neftune_noise_alpha=args.neftune_noise_alpha,
        objective={"use": objective, "args": dict(arguments)} if arguments else objective,
        on_nonfinite=getattr(args, "on_nonfinite", "skip"),
        gradient_checkpointing=bool(args.gradient_checkpointing),
        gradient_checkpointing_kwargs=checkpointing,
        micro_batch_tokens=getattr(args, "micro_batch_tokens", None),
        layout={None: "auto", True: "packed", False: "padded"}[packing],
    )
