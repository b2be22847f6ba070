"""The toy experiment as files: a config, prompts and a dev set, whose whole run takes milliseconds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

TOY_CONFIG: dict[str, Any] = {
    "model": {"use": f"{Path(__file__).resolve().parent / 'toy_backend.py'}:make"},
    "output_dir": "run",
    "rounds": 3,
    "seed": 7,
    "prompts": {
        "path": "prompts.jsonl",
        "prompt": "question",
        "answer": "answer",
        "per_round": 12,
        "order": "sequential",
    },
    "generate": {"samples_per_prompt": 4, "max_new_tokens": 64},
    "filters": ["finished", "numeric_answer", "dedup"],
    "train": {"start_from": "previous", "data": "replace", "epochs": 2, "learning_rate": 0.1, "batch_size": 4},
    "eval": {"path": "dev.jsonl", "samples_per_prompt": 2},
}


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` with `changes`, sharing nothing with `tree`."""
    out = copy.deepcopy(tree)
    for key, value in changes.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def write_toy(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """A toy experiment in `folder`: prompts, dev set and config; returns the config's path."""
    rows = [{"question": f"{a}+{b}", "answer": str(a + b), "level": a} for a in range(6) for b in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:24]))
    (folder / "dev.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[24:]))
    config = merge(TOY_CONFIG, changes or {})
    config["output_dir"] = str(folder / str(config["output_dir"]))
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
