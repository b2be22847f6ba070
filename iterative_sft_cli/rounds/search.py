"""A trial before each round that chooses its temperature and threshold: the pair with the best balance of yield and quality.

Source: Zeng et al. 2024, "B-STaR", section 3: balance = mean over prompts of min(n'/n*, 1) * n'/n, with n selected and n' correct samples of a
prompt. Trials and choice are sealed; a resumed round reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from iterative_sft_cli.filters import FilterChain, share
from iterative_sft_cli.filters.scores import value_of
from iterative_sft_cli.rounds.sampling import generate_shard, into_shards, make_requests, seeds_of
from iterative_sft_cli.rounds.splits import FilterSplits
from iterative_sft_cli.rounds.stages import RoundLog, Stages
from iterative_sft_cli.rounds.weights import Source
from iterative_sft_cli.samples import TRIALS, sample_to_row
from iterative_sft_cli.types import Prompt

CHOICE = "tuned"
"""The sealed choice: a row for each pair, the chosen one marked."""


def balance(selected: Sequence[tuple[int, int]], enough: int) -> float:
    """The balance score over (selected, correct among them) of each prompt; a prompt with nothing selected counts 0."""
    if not selected:
        return 0.0
    return sum(min(c / enough, 1.0) * c / n if n else 0.0 for n, c in selected) / len(selected)


def tune(
    stages: Stages,
    config: Any,
    prompts: Sequence[Prompt],
    *,
    round_index: int,
    source: Source,
    log: RoundLog,
) -> tuple[Any, list[Any]]:
    """(config, filters) of the round with the temperature and the threshold that a trial on its first prompts chose."""
    search = config.generate.search
    if search is None:
        return config, list(stages.filters)
    shards = stages.run.shards
    found = shards.read(round_index, CHOICE)
    if found is None:
        rows = _trials(stages, config, prompts[: search.prompts], round_index, source)
        shards.seal(round_index, CHOICE, rows, {})
    else:
        rows = found[0]
    chosen = next(row for row in rows if row["chosen"])
    log("tuned", **{key: value for key, value in chosen.items() if key != "chosen"})
    generate = config.generate.model_copy(update={"temperature": chosen["temperature"]})
    filters = [
        replace(one, arguments={**one.arguments, "min": chosen["min"]})
        if "min" in chosen and one.name == search.filter
        else one
        for one in stages.filters
    ]
    return config.model_copy(update={"generate": generate}), filters


def _trials(
    stages: Stages, config: Any, prompts: Sequence[Prompt], round_index: int, source: Source
) -> list[dict[str, Any]]:
    """A row for each temperature and threshold, with its balance score; the best, the earliest of equals, is marked."""
    search = config.generate.search
    limits: list[float | None] = list(search.min) or [None]
    rows: list[dict[str, Any]] = []
    for number, temperature in enumerate(search.temperature or [float(config.generate.temperature)]):
        trial = _sample(stages, config, prompts, round_index, source, number, temperature)
        for limit in limits:
            score = balance(_selected(trial, prompts, limit), search.enough)
            row = {"temperature": temperature, "balance": score}
            rows.append(row if limit is None else {**row, "min": limit})
    best = max(range(len(rows)), key=lambda i: (rows[i]["balance"], -i))
    return [{**row, "chosen": i == best} for i, row in enumerate(rows)]


def _sample(
    stages: Stages,
    config: Any,
    prompts: Sequence[Prompt],
    round_index: int,
    source: Source,
    number: int,
    temperature: float,
) -> list[Mapping[str, Any]]:
    """The samples of one temperature with what the per-sample filters say of them, the searched threshold left out.

    `value` is what that threshold compares; `correct` whether no verifier scored the sample 0.
    """
    search = config.generate.search
    decoding = replace(
        config.generate.decoding(eos_token_ids=stages.encoder.eos_token_ids), temperature=float(temperature)
    )
    num_samples = int(search.samples_per_prompt or config.generate.samples_per_prompt)
    requests = make_requests(
        stages, stages.encoder, prompts, num_samples, purpose=f"trial-{number}", round_index=round_index
    )
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    searched = next((one for one in stages.filters if one.name == search.filter), None) if search.min else None
    verifiers = {one.name for one in stages.filters if one.role == "verifier"}
    chain = FilterChain(
        [one for one in stages.filters if one.kind == "sample" and one is not searched],
        seed=config.seed,
        round_index=round_index,
        cache_dir=stages.cache_dir,
        runtime=stages.runtime,
        encoder=stages.encoder,
        batch_sizes=FilterSplits(stages.run.shards, round_index, f"trial-{number:02d}"),
    )
    rows: list[Mapping[str, Any]] = []
    sealed = set(stages.run.shards.names(round_index, TRIALS))
    unsealed = (
        (shard, decoding)
        for index, shard in enumerate(into_shards(requests))
        if f"{TRIALS}-{number:02d}-{index:05d}" not in sealed and not chain.needs_device
    )
    stages.announce(unsealed, share(chain, by_id, groups=True))
    with chain, stages.view.phase("search", round_index, len(prompts) * num_samples, "samples") as phase:
        for index, shard in enumerate(into_shards(requests)):
            name = f"{TRIALS}-{number:02d}-{index:05d}"
            found = stages.run.shards.read(round_index, name)
            if found is None:
                samples, plan = generate_shard(
                    stages,
                    source.serve(),
                    shard,
                    decoding,
                    round_index=round_index,
                    name=name,
                    prompts=by_id,
                    phase=phase,
                    on_sample=lambda sample: None,
                )
                if chain.needs_device:
                    stages.session.close()
                seeds = seeds_of(shard)
                made = [
                    sample_to_row(one.sample, seeds[one.sample.prompt_id, one.sample.sample_index])
                    | {
                        "kept": one.kept,
                        "correct": not any(says.score == 0.0 for says in one.says if says.filter in verifiers),
                        "value": None if searched is None else value_of(str(searched.arguments["by"]), one.sample),
                    }
                    for one in stages.open_shard(chain).finish(samples)
                ]
                stages.run.shards.seal(round_index, name, made, {"weights": source.weights(), "plan": plan})
                rows += made
            else:
                phase.advance(len(found[0]))
                rows += found[0]
    return rows


def _selected(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], limit: float | None
) -> list[tuple[int, int]]:
    """(selected, correct among them) of each prompt when the searched threshold is `limit`."""
    counts = {prompt.prompt_id: [0, 0] for prompt in prompts}
    for row in rows:
        if row["kept"] and (limit is None or (row["value"] is not None and row["value"] >= limit)):
            counts[row["prompt_id"]][0] += 1
            counts[row["prompt_id"]][1] += row["correct"]
    return [(n, c) for n, c in counts.values()]
