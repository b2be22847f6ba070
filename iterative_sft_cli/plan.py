"""What a run will do, round by round, before it is run: lineage, samples, steps, tokens and disk at most; no model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iterative_sft_cli.config import LoadedConfig
from iterative_sft_cli.plan_memory import describe_memory, render_memory
from iterative_sft_cli.prompts import PromptHistory, load_prompts, num_per_round, read_source, select_round
from iterative_sft_cli.train.pool import num_seed_rows, num_steps, pool_rounds
from iterative_sft_cli.types import Prompt

CONDITIONS = (
    "stop_if",
    "rollback_if",
    "min_accepted",
    "min_accept_rate",
    "max_truncated_rate",
    "max_tokens",
    "max_hours",
)
"""Guards that can end a run or change its lineage."""

BYTES_PER_SAMPLE_TOKEN = 9
"""Bytes of a generated shard per token: its id and its text."""
BYTES_PER_SAMPLE = 400
"""Bytes of a sample's other fields and verdicts."""


def describe_plan(loaded: LoadedConfig, *, gpus: int = 1, gpu_gb: float | None = None) -> dict[str, Any]:
    """The plan of every round as plain data. Counts are upper bounds: they assume that every sample is accepted.

    `gpus`: so many processes, each on a GPU of `gpu_gb` (None: this machine's memory).
    """
    config = loaded.config
    prompts = load_prompts(config.prompts, base_dir=loaded.base_dir).prompts
    eval_prompts = (
        load_prompts(config.eval, base_dir=loaded.base_dir, inherit=config.prompts).prompts if config.eval else []
    )
    seed_rows = count_seed_rows(config.train.mix, loaded.base_dir)
    at = [config.at_round(round_index) for round_index in range(1, config.rounds + 1)]
    made = [samples_of(one, prompts, index) for index, one in enumerate(at, start=1)]
    accepted = [accepted_of(one, made[index - 1], prompts, index) for index, one in enumerate(at, start=1)]
    rounds: list[dict[str, Any]] = []
    for round_index, one in enumerate(at, start=1):
        pool = pool_rounds(one.train.data, round_index)
        num_samples = made[round_index - 1]
        rows = rows_of(one, sum(accepted[r - 1] for r in pool), seed_rows)
        decoding = one.generate.decoding()
        rounds.append(
            {
                "round": round_index,
                "generate_with": generating_names(one, round_index),
                "start_from": starting_name(one, round_index),
                "data": data_name(one, pool),
                "num_prompts": prompts_of(one, prompts, round_index),
                "num_samples": num_samples,
                "stops": stops_of(one),
                "max_tokens": num_samples * int(one.generate.max_new_tokens),
                "max_rows": rows,
                "max_steps": sum(steps_of(one, rows)),
                "temperature": float(decoding.temperature) if decoding.do_sample else 0.0,
                "search": search_of(one),
                "learning_rate": float(one.train.learning_rate),
                "filters": [describe_filter(entry) for entry in one.filters],
                "thresholds": thresholds_of(one),
            }
        )
    weights = weight_bytes(config.model.path)
    copies = min(config.rounds, config.checkpoints.keep) + bool(config.checkpoints.keep_best)
    state = 6 * weights * min(2, config.rounds) if weights and config.train.start_from == "previous" else 0
    samples = sum(r["max_tokens"] * BYTES_PER_SAMPLE_TOKEN + r["num_samples"] * BYTES_PER_SAMPLE for r in rounds)
    return {
        "output_dir": config.output_dir,
        "warmup": warmup_of(config, loaded.base_dir),
        "rounds": rounds,
        "eval_samples": len(eval_prompts) * int(config.eval.samples_per_prompt) if config.eval else 0,
        "memory": describe_memory(loaded, prompts, gpus=gpus, gpu_gb=gpu_gb),
        "guards": {name: value for name in CONDITIONS if (value := getattr(config.guards, name)) is not None},
        "disk": {
            "samples_bytes": samples,
            "checkpoint_bytes": weights * copies if weights else None,
            "state_bytes": state if weights else None,
        },
        "warnings": list(loaded.warnings),
    }


def prompts_of(config: Any, prompts: Sequence[Prompt], round_index: int) -> int:
    """How many prompts a round asks at most; of a curriculum without conditions, those in the window."""
    most = num_per_round(config.prompts.per_round, len(prompts))
    curriculum = config.prompts.curriculum
    if config.prompts.order != "curriculum" or curriculum is None or curriculum.promote_if is not None:
        return most
    history: dict[str, PromptHistory] = {}
    section = config.prompts.model_copy(update={"skip": None})
    return len(select_round(prompts, section, round_index=round_index, seed=0, history=history))


def samples_of(config: Any, prompts: Sequence[Prompt], round_index: int) -> int:
    """How many samples a round draws at most, pilot and second tries included."""
    count = prompts_of(config, prompts, round_index)
    each = int(config.generate.samples_per_prompt)
    if config.generate.budget is not None and config.generate.budget.kind == "gvm":
        each += config.generate.budget.pilot
    hinted = 0 if config.rationalize is None else int(config.rationalize.samples_per_prompt)
    return count * (each + hinted)


def accepted_of(config: Any, num_samples: int, prompts: Sequence[Prompt], round_index: int) -> int:
    """How many samples of a round can be accepted at most."""
    section = config.generate
    if section.until_total is not None:
        return min(num_samples, int(section.until_total))
    if section.until_accepted is not None:
        return min(num_samples, int(section.until_accepted) * prompts_of(config, prompts, round_index))
    return num_samples


def rows_of(config: Any, accepted: int, seed_rows: int) -> int:
    """How many rows a round trains on at most."""
    section = config.train
    rows = accepted * (len(section.formats) if section.formats is not None else 1)
    if section.max_rows is not None:
        rows = min(rows, int(section.max_rows))
    if section.mix is None:
        return rows
    share = 1.0 if section.mix.share == "all" else float(section.mix.share)
    return rows + num_seed_rows(share, rows, seed_rows)


def steps_of(config: Any, rows: int) -> list[int]:
    """Optimizer steps of each pass at most."""
    section = config.train
    settings = [section.model_copy(update=one.overrides()) for one in section.passes or []] or [section]
    return [
        num_steps(
            rows,
            epochs=None if one.epochs is None else float(one.epochs),
            steps=None if one.steps is None else int(one.steps),
            batch_size=int(one.batch_size),
        )
        for one in settings
    ]


def count_seed_rows(section: Any, base_dir: Path) -> int:
    """Rows of the seed data, 0 without any; a data set on the hub counts 0, so that nothing is fetched."""
    if section is None or section.path is None:
        return 0
    return len(read_source(section, base_dir, "train.mix")[0])


def warmup_of(config: Any, base_dir: Path) -> dict[str, Any] | None:
    """Round 0's training, None without a warm-up."""
    if config.warmup is None:
        return None
    section = config.warmup.training(config.at_round(1).train)
    rows = count_seed_rows(config.warmup, base_dir)
    steps = steps_of(config.model_copy(update={"train": section}), rows)
    return {"num_rows": rows, "num_steps": sum(steps), "learning_rate": float(section.learning_rate)}


def stops_of(config: Any) -> str | None:
    """What may end a round's draws before all samples are made, in words."""
    section = config.generate
    if section.budget is not None:
        each = f", up to {section.until_accepted} accepted of the hardest" if section.until_accepted is not None else ""
        return f"shared out by {section.budget.kind} after {section.budget.pilot} of each prompt{each}"
    if section.until_accepted is not None:
        return f"until {section.until_accepted} of a prompt are accepted"
    return f"until {section.until_total} are accepted" if section.until_total is not None else None


def search_of(config: Any) -> dict[str, Any] | None:
    """What a trial before the round chooses among."""
    section = config.generate.search
    if section is None:
        return None
    return {"temperature": list(section.temperature), "min": list(section.min), "prompts": section.prompts}


def thresholds_of(config: Any) -> list[str]:
    """Every limit on a score in a round: of `threshold` filters, and of the passes of training."""
    found = []
    for entry in config.filters:
        if entry.use == "threshold":
            by, low, high = entry.args.get("by", entry.bare), entry.args.get("min"), entry.args.get("max")
            limits = [f"{sign} {value:g}" for sign, value in ((">=", low), ("<=", high)) if value is not None]
            found.append(f"{by} {' and '.join(limits)}".strip())
    passes = [f"{one.by} >= {one.threshold:g}" for one in config.train.passes or [] if one.threshold is not None]
    return found + ([f"passes at {', then '.join(passes)}"] if passes else [])


def data_name(config: Any, pool: Sequence[int]) -> str:
    """The rows a round trains on, in words."""
    section = config.train
    name = f"round {pool[0]}" if len(pool) == 1 else f"rounds {pool[0]} to {pool[-1]}"
    if section.new_share is not None:
        name += f", {float(section.new_share):.0%} of them new"
    if section.max_rows is not None:
        name += f", at most {section.max_rows} rows ({section.evict} leave)"
    if section.mix is not None:
        share = section.mix.share
        name += ", with all seed data" if share == "all" else f", with {float(share):.0%} seed data"
    if section.formats is not None:
        name += f", in {len(section.formats)} forms" if len(section.formats) > 1 else ", rewritten"
    return name


def generating_names(config: Any, round_index: int) -> str:
    """Which weights generate a round, in words; several with their shares."""
    source = config.generate.from_
    if isinstance(source, str):
        return generating_name(config, source, round_index)
    return " and ".join(f"{generating_name(config, one.model, round_index)} ({one.share:.0%})" for one in source)


def generating_name(config: Any, source: str, round_index: int) -> str:
    """One source of samples, in words."""
    if source == "current":
        return current_name(config, round_index)
    return {"best": "the best checkpoint by eval", "warmup": "checkpoint 0000 (warm-up)"}.get(source, source)


def current_name(config: Any, round_index: int) -> str:
    """The weights that the round before left."""
    if round_index > 1:
        return f"checkpoint {round_index - 1:04d}"
    return "the starting model" if config.warmup is None else "checkpoint 0000 (warm-up)"


def starting_name(config: Any, round_index: int) -> str:
    """Which weights a round's training starts from, in words."""
    start = config.train.start_from
    if start == "previous":
        return current_name(config, round_index)
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
    warmup = plan["warmup"]
    if warmup is not None:
        lines.append(
            f"round 0:\n  warm-up   {warmup['num_steps']} steps on {warmup['num_rows']} seed rows, learning rate {warmup['learning_rate']:g}"
        )
    for row in plan["rounds"]:
        lines += [f"round {row['round']}:", *render_round(row)]
    if plan["eval_samples"]:
        lines.append(f"eval: {plan['eval_samples']} samples, at the start and after every evaluated round")
    lines += [f"{name}: {value}" for name, value in plan["guards"].items()]
    disk = plan["disk"]
    lines.append(f"disk: samples at most {size(disk['samples_bytes'])}")
    if disk["checkpoint_bytes"] is not None:
        lines.append(
            f"      checkpoints {size(disk['checkpoint_bytes'])}, optimizer state {size(disk['state_bytes'])} at most"
        )
    lines += render_memory(plan["memory"])
    lines += [f"warning: {warning}" for warning in plan["warnings"]]
    return "\n".join(lines)


def render_round(row: dict[str, Any]) -> list[str]:
    """The lines of one round: weights, samples, temperature, thresholds, data, steps."""
    search = row["search"]
    heat = f"temperature {row['temperature']:g}" if row["temperature"] else "greedy"
    if search is not None and search["temperature"]:
        heat = f"temperature searched among {', '.join(f'{t:g}' for t in search['temperature'])}"
    stops = f", {row['stops']}" if row["stops"] else ""
    lines = [
        f"  generate  {row['num_samples']} samples of {row['num_prompts']} prompts with {row['generate_with']}, {heat}{stops}, "
        f"at most {row['max_tokens']:,} tokens",
        f"  filter    {' > '.join(row['filters']) or 'none'}",
    ]
    if row["thresholds"]:
        chosen = (
            f" (min searched among {', '.join(f'{t:g}' for t in search['min'])})" if search and search["min"] else ""
        )
        lines.append(f"  threshold {'; '.join(row['thresholds'])}{chosen}")
    lines.append(
        f"  train     from {row['start_from']} on the accepted samples of {row['data']}, "
        f"at most {row['max_rows']} rows, {row['max_steps']} steps, learning rate {row['learning_rate']:g}"
    )
    return lines


def size(num_bytes: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
