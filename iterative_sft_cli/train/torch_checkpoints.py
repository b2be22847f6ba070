"""Folders that `IterativeSFTTrainer` writes and reads.

Guarantee: a checkpoint appears whole or not at all; state is safetensors and JSON; only rank 0 writes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.train import torch_ranks, torch_state

STATE = "state"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_HISTORY = ("global_step", "epoch", "max_steps", "num_input_tokens_seen", "best_metric", "best_global_step")


def save_model(trainer: Any, folder: Path) -> None:
    """Model (or adapter) and tokenizer as a Hugging Face folder."""
    if torch_ranks.rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    trainer.model.save_pretrained(folder)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(folder)


def save_state(trainer: Any, folder: Path) -> None:
    """Masters, optimizer, counters, schedule position and log window."""
    if torch_ranks.rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    state: TrainerState = trainer.state
    scheduler = trainer.lr_scheduler.state_dict() if trainer.lr_scheduler is not None else None
    if scheduler is not None:
        scheduler = {key: value for key, value in scheduler.items() if _plain(value)}
    history = {name: getattr(state, name) for name in _HISTORY}
    history["log_history"] = state.log_history
    torch_state.save_state(
        trainer.core,
        folder,
        {
            "call_index": trainer.call_index,
            "inside": trainer._inside,
            "state": history,
            "window": trainer.window.to_json(),
            "scheduler": scheduler,
            "groups": _groups(trainer),
        },
    )


def _groups(trainer: Any) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in group.items() if key != "params" and _plain(value)}
        for group in trainer.core.optimizer.param_groups
    ]


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def load_state(trainer: Any, folder: Path) -> None:
    """Undo `save_state`; a `checkpoint-N` folder is looked into. Raises DataError for what does not fit."""
    if not (folder / torch_state.TRAINER).is_file() and (folder / STATE / torch_state.TRAINER).is_file():
        folder = folder / STATE
    record = torch_state.load_state(trainer.core, folder)
    if "call_index" not in record:
        raise DataError("state of the loop, not of a trainer", where=str(folder))
    if (record["scheduler"] is None) != (trainer.lr_scheduler is None):
        raise DataError("saved with another choice of scheduler", where=str(folder))
    inside = record["inside"]
    trainer.call_index = record["call_index"]
    trainer._inside = None if inside is None else (inside[0], inside[1])
    trainer.window.from_json(record["window"])
    for name, value in record["state"].items():
        setattr(trainer.state, name, value)
    if trainer.args.max_steps > 0:
        trainer.state.max_steps = trainer.args.max_steps
    if trainer.lr_scheduler is not None:
        trainer.lr_scheduler.load_state_dict({**trainer.lr_scheduler.state_dict(), **record["scheduler"]})
        for group, saved in zip(trainer.core.optimizer.param_groups, record["groups"], strict=True):
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})


def save_checkpoint(trainer: Any) -> Path:
    """`output_dir/checkpoint-N`, made beside and renamed in; then the oldest go, as `save_total_limit` says."""
    root = Path(trainer.args.output_dir)
    target = root / f"checkpoint-{trainer.state.global_step}"
    if torch_ranks.rank() != 0:
        return target
    root.mkdir(parents=True, exist_ok=True)
    fresh, old = root / f".{target.name}.new", root / f".{target.name}.old"
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    fresh.mkdir()
    save_model(trainer, fresh)
    write_model_card(trainer, fresh, None, None, None)
    if not trainer.args.save_only_model:
        save_state(trainer, fresh / STATE)
    record = {name: getattr(trainer.state, name) for name in _HISTORY} | {"log_history": trainer.state.log_history}
    (fresh / "trainer_state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    limit = trainer.args.save_total_limit
    if limit is not None and limit > 0:
        found = sorted(
            (int(match[1]), path)
            for path in root.iterdir()
            if (match := _CHECKPOINT.fullmatch(path.name)) and (path / "trainer_state.json").is_file()
        )
        for _, path in found[:-limit]:
            if str(path) != trainer.state.best_model_checkpoint:
                shutil.rmtree(path)
    return target


def remember_best(args: Any, state: TrainerState, metrics: Mapping[str, float]) -> None:
    """Keep the best value of `metric_for_best_model` and the checkpoint of that step in `state`."""
    name = args.metric_for_best_model
    if name is None:
        return
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        raise ValueError(f"metric_for_best_model {name!r} is not among {', '.join(metrics)}")
    value = metrics[name]
    better = (
        state.best_metric is None
        or (args.greater_is_better and value > state.best_metric)
        or (not args.greater_is_better and value < state.best_metric)
    )
    if better:
        state.best_metric = value
        state.best_global_step = state.global_step
        state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def write_model_card(
    trainer: Any, folder: Path, model_name: str | None, dataset_name: str | None, tags: Sequence[str] | None
) -> None:
    """`README.md` with the base model and how it was trained."""
    if torch_ranks.rank() != 0:
        return
    from iterative_sft_cli.train.torch_core import bare_model

    base = str(getattr(bare_model(trainer.model).config, "_name_or_path", "") or "")
    hub = base if base and not Path(base).exists() else None
    lines = ["---", "library_name: transformers"]
    if hub:
        lines.append(f"base_model: {json.dumps(hub)}")
    if dataset_name:
        lines.append(f"datasets: [{json.dumps(dataset_name)}]")
    lines.append("tags: " + json.dumps(sorted({"isft", "iterative-sft", *(tags or ())})))
    lines += ["---", "", f"# {model_name or Path(trainer.args.output_dir).name}", ""]
    lines.append("Fine-tuned with iterative supervised fine-tuning (isft).")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
