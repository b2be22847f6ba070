"""Evaluate on prompts that are never trained on; sealed like every shard, so that an interrupted evaluation goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from iterative_sft_cli.eval import PromptResult, changes, summarize
from iterative_sft_cli.filters import FilterChain, share
from iterative_sft_cli.harness import figures as harness_figures
from iterative_sft_cli.rounds.sampling import generate_shard, into_shards, make_requests, seeds_of
from iterative_sft_cli.rounds.stages import RoundLog, Stages
from iterative_sft_cli.samples import EVAL, EVAL_PROMPTS, prompt_to_row, sample_to_row
from iterative_sft_cli.types import Decoding, Request

HARNESS = "lm-eval"
"""The shard that holds the figures of `eval.lm_eval`."""

GREEDY_INDEX = -1
"""`sample_index` of the greedy sample of a prompt."""


def is_due(section: Any, round_index: int, rounds: int) -> bool:
    """Whether this round is evaluated: the start, every `eval.every` rounds, and the last."""
    return section is not None and (round_index % int(section.every) == 0 or round_index == rounds)


def evaluate(
    stages: Stages,
    config: Any,
    *,
    round_index: int,
    weights_hash: Any,
    open_engine: Any,
    chain: FilterChain,
    log: RoundLog,
) -> dict[str, Any]:
    """The `eval/...` figures of the weights that `open_engine` serves, from sealed samples of every eval prompt."""
    section, prompts = config.eval, stages.eval_prompts
    decoding = config.eval_decoding(eos_token_ids=stages.eval_encoder.eos_token_ids)
    num_samples = int(section.samples_per_prompt)
    plans: list[tuple[list[Request], Decoding]] = []
    # the same seeds each round: a change of the figures is a change of the weights
    requests = make_requests(stages, stages.eval_encoder, prompts, num_samples, purpose="eval", round_index=0)
    plans += [(shard, decoding) for shard in into_shards(requests)]
    if section.greedy and decoding.do_sample:
        alone = make_requests(stages, stages.eval_encoder, prompts, 1, purpose="eval-greedy", round_index=0)
        greedy = [replace(request, sample_indices=(GREEDY_INDEX,)) for request in alone]
        plans += [(shard, replace(decoding, do_sample=False)) for shard in into_shards(greedy)]
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    if stages.run.shards.read(0, EVAL_PROMPTS) is None:
        # readers show and pair the prompts of an evaluation long after the data file is gone
        stages.run.shards.seal(0, EVAL_PROMPTS, map(prompt_to_row, prompts), {})
    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    num_tokens = 0
    total = sum(len(request.seeds) for shard, _ in plans for request in shard)
    sealed = set(stages.run.shards.names(round_index, EVAL))
    stages.announce(
        (plan for index, plan in enumerate(plans) if f"{EVAL}-{index:05d}" not in sealed),
        share(chain, by_id, groups=True),
    )
    with stages.view.phase("eval", round_index, total, "samples") as phase:
        for index, (shard, how) in enumerate(plans):
            name = f"{EVAL}-{index:05d}"
            found = stages.run.shards.read(round_index, name)
            if found is None:
                stream = stages.open_shard(chain)
                samples, plan = generate_shard(
                    stages,
                    open_engine(),
                    shard,
                    how,
                    round_index=round_index,
                    name=name,
                    prompts=by_id,
                    phase=phase,
                    on_sample=stream.submit,
                )
                seeds = seeds_of(shard)
                made = [
                    sample_to_row(one.sample, seeds[one.sample.prompt_id, one.sample.sample_index])
                    | {"correct": one.kept, "answer": vote_of(one), "says": [says.to_row() for says in one.says]}
                    for one in stream.finish(samples)
                ]
                stages.run.shards.seal(round_index, name, made, {"weights": weights_hash(), "plan": plan})
            else:
                made = found[0]
                phase.advance(len(made))
            num_tokens += sum(len(row["completion_ids"]) for row in made)
            rows += [brief(row, section.rank_by) for row in made]
            log("evaluated", shard=name, num_samples=len(made))
    stages.run.telemetry.append({"event": "eval", "round": round_index, "seconds": time.monotonic() - start})
    results = results_of(rows, prompts, section.rank_by)
    figures = summarize(results, section.k, seed=config.seed) | {
        **changes(results_before(stages, round_index), results, seed=config.seed),
        "eval/num_tokens": num_tokens,
        "eval/mean_tokens": num_tokens / max(1, len(rows)),
    }
    return figures | harness_figures(measure_tasks(stages, round_index, weights_hash, log))


def results_before(stages: Stages, round_index: int) -> list[PromptResult]:
    """The results of the newest evaluation before `round_index`, from its sealed shards; none for the first."""
    shards = stages.run.shards
    for earlier in range(round_index - 1, -1, -1):
        names = shards.names(earlier, f"{EVAL}-")
        if names:
            found = (shards.read(earlier, name) for name in names)
            return results_of([brief(row) for rows, _ in filter(None, found) for row in rows], stages.eval_prompts)
    return []


def measure_tasks(stages: Stages, round_index: int, weights_hash: Any, log: RoundLog) -> list[dict[str, Any]]:
    """What lm-evaluation-harness measures of the live weights (`eval.lm_eval`), sealed like every other figure's source."""
    if stages.harness is None:
        return []
    found = stages.run.shards.read(round_index, HARNESS)
    if found is None:
        start = time.monotonic()
        stages.session.close()
        rows = stages.harness()
        stages.run.shards.seal(round_index, HARNESS, rows, {"weights": weights_hash()})
        stages.run.telemetry.append({"event": "lm_eval", "round": round_index, "seconds": time.monotonic() - start})
    else:
        rows = found[0]
    log("evaluated", shard=HARNESS, num_figures=len(rows))
    return list(rows)


def eval_filters(filters: Sequence[Any], section: Any) -> list[Any]:
    """What judges an evaluation's answers: the filters of `eval.correct`, else the per-sample verifiers of the list that read no
    score (where there is none, the per-sample checks); one that only scores in the round drops here. Scorers that one of
    them or `rank_by` reads come along."""
    if section.correct is not None:
        judges = [one for one in filters if one.name in section.correct]
    else:
        alone = [one for one in filters if one.kind == "sample" and one.role != "scorer" and not one.reads]
        judges = [one for one in alone if one.role == "verifier"] or alone
    wanted = {name for one in judges for name in one.reads} | {section.rank_by}
    names = {one.name for one in judges}
    return [one.dropping() if one.name in names else one for one in filters if one.name in names or one.name in wanted]


def vote_of(judged: Any) -> str | None:
    """The final answer a sample votes for: what a verifier extracted (`answer` in its extras), None when none did."""
    for says in judged.says:
        answer = says.extra.get("answer")
        if answer is not None:
            return str(answer)
    return None


def score_of(row: dict[str, Any], name: str | None) -> float | None:
    """The score that the filter `name` gave a sample of the evaluation."""
    return next((says.get("score") for says in row["says"] if says["filter"] == name), None)


def brief(row: dict[str, Any], rank_by: str | None = None) -> dict[str, Any]:
    """What `results_of` reads of a sample: not its completion, and of its verdicts only the one that ranks."""
    says = [says for says in row["says"] if says["filter"] == rank_by]
    return {**{key: row[key] for key in ("prompt_id", "sample_index", "correct", "answer")}, "says": says}


def results_of(
    rows: Sequence[dict[str, Any]], prompts: Sequence[Any], rank_by: str | None = None
) -> list[PromptResult]:
    """Eval rows grouped by prompt, in the prompts' order."""
    grouped: dict[str, list[dict[str, Any]]] = {prompt.prompt_id: [] for prompt in prompts}
    for row in rows:
        grouped[row["prompt_id"]].append(row)
    results = []
    for prompt in prompts:
        sampled = [row for row in grouped[prompt.prompt_id] if row["sample_index"] != GREEDY_INDEX]
        greedy = [row for row in grouped[prompt.prompt_id] if row["sample_index"] == GREEDY_INDEX]
        results.append(
            PromptResult(
                prompt_id=prompt.prompt_id,
                correct=tuple(row["correct"] for row in sampled),
                answers=tuple(row["answer"] for row in sampled),
                scores=tuple(score_of(row, rank_by) for row in sampled) if rank_by is not None else (),
                level=prompt.level,
                greedy_correct=greedy[0]["correct"] if greedy else None,
            )
        )
    return results
