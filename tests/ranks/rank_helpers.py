"""Experiments that several ranks share, and what of their runs must be the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from toy_config import TOY_CONFIG, merge

VOLATILE = {
    "run.json",
    "telemetry.jsonl",
    "LOCK",
    "outcome.json",
    "isft-run.json",
    "environment.json",
    "config.yaml",
    "resolved.yaml",
}
QUICK = {"ISFT_RANK_PATIENCE_S": "0.5,10,60,60"}
AGAIN: dict[str, Any] = {"train": {"start_from": "base", "optimizer_state": "fresh"}, "rounds": 2}
"""Weights are read back after every round, so that every call of the learner is made."""
PIECES = {**AGAIN, "train": {**AGAIN["train"], "parallel": "fsdp2"}}
LORA = {"model": {"adapter": {"type": "lora", "r": 4, "alpha": 8}}}


def contents(run: Path) -> dict[str, str]:
    """Hashes of everything that the same run leaves the same, wherever it was made."""
    found = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        if path.name in VOLATILE or path.name == "MANIFEST.json" or {"quarantine", "cache"} & set(path.parts):
            continue
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def steps(run: Path) -> list[dict[str, Any]]:
    """The optimizer steps of a run."""
    return [row for row in rows(run / "ledger.jsonl") if row["event"] == "step"]


def write_toy_many(folder: Path, output: str, **changes: Any) -> Path:
    """The toy experiment over 200 prompts x 8 samples: four shards a round."""
    folder.mkdir(exist_ok=True)
    data = [{"question": f"{a}+{b}", "answer": str(a + b), "level": a} for a in range(20) for b in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data[:200]))
    (folder / "dev.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data[200:]))
    more = {"rounds": 2, "prompts": {"per_round": 200}, "generate": {"samples_per_prompt": 8}}
    config = merge(merge(TOY_CONFIG, more), changes)
    config["train"]["batch_size"] = 64
    config["eval"]["samples_per_prompt"] = 16
    config["output_dir"] = str(folder / output)
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def write_tiny(folder: Path, output: str, source: Path, **changes: Any) -> Path:
    """A two-round experiment on a tiny Llama in fp32."""
    for name, start, number in (("prompts", 0, 7), ("dev", 50, 3)):
        lines = [{"question": f"{n} + 1", "answer": str(n + 1)} for n in range(start, start + number)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "model": {"path": str(source), "device": "cpu", "dtype": "float32"},
        "output_dir": str(folder / output),
        "rounds": 2,
        "seed": 3,
        "prompts": {"path": "prompts.jsonl", "prompt": "question", "answer": "answer"},
        "generate": {"samples_per_prompt": 3, "max_new_tokens": 6},
        "filters": ["nonempty", "dedup"],
        "train": {"start_from": "previous", "data": "accumulate", "epochs": 1, "learning_rate": 1e-3, "batch_size": 6},
        "eval": {"path": "dev.jsonl", "samples_per_prompt": 1, "correct": ["nonempty"]},
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(merge(config, changes), sort_keys=False))
    return path


def weights_of(run: Path, key: str) -> dict[str, Any]:
    """The full-precision weights of a checkpoint."""
    from safetensors.numpy import load_file

    found: dict[str, Any] = load_file(run / "checkpoints" / key / "state" / "masters.safetensors")
    return found
