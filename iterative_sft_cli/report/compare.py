"""Two evaluations, paired by prompt: what was gained, what was lost, how sure that is, what differed and what it cost.

Prompts are paired by what they ask, so that runs with different models, seeds and ids can be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from iterative_sft_cli.config import diff_configs
from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.eval import (
    PromptResult,
    best_at_k,
    bootstrap_interval,
    maj_at_k,
    paired_sign_test,
    pass_at_k,
)
from iterative_sft_cli.prompts import content_key
from iterative_sft_cli.report.paging import open_lines
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.report.show import round_seconds
from iterative_sft_cli.rounds.evaluation import results_of
from iterative_sft_cli.samples import EVAL, read_eval_prompts
from iterative_sft_cli.types import Prompt

IGNORED = ("output_dir", "tracking")


@dataclass(frozen=True, slots=True)
class Side:
    """One evaluation of one run: its round, and for each prompt (by what it asks) its value and text."""

    run: Run
    round_index: int
    metric: str
    values: dict[str, float]
    prompts: dict[str, Prompt]
    by_content: bool

    @property
    def row(self) -> dict[str, Any]:
        """The round's row of statistics."""
        return next((row for row in self.run.stats if row["round"] == self.round_index), {"round": self.round_index})


def value_of(result: PromptResult, metric: str) -> float:
    """A prompt's part of a metric such as pass@1, maj@4 or greedy. Raises ConfigError for one that its samples do not give."""
    if metric == "greedy":
        if result.greedy_correct is None:
            raise ConfigError("--metric greedy: this evaluation has no greedy samples", expected="eval.greedy: true")
        return float(result.greedy_correct)
    kind, at, k = metric.partition("@")
    figures = {
        "pass": lambda: pass_at_k(len(result.correct), sum(result.correct), int(k)),
        "maj": lambda: maj_at_k(result, int(k)),
    }
    figures["best"] = lambda: best_at_k(result, int(k))
    try:
        if not at or int(k) > len(result.correct):
            raise ValueError(f"{len(result.correct)} samples a prompt")
        return float(figures[kind]())
    except (KeyError, ValueError) as error:
        raise ConfigError(f"--metric {metric}: {error}", expected="such as pass@1, maj@4 or greedy") from None


def evaluated_rounds(run: Run) -> list[int]:
    """The rounds whose evaluation is complete, oldest first."""
    return [row["round"] for row in run.stats if row.get("eval/num_prompts")]


def choose_round(run: Run, at: str) -> int:
    """The round that `--at` names: last, best, or a number. Raises ConfigError when that round has no evaluation."""
    rounds = evaluated_rounds(run)
    if not rounds:
        raise DataError(
            "no evaluated round", where=str(run.path), hint="compare needs an `eval` section in both configs"
        )
    if at == "best":
        return int(run.best_round or 0)
    if at == "last":
        return rounds[-1]
    if not at.isdigit() or int(at) not in rounds:
        known = ", ".join(map(str, rounds))
        raise ConfigError(f"--at {at}: {run.path} has no such evaluation", expected=f"last, best, or one of {known}")
    return int(at)


def read_side(run: Run, round_index: int, metric: str) -> Side:
    """The evaluation of a round, by prompt."""
    rows: list[dict[str, Any]] = []
    for name in run.view.shards.names(round_index, f"{EVAL}-"):
        lines = open_lines(run.path, round_index, name)
        rows += list(lines.rows()) if lines is not None else []
    stored = read_eval_prompts(run.view.shards)
    ids = dict.fromkeys(row["prompt_id"] for row in rows)
    prompts = [stored.get(key) or Prompt(key, "") for key in ids]
    section = run.settings.eval
    results = results_of(rows, prompts, getattr(section, "rank_by", None))
    by_content = bool(stored)
    seen: Counter[str] = Counter()
    values, texts = {}, {}
    for prompt, result in zip(prompts, results, strict=True):
        key = content_key(prompt) if by_content else prompt.prompt_id
        seen[key] += 1
        # the same question twice is two prompts: the first is paired with the first
        key = f"{key}#{seen[key]}"
        values[key], texts[key] = value_of(result, metric), prompt
    return Side(run, round_index, metric, values, texts, by_content)


def compare_two(a: Side, b: Side, *, num_examples: int = 5) -> dict[str, Any]:
    """B against A as plain data. Raises DataError when no prompt was asked of both."""
    shared = [key for key in a.values if key in b.values]
    if not shared:
        raise DataError(
            "the two evaluations have no prompt in common",
            where=f"{a.run.path}, {b.run.path}",
            hint="evaluate both on the same `eval` data; `isft list` shows the figures of runs side by side",
        )
    gained, lost, p_value = paired_sign_test(a.values, b.values)
    differences = [b.values[key] - a.values[key] for key in shared]
    low, high = bootstrap_interval(differences, seed=0)
    changes = config_changes(a.run, b.run)
    notes = []
    if len(shared) < max(len(a.values), len(b.values)):
        notes.append(f"{len(shared)} prompts are in both, {len(a.values)} in the first, {len(b.values)} in the second")
    if not (a.by_content and b.by_content):
        notes.append("a run did not keep its eval prompts: paired by their ids")
    judged = [one["key"] for one in changes if one["key"].startswith(("eval", "filters")) and "path" not in one["key"]]
    if judged:
        notes.append(f"the evaluations differ in {', '.join(judged[:4])}: so may their figures")
    return {
        "metric": a.metric,
        "runs": [describe_side(a), describe_side(b)],
        "paired": {
            "num_prompts": len(shared),
            "before": sum(a.values[key] for key in shared) / len(shared),
            "after": sum(b.values[key] for key in shared) / len(shared),
            "difference": sum(differences) / len(shared),
            "difference_low": low,
            "difference_high": high,
            "gained": gained,
            "lost": lost,
            "p_value": p_value,
        },
        "gained": examples(a, b, shared, 1, num_examples),
        "lost": examples(a, b, shared, -1, num_examples),
        "config": changes,
        "notes": notes,
    }


def describe_side(side: Side) -> dict[str, Any]:
    """One run in a comparison: its figure with the interval, its curve, its cost."""
    key = f"eval/{side.metric}"
    stats = side.run.stats
    return {
        "run": str(side.run.path),
        "model": side.run.model_name,
        "seed": side.run.settings.seed,
        "round": side.round_index,
        "value": side.row.get(key),
        "low": side.row.get(f"{key}_low"),
        "high": side.row.get(f"{key}_high"),
        "curve": {str(row["round"]): row.get(key) for row in stats if row.get(key) is not None},
        "cost": cost_of(side.run, side.round_index),
    }


def cost_of(run: Run, up_to: int) -> dict[str, Any]:
    """Tokens generated and trained and seconds of work, up to and with a round."""
    stats = [row for row in run.stats if row["round"] <= up_to]
    seconds = round_seconds(run.view.telemetry_rows())
    return {
        "generated_tokens": sum(int(row.get("generate/num_tokens", 0)) for row in stats),
        "accepted_samples": sum(int(row.get("filters/num_accepted", 0)) for row in stats),
        "trained_tokens": sum(int(row.get("train/num_tokens", 0)) for row in stats),
        "steps": sum(int(row.get("train/num_steps", 0)) for row in stats),
        "seconds": sum(value for index, value in seconds.items() if index <= up_to),
    }


def config_changes(a: Run, b: Run) -> list[dict[str, Any]]:
    """The keys in which two configs differ, without those that change nothing."""
    return [
        {"key": one.path, "before": one.old, "after": one.new}
        for one in diff_configs(a.config, b.config)
        if not one.path.startswith(IGNORED)
    ]


def examples(a: Side, b: Side, shared: list[str], sign: int, most: int) -> list[dict[str, Any]]:
    """The prompts that changed most in one direction."""
    changed = [(key, b.values[key] - a.values[key]) for key in shared]
    wanted = sorted((pair for pair in changed if pair[1] * sign > 0), key=lambda pair: -pair[1] * sign)
    return [
        {
            "prompt_id": a.prompts[key].prompt_id,
            "prompt": a.prompts[key].prompt,
            "answer": a.prompts[key].answer,
            "before": a.values[key],
            "after": b.values[key],
        }
        for key, _ in wanted[:most]
    ]


def curves(found: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """Rows of the curves' table: a round, and the figure of each run in it."""
    rounds = sorted({int(index) for one in found["runs"] for index in one["curve"]})
    return [(index, *(one["curve"].get(str(index)) for one in found["runs"])) for index in rounds]
