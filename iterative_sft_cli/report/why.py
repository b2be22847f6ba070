"""`isft why`: the whole story of one sample, from the seed it was drawn with to the optimizer steps it trained in.

Steps are dealt again from the sealed training rows by the function that dealt them, so the story cannot differ from what happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from iterative_sft_cli.console import safe_text
from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.report.lineage import lineage
from iterative_sft_cli.report.paging import EvalReader, RoundReader, open_lines, prompt_of
from iterative_sft_cli.report.query import filter_names, sampled_rounds
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.report.sample_text import indented, sample_row, says_text, whole_prompt
from iterative_sft_cli.rounds.gather import SEED_DATA, Gathered, scores_of
from iterative_sft_cli.rounds.training import plan_passes
from iterative_sft_cli.rounds.weights import round_key
from iterative_sft_cli.samples import TRAIN, StoredSample, iter_accepted, kept_of
from iterative_sft_cli.train.pool import pool_rounds
from iterative_sft_cli.types import TrainRow

DECODING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample", "max_new_tokens", "stop")


def story_of(run: Run, sample_id: str, *, evaluation: bool = False) -> dict[str, Any]:
    """Everything known of a sample; with `evaluation` of one of the round's evaluation. Raises ConfigError when the run has none of that id."""
    stored, meta, shard, token_ids = find(run, sample_id, evaluation=evaluation)
    index = stored.sample.round_index
    if evaluation:
        greedy = {"do_sample": False} if stored.sample.sample_index < 0 else {}
        decoding = run.settings.eval_decoding()
        return {
            **sample_row(stored),
            "evaluation": True,
            "shard": shard,
            "prompt_ids": list(stored.sample.prompt_ids),
            "completion_ids": token_ids,
            "generated_with": "the starting model"
            if index == 0 and not run.settings.warmup
            else f"checkpoint {round_key(index)}",
            "weights": meta.get("weights"),
            "plan": meta.get("plan"),
            "decoding": {**{name: getattr(decoding, name) for name in DECODING}, **greedy},
            "not_asked": [],
            "trained": [],
        }
    at = run.settings.at_round(index)
    asked = [str(says["filter"]) for says in stored.says]
    line = next((row for row in lineage(run.view, run.settings) if row["round"] == index), {})
    return {
        "evaluation": False,
        **sample_row(stored),
        "shard": shard,
        "prompt_ids": list(stored.sample.prompt_ids),
        "completion_ids": token_ids,
        "generated_with": meta.get("source") or line.get("generated_with"),
        "weights": meta.get("weights"),
        "plan": meta.get("plan"),
        "decoding": {name: getattr(at.generate, name) for name in DECODING},
        "not_asked": [] if stored.accepted else [name for name in filter_names(run.view)[1:] if name not in asked],
        "trained": list(trained_in(run, stored)),
    }


def find(run: Run, sample_id: str, *, evaluation: bool) -> tuple[StoredSample, dict[str, Any], str, list[int]]:
    """(sample, meta of its shard, name of its shard, its token ids)."""
    round_text, dash, _ = sample_id.partition("-")
    rounds = sampled_rounds(run.view, evaluation=evaluation)
    listing = f"isft samples {run.path}" + (" --eval" if evaluation else "")
    if not dash or not round_text.isdigit() or int(round_text) not in rounds:
        gone = not evaluation and round_text.isdigit() and kept_of(run.view.shards, int(round_text)) == "none"
        raise ConfigError(
            f"{sample_id}: " + ("the samples of its round were dropped (samples.keep)" if gone else "no such sample"),
            expected=f"ROUND-PROMPT-INDEX with a round of {', '.join(map(str, rounds)) or 'none yet'}",
            hint=f"{listing} lists the samples of a round with their ids",
        )
    reader = (EvalReader if evaluation else RoundReader)(run.view, int(round_text))
    for name in reader.shards_of(prompt_of(sample_id, reader.round_index), 1, sample_id=sample_id):
        for position, found, says, accepted in reader.says(name):
            if found == sample_id:
                lines = reader.generated(name)
                row = lines.row(position)
                return reader.stored(lines, position, says, accepted), lines.meta, name, list(row["completion_ids"])
    missing = "no such sample, or it is not judged yet"
    if reader.kept == "accepted":
        missing = "no such sample among those it accepted, and only these were kept (samples.keep: accepted)"
    raise ConfigError(
        f"{sample_id}: round {reader.round_index} has {missing}",
        hint=f"{listing} --round {reader.round_index} lists those it has",
    )


def trained_in(run: Run, stored: StoredSample) -> Iterator[dict[str, Any]]:
    """For every round that trained on the sample: how often, with which weight, and in which optimizer steps."""
    sample_id = stored.sample.sample_id
    for index in run.view.rounds:
        if not stored.accepted or index < stored.sample.round_index:
            continue
        at = run.settings.at_round(index)
        if stored.sample.round_index not in pool_rounds(at.train.data, index):
            continue
        lines = open_lines(run.path, index, TRAIN)
        if lines is None:
            continue
        rows = list(lines.rows())
        mine = [i for i, row in enumerate(rows) if row["sample_id"] == sample_id]
        if not mine:
            yield {"round": index, "times": 0, "weight": None, "steps": []}
            continue
        taken = {
            row["step"]: row
            for row in run.view.ledger_rows()
            if row.get("event") == "step" and row.get("round") == index
        }
        steps = [
            {"step": step, "learning_rate": taken.get(step, {}).get("learning_rate"), "taken": step in taken}
            for step, indices in enumerate(dealt_steps(run, index, rows), 1)
            for place in indices
            if place in mine
        ]
        yield {
            "round": index,
            "times": sum(int(rows[i]["times"]) for i in mine),
            "weight": rows[mine[0]]["weight"],
            "num_tokens": rows[mine[0]]["num_tokens"],
            "steps": steps,
        }


def dealt_steps(run: Run, index: int, rows: list[dict[str, Any]]) -> Iterator[list[int]]:
    """The row indices of each optimizer step of a round, dealt again as the loop dealt them."""
    at = run.settings.at_round(index)
    origins = [origin_of(row["sample_id"]) for row in rows]
    scores: list[dict[str, float | None]] = [{} for _ in rows]
    if at.train.passes:
        known = {
            one.sample.sample_id: scores_of(one)
            for one in iter_accepted(run.view.shards, pool_rounds(at.train.data, index))
        }
        scores = [known.get(row["sample_id"], {}) for row in rows]
    blank = [TrainRow(row["sample_id"], (), (), row["weight"]) for row in rows]
    for one in plan_passes(at.train, Gathered(blank, list(scores), origins), seed=run.settings.seed, round_index=index):
        yield from one.steps


def origin_of(sample_id: str) -> int:
    """The round that a training row comes from; seed data has none."""
    first = sample_id.partition("-")[0]
    return int(first) if first.isdigit() else SEED_DATA


def print_story(rich: Any, story: dict[str, Any]) -> None:
    """The story as text."""

    def line(text: str, style: str | None = None) -> None:
        from rich.text import Text

        rich.print(Text(safe_text(text), style=style or ""), soft_wrap=True)

    words = ("correct", "wrong") if story["evaluation"] else ("accepted", "rejected")
    line(f"{story['sample_id']}: {words[0] if story['accepted'] else words[1]}", "bold")
    line(f"prompt {story['prompt_id']}" + ("" if story["answer"] is None else f" (answer: {story['answer']})"))
    line(indented(whole_prompt(story["prompt"]), None))
    line("completion" + (" (a second try, made with a hint that is not shown here)" if story["hinted"] else ""))
    line(indented(story["completion"], None))
    tokens = f"{len(story['prompt_ids'])} + {story['num_tokens']} tokens"
    probability = "" if story["logprob"] is None else f", log probability {story['logprob']:.4g}"
    line(f"{tokens}, ended by {story['finish_reason']}{probability}")
    line("generated", "bold")
    line(f"  by {story['generated_with']}, weights {story['weights']}")
    decoding = ", ".join(f"{name} {value}" for name, value in story["decoding"].items() if value not in ([], (), None))
    plan = ", ".join(f"{name} {value}" for name, value in (story["plan"] or {}).items()) or "none"
    line(f"  seed {story['seed']}; {decoding}")
    line(f"  in {story['shard']}, batch plan: {plan}")
    line("judged", "bold")
    for says in story["says"]:
        line(f"  {says['filter']}: {says_text(says)}")
    for name in story["not_asked"]:
        line(f"  {name}: not asked, the sample was out by then")
    if story["evaluation"]:
        line("trained", "bold")
        line("  never: it is a sample of the evaluation")
        return
    line("trained", "bold")
    for one in story["trained"]:
        where = ", ".join(
            f"{step['step']}" + ("" if step["learning_rate"] is None else f" (lr {step['learning_rate']:.3g})")
            for step in one["steps"]
        )
        missing = "" if all(step["taken"] for step in one["steps"]) else "; not all of these steps are taken yet"
        line(
            f"  round {one['round']}: {one['times']} times with weight {one['weight']:g}, in steps {where}{missing}"
            if one["steps"]
            else f"  round {one['round']}: not among the training rows"
        )
    if not story["trained"]:
        line("  in no round" + ("" if story["accepted"] else ", because it was not accepted"))
