"""`isft plan --probe`: what a run will cost, from a short one on this machine: time, peak memory, disk, accepted share.

The short run is the real loop on a few prompts, in a process and a folder of its own; it ends when a second round is judged,
so that what the first round taught shows in the accepted share. Later rounds are taken to accept as much as that one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.config import LoadedConfig
from iterative_sft_cli.console import Console, PhaseView, duration
from iterative_sft_cli.errors import ConfigError, DataError, IsftError, PluginError
from iterative_sft_cli.plan import count_seed_rows, rows_of, size, steps_of
from iterative_sft_cli.report.fetch import size_of
from iterative_sft_cli.rounds.evaluation import is_due
from iterative_sft_cli.train.pool import pool_rounds

MAX_SAMPLES = 512
"""Samples of a probed round: a shard, so that batches are as full as in the run."""
MAX_TOKENS = 1 << 17
"""Tokens that a probed round may draw at most."""
MIN_PROMPTS = 4
MAX_EVAL_SAMPLES = 256
MAX_WARMUP_STEPS = 20


class Enough(Exception):
    """The probe has seen what it came for."""


class ProbeView(Console):
    """Says nothing, notes when the first phase begins, and ends the run where the second round would train."""

    def __init__(self) -> None:
        super().__init__(sys.stderr, quiet=True)
        self.began: float | None = None

    @contextmanager
    def phase(self, name: str, round_index: int, total: int, unit: str) -> Iterator[PhaseView]:
        """A phase that is timed by the run itself."""
        if self.began is None:
            self.began = time.monotonic()
        if name == "train" and round_index == 2:
            raise Enough
        with super().phase(name, round_index, total, unit) as view:
            yield view


def probe_overrides(config: Any, folder: Path) -> list[str]:
    """What makes the config's run a short one: few prompts, two rounds, little evaluation, nothing that stops it."""
    at = config.at_round(1)
    each = int(at.generate.samples_per_prompt)
    by_tokens = MAX_TOKENS // (each * max(1, int(at.generate.max_new_tokens)))
    num_prompts = max(MIN_PROMPTS, min(MAX_SAMPLES // each, by_tokens))
    limit = 2 * num_prompts if config.prompts.limit is None else min(config.prompts.limit, 2 * num_prompts)
    found = [
        f"output_dir={json.dumps(str(folder))}",
        f"rounds={min(2, config.rounds)}",
        f"prompts.limit={limit}",
        "guards={on_empty: skip}",
        "tracking=[]",
        "samples={}",
    ]
    if isinstance(config.prompts.per_round, int) or config.prompts.per_round == "all":
        found.append(f"prompts.per_round={num_prompts}")
    if config.eval is not None:
        prompts = max(1, MAX_EVAL_SAMPLES // max(1, int(config.eval.samples_per_prompt)))
        found += [f"eval.limit={min(prompts, config.eval.limit or prompts)}", "eval.every=1000"]
    if config.warmup is not None:
        found += [
            "warmup.epochs=null",
            f"warmup.steps={min(MAX_WARMUP_STEPS, config.warmup.steps or MAX_WARMUP_STEPS)}",
        ]
    return found


def run_probe(loaded: LoadedConfig) -> dict[str, Any]:
    """Run the short experiment in a process of its own and return what was measured. Raises the error that stopped it."""
    with tempfile.TemporaryDirectory(prefix="isft-probe-") as name:
        asked = {
            "resolved": loaded.merged,
            "base_dir": str(loaded.base_dir),
            "path": str(loaded.path),
            "overrides": probe_overrides(loaded.config, Path(name) / "run"),
        }
        command = [sys.executable, "-m", "iterative_sft_cli.probe"]
        start = time.monotonic()
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            words = done.stderr.strip().splitlines()
            kinds: dict[int, type[IsftError]] = {one.exit_code: one for one in (ConfigError, PluginError)}
            what = f"the probe failed: {words[-1] if words else 'its process ended without a word'}"
            raise kinds.get(done.returncode, DataError)(what, hint="isft train CONFIG --limit 8 shows more of it")
        measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return {**measured, "wall_s": time.monotonic() - start}


def main() -> int:
    """The probe's process: reads the config as JSON from stdin, prints what was measured as JSON on stdout."""
    from iterative_sft_cli import system
    from iterative_sft_cli.experiment import run_experiment
    from iterative_sft_cli.rundir import peek
    from iterative_sft_cli.samples import iter_round

    start = time.monotonic()
    asked = json.loads(sys.stdin.read())
    view = ProbeView()
    try:
        loaded = LoadedConfig.from_resolved(
            asked["resolved"],
            source=b"",
            path=Path(asked["path"]),
            overrides=asked["overrides"],
            base_dir=Path(asked["base_dir"]),
        )
        run_experiment(loaded, view=view, resume="never")
    except Enough:
        pass
    except IsftError as error:
        print(" ".join(error.render().split()), file=sys.stderr)
        return error.exit_code
    end = time.monotonic()
    folder = Path(loaded.config.output_dir)
    run = peek(folder)
    assert run is not None
    last = max((index for index in run.rounds if index > 0), default=0)
    seen = [(one.sample.prompt_id, one.accepted) for one in iter_round(run.shards, last)] if last else []
    counts = {
        "num_samples": len(seen),
        "num_accepted": sum(accepted for _, accepted in seen),
        "num_prompts": len({prompt_id for prompt_id, _ in seen}),
    }
    measured = {
        "start_s": (view.began or end) - start,
        "phases_s": end - (view.began or end),
        "telemetry": run.telemetry_rows(),
        "stats": run.stats_rows(),
        "last": counts,
        "peak_bytes": system.peak_memory(),
        "accelerator_bytes": accelerator_peak(),
        "bytes": folder_bytes(folder),
        "eval_samples": _count(run, 0, "eval-"),
        "first": _first(run),
    }
    print(json.dumps(measured))
    return 0


def accelerator_peak() -> int | None:
    """The most memory that torch held on an accelerator; None without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return sum(int(torch.cuda.max_memory_reserved(i)) for i in range(torch.cuda.device_count()))


def _count(run: Any, round_index: int, prefix: str) -> int:
    return sum(len(run.shards.read(round_index, name)[0]) for name in run.shards.names(round_index, prefix))


def _first(run: Any) -> dict[str, int]:
    rows = run.shards.read(1, "train")
    if rows is None:
        return {"num_rows": 0, "row_tokens": 0, "num_steps": 0}
    tokens = sum(row["num_tokens"] for row in rows[0])
    return {"num_rows": len(rows[0]), "row_tokens": tokens, "num_steps": int(rows[1]["num_steps"])}


def folder_bytes(run: Path) -> dict[str, int]:
    """Bytes of the parts of a run: a checkpoint's model, its optimizer state, the samples of the first round, an evaluation."""
    keys = sorted((run / "checkpoints").glob("*"))
    newest = keys[-1] if keys else None
    whole = size_of(newest) if newest else 0
    state = size_of(newest / "state") if newest else 0
    first = run / "rounds" / "0001"
    shards = [path for path in first.glob("*.jsonl*") if not path.name.startswith("eval")]
    return {
        "model": whole - state,
        "state": state,
        "samples": sum(path.stat().st_size for path in shards),
        "eval": sum(path.stat().st_size for path in (run / "rounds" / "0000").glob("eval-*")),
    }


@dataclass(frozen=True, slots=True)
class Rates:
    """What the probe measured, a unit of work each."""

    start_s: float
    sample_s: float
    eval_sample_s: float
    token_s: float | None
    warmup_step_s: float
    save_s: float
    other_s: float
    samples_per_prompt: float
    accept_rate: float
    row_tokens: float


def rates_of(measured: Mapping[str, Any]) -> Rates:
    """Units of work from a probe's telemetry and shards."""
    seconds: dict[tuple[str, int], float] = {}
    tokens: dict[int, int] = {}
    for row in measured["telemetry"]:
        if isinstance(row.get("seconds"), int | float) and row.get("event") in ("generate", "filters", "eval", "train"):
            key = (row["event"], int(row["round"]))
            seconds[key] = seconds.get(key, 0.0) + float(row["seconds"])
            if row["event"] == "train":
                tokens[key[1]] = int(row.get("num_tokens") or 0)
    saves = [float(row["seconds"]) for row in measured["telemetry"] if row.get("event") == "save"]
    stats = {row["round"]: row for row in measured["stats"]}
    first, last = stats.get(1, {}), measured["last"]
    drawn = int(first.get("generate/num_samples", 0)) + int(last["num_samples"]) * (("generate", 2) in seconds)
    drawing = sum(value for (event, _), value in seconds.items() if event in ("generate", "filters"))
    train_s = seconds.get(("train", 1), 0.0)
    known = sum(seconds.values()) + sum(saves)
    num_rounds = max(1, len({index for (event, index) in seconds if event == "generate"}))
    steps = [row for row in measured["telemetry"] if row.get("event") == "train" and row.get("round") == 0]
    made = measured["first"]
    return Rates(
        start_s=float(measured["start_s"]),
        sample_s=drawing / max(1, drawn),
        eval_sample_s=seconds.get(("eval", 0), 0.0) / max(1, int(measured["eval_samples"])),
        token_s=train_s / tokens[1] if tokens.get(1) else None,
        warmup_step_s=float(steps[0]["seconds"]) / MAX_WARMUP_STEPS if steps else 0.0,
        save_s=sum(saves) / len(saves) if saves else 0.0,
        other_s=max(0.0, float(measured["phases_s"]) - known) / num_rounds,
        samples_per_prompt=int(last["num_samples"]) / max(1, int(last["num_prompts"])),
        accept_rate=int(last["num_accepted"]) / max(1, int(last["num_samples"])),
        row_tokens=made["row_tokens"] / max(1, made["num_rows"]),
    )


def estimate(loaded: LoadedConfig, plan: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Time, memory and disk of the whole run, from its plan and a probe."""
    seed_rows = count_seed_rows(loaded.config.train.mix, loaded.base_dir)
    config = loaded.config
    rates = rates_of(measured)
    first = int(measured["stats"][-1].get("filters/num_accepted", 0)) if measured["stats"] else 0
    first_drawn = int(measured["stats"][-1].get("generate/num_samples", 0)) if measured["stats"] else 0
    rounds = list(plan["rounds"])
    drawn = [row["num_prompts"] * rates.samples_per_prompt for row in rounds]
    accepted = [
        count * (first / first_drawn if index == 0 and first_drawn else rates.accept_rate)
        for index, count in enumerate(drawn)
    ]
    eval_samples = int(plan["eval_samples"])
    num_evals = (
        sum(is_due(config.eval, index, config.rounds) for index in range(config.rounds + 1)) if eval_samples else 0
    )
    parts = {
        "start": rates.start_s,
        "warmup": (plan["warmup"] or {}).get("num_steps", 0) * rates.warmup_step_s,
        "generate": sum(drawn) * rates.sample_s,
        "train": 0.0,
        "eval": num_evals * eval_samples * rates.eval_sample_s,
        "save": config.rounds * rates.save_s,
        "other": config.rounds * rates.other_s,
    }
    for index in range(1, config.rounds + 1):
        at = config.at_round(index)
        pool = sum(accepted[r - 1] for r in pool_rounds(at.train.data, index))
        rows = rows_of(at, round(pool), seed_rows)
        if at.train.steps or at.train.passes:
            trained = float(sum(steps_of(at, rows)) * int(at.train.batch_size))
        else:
            trained = rows * float(at.train.epochs or 1)
        parts["train"] += trained * rates.row_tokens * (rates.token_s or 0.0)
    sizes = measured["bytes"]
    per_sample = sizes["samples"] / max(1, first_drawn)
    keep = min(config.rounds, config.checkpoints.keep)
    with_state = min(config.rounds, 2) if sizes["state"] else 0
    disk = {
        "samples": round(sum(drawn) * per_sample),
        "evals": round(num_evals * sizes["eval"] * eval_samples / max(1, int(measured["eval_samples"]))),
        "checkpoints": sizes["model"] * max(keep, with_state) + sizes["state"] * with_state,
    }
    return {
        "seconds": sum(parts.values()),
        "parts_s": parts,
        "peak_bytes": measured["peak_bytes"],
        "accelerator_bytes": measured["accelerator_bytes"],
        "disk_bytes": sum(disk.values()),
        "disk_while_saving_bytes": sum(disk.values()) + sizes["model"] + sizes["state"],
        "disk_parts": disk,
        "accept_rates": [share / count if count else 0.0 for share, count in zip(accepted, drawn, strict=True)],
        "trained": rates.token_s is not None,
        "probe_s": measured["wall_s"],
    }


def render_probe(found: Mapping[str, Any]) -> str:
    """An estimate as text."""
    parts = [(name, seconds) for name, seconds in found["parts_s"].items() if seconds >= 0.5]
    rates = ", ".join(f"{rate:.2f}" for rate in found["accept_rates"])
    lines = [
        f"time:   about {duration(found['seconds'])} on this machine"
        + (f" ({', '.join(f'{name} {duration(seconds)}' for name, seconds in parts)})" if parts else ""),
        f"        accepted share taken as {rates}; what is accepted later decides how long training is",
    ]
    if not found["trained"]:
        lines.append("        nothing was accepted in the probe: the time for training is missing")
    memory = [f"{size(found['peak_bytes'])}"] if found["peak_bytes"] else []
    memory += [f"accelerator {size(found['accelerator_bytes'])}"] if found["accelerator_bytes"] else []
    lines.append(f"memory: {', '.join(memory) or 'not known here'} at the peak of the probe")
    lines.append(
        f"disk:   about {size(found['disk_bytes'])}, {size(found['disk_while_saving_bytes'])} while a checkpoint is saved"
    )
    lines.append(f"probe:  {duration(found['probe_s'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
