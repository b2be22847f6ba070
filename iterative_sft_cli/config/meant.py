"""Guesses what an unknown or missing key was meant to be: typing errors, other tools' names, and the right key in another section."""

from __future__ import annotations

from iterative_sft_cli.config.findings import Step, nearest, one_of
from iterative_sft_cli.config.problems import dotted
from iterative_sft_cli.config.walk import keys_of, leaves, section_at

# Names that other tools and papers use, and ours.
SYNONYMS: dict[str, str] = {
    "accumulate": "train.data: accumulate",
    "adam_epsilon": "train.optimizer",
    "batch": "train.batch_size",
    "best_of_n": "an entry of filters",
    "beam": "generate.do_sample",
    "ckpt": "checkpoints",
    "chat_template": "prompts.template",
    "columns": "prompts.prompt and prompts.answer",
    "dev": "eval",
    "device_map": "model.device",
    "evaluation": "eval",
    "flash_attention": "model.attention: flash_attention_2",
    "attn_implementation": "model.attention",
    "fewshot": "prompts.few_shot",
    "gold": "prompts.answer",
    "gpu_memory_utilization": "generate.vllm.gpu_memory_utilization",
    "gradient_accumulation_steps": "train.batch_size (samples in one optimizer step)",
    "per_device_train_batch_size": "train.batch_size (samples in one optimizer step)",
    "train_batch_size": "train.batch_size",
    "micro_batch_size": "train.micro_batch_tokens",
    "greedy": "generate.do_sample: false",
    "iterations": "rounds",
    "num_iterations": "rounds",
    "num_rounds": "rounds",
    "init_from": "train.start_from",
    "iters": "rounds",
    "lora": "model.adapter",
    "lora_alpha": "model.adapter.alpha",
    "lora_dropout": "model.adapter.dropout",
    "lora_r": "model.adapter.r",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "scheduler": "train.lr_scheduler_type",
    "max_grad": "train.max_grad_norm",
    "clip_grad": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "max_length_prompt": "train.max_length",
    "max_seq_length": "train.max_length",
    "max_seq_len": "train.max_length",
    "max_new_token": "generate.max_new_tokens",
    "max_tokens": "generate.max_new_tokens",
    "max_completion_length": "generate.max_new_tokens",
    "max_model_len": "generate.vllm.max_model_len",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "peft": "model.adapter",
    "n": "generate.samples_per_prompt",
    "k": "generate.samples_per_prompt",
    "num_generations": "generate.samples_per_prompt",
    "num_return_sequences": "generate.samples_per_prompt",
    "num_samples": "generate.samples_per_prompt",
    "samples_per_question": "generate.samples_per_prompt",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "epoch": "train.epochs",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "optim": "train.optimizer",
    "out_dir": "output_dir",
    "output": "output_dir",
    "run_dir": "output_dir",
    "save_dir": "output_dir",
    "pool": "train.data",
    "precision": "model.dtype",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: float16",
    "load_in_4bit": "model.quantization: 4bit",
    "load_in_8bit": "model.quantization: 8bit",
    "reference": "prompts.answer",
    "target": "prompts.answer",
    "solution": "prompts.answer",
    "question": "prompts.prompt",
    "query": "prompts.prompt",
    "data": "prompts",
    "dataset": "prompts.dataset",
    "report_to": "tracking",
    "logging": "tracking",
    "logger": "tracking",
    "wandb": "tracking: wandb",
    "reward": "an entry of filters",
    "rewards": "filters",
    "verifier": "filters",
    "verifiers": "filters",
    "score": "an entry of filters",
    "save_steps": "checkpoints.every_steps",
    "save_total_limit": "checkpoints.keep",
    "eval_steps": "eval.every",
    "sft": "warmup",
    "start": "train.start_from",
    "start_weights": "train.start_from",
    "stop_strings": "generate.stop",
    "stop_sequences": "generate.stop",
    "system_prompt": "prompts.system",
    "temp": "generate.temperature",
    "warmup_steps": "train.warmup_ratio",
    "window": "train.data: {window: n}",
    "hint": "template",
}
# What to write where a required key is missing.
REQUIRED: dict[str, str] = {
    "model": "a hub id or a folder",
    "output_dir": "a folder, such as runs/first",
    "rounds": "a number of rounds",
    "prompts": "a mapping with path (or dataset, reasoning_gym, use)",
    "train": "a mapping with start_from and data",
    "start_from": "previous, base, best or warmup (published methods disagree, so there is no default)",
    "data": "replace, accumulate or {window: n} (published methods disagree, so there is no default)",
    "share": "a share between 0 and 1",
    "template": "the hinted prompt, with {answer} in it",
    "id": "a hub id",
    "task": "the name of a task, such as chain_sum",
    "column": "the name of a column",
    "window": "a number of rounds",
    "use": "the name of a filter",
    "model_of_list": "current, base, best, warmup, a hub id or a folder",
    "tasks": "a list of tasks",
}


def key_meant(path: tuple[Step, ...]) -> str | None:
    """What the unknown key at `path` was probably meant to be: a typing error, another tool's name, a key of another section."""
    word, parent = str(path[-1]).casefold(), path[:-1]
    section = section_at(parent)
    siblings = keys_of(section) if section is not None else []
    close = nearest(word, siblings, 0.8)
    if close is not None:
        return close
    synonym = nearest(word, SYNONYMS, 0.9)
    if synonym is not None:
        inside = dotted(parent) + "."
        return SYNONYMS[synonym].removeprefix(inside) if parent else SYNONYMS[synonym]
    elsewhere = [leaf.path for leaf in leaves() if leaf.path.rpartition(".")[2] == word and "[]" not in leaf.path]
    if elsewhere:
        return one_of(sorted(elsewhere, key=lambda path: path.count("."))[:2])
    return nearest(word, siblings) or nearest(word, {leaf.path.rpartition(".")[2] for leaf in leaves()}, 0.85)


def keys_expected(path: tuple[Step, ...]) -> str | None:
    """The keys that may stand where the unknown one does, if they are few enough to list."""
    section = section_at(path[:-1])
    keys = keys_of(section) if section is not None else []
    return one_of(keys) if 0 < len(keys) <= 16 else None
