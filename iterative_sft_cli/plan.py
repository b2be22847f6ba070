"""What a run will do, round by round, before it is run: lineage, samples, steps, tokens and disk at most; no model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iterative_sft_cli.config import LoadedConfig
from iterative_sft_cli.prompts import load_prompts, num_per_round
from iterative_sft_cli.train.pool import num_steps, pool_rounds

BYTES_PER_SAMPLE_TOKEN = 9
"""Bytes of a generated shard per token: its id and its text."""
BYTES_PER_SAMPLE = 400
"""Bytes of a sample's other fields and verdicts."""


def describe_plan(loaded: LoadedConfig) -> dict[str, Any]:
    """The plan of every round as plain data. Counts are upper bounds: they assume that every sample is accepted."""
    config = loaded.config
    prompts = load_prompts(config.prompts, base_dir=loaded.base_dir)
    eval_prompts = (
        load_prompts(config.eval, base_dir=loaded.base_dir, inherit=config.prompts).prompts if config.eval else []
    )
    rounds: list[dict[str, Any]] = []
    for round_index in range(1, config.rounds + 1):
        at = config.at_round(round_index)
        num_prompts = num_per_round(at.prompts.per_round, len(prompts.prompts))
        num_samples = num_prompts * int(at.generate.samples_per_prompt)
        pool = pool_rounds(at.train.data, round_index)
        rows = sum(
            num_per_round(config.at_round(r).prompts.per_round, len(prompts.prompts))
            * int(config.at_round(r).generate.samples_per_prompt)
            for r in pool
        )
        rounds.append(
            {
                "round": round_index,
                "generate_with": generating_name(at, round_index),
                "start_from": starting_name(at, round_index),
                "data": f"round {pool[0]}" if len(pool) == 1 else f"rounds {pool[0]} to {pool[-1]}",
                "num_prompts": num_prompts,
                "num_samples": num_samples,
                "max_tokens": num_samples * int(at.generate.max_new_tokens),
                "max_steps": num_steps(
                    rows,
                    epochs=None if at.train.epochs is None else float(at.train.epochs),
                    steps=None if at.train.steps is None else int(at.train.steps),
                    batch_size=int(at.train.batch_size),
                ),
                "temperature": float(at.generate.temperature),
                "learning_rate": float(at.train.learning_rate),
                "filters": [describe_filter(entry) for entry in at.filters],
            }
        )
    weights = weight_bytes(config.model.path)
    copies = min(config.rounds, config.checkpoints.keep) + bool(config.checkpoints.keep_best)
    state = 6 * weights * min(2, config.rounds) if weights and config.train.start_from == "previous" else 0
    samples = sum(r["max_tokens"] * BYTES_PER_SAMPLE_TOKEN + r["num_samples"] * BYTES_PER_SAMPLE for r in rounds)
    return {
        "output_dir": config.output_dir,
        "rounds": rounds,
        "eval_samples": len(eval_prompts) * int(config.eval.samples_per_prompt) if config.eval else 0,
        "disk": {
            "samples_bytes": samples,
            "checkpoint_bytes": weights * copies if weights else None,
            "state_bytes": state if weights else None,
        },
        "warnings": list(loaded.warnings),
    }


def generating_name(config: Any, round_index: int) -> str:
    """Which weights generate a round, in words."""
    source = config.generate.from_
    if source == "current":
        return "the starting model" if round_index == 1 else f"checkpoint {round_index - 1:04d}"
    return str(source)


def starting_name(config: Any, round_index: int) -> str:
    """Which weights a round's training starts from, in words."""
    start = config.train.start_from
    if start == "previous":
        return "the starting model" if round_index == 1 else f"checkpoint {round_index - 1:04d}"
    return {"base": "base", "warmup": "checkpoint 0000 (warm-up)", "best": "the best checkpoint by eval"}[start]


def describe_filter(entry: Any) -> str:
    """A filter entry with its arguments of the round."""
    arguments = ([str(entry.bare)] if entry.bare is not None else []) + [f"{k}={v}" for k, v in entry.args.items()]
    return f"{entry.name}({', '.join(arguments)})" if arguments else str(entry.name)


def weight_bytes(path: str | None) -> int | None:
    """Size of a local model folder's weights; None for a hub id."""
    folder = Path(path) if path else None
    if folder is None or not folder.is_dir():
        return None
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def render_plan(plan: dict[str, Any]) -> str:
    """The plan as text, a block a round."""
    lines = [f"output: {plan['output_dir']}"]
    for row in plan["rounds"]:
        lines += [
            f"round {row['round']}:",
            f"  generate  {row['num_samples']} samples of {row['num_prompts']} prompts with {row['generate_with']}, "
            f"temperature {row['temperature']:g}, at most {row['max_tokens']:,} tokens",
            f"  filter    {' > '.join(row['filters']) or 'none'}",
            f"  train     from {row['start_from']} on the accepted samples of {row['data']}, "
            f"at most {row['max_steps']} steps, learning rate {row['learning_rate']:g}",
        ]
    if plan["eval_samples"]:
        lines.append(f"eval: {plan['eval_samples']} samples, at the start and after every evaluated round")
    disk = plan["disk"]
    lines.append(f"disk: samples at most {size(disk['samples_bytes'])}")
    if disk["checkpoint_bytes"] is not None:
        lines.append(
            f"      checkpoints {size(disk['checkpoint_bytes'])}, optimizer state {size(disk['state_bytes'])} at most"
        )
    lines += [f"warning: {warning}" for warning in plan["warnings"]]
    return "\n".join(lines)


def size(num_bytes: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
