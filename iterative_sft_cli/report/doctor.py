"""`isft doctor`: what a config really does to tokens, masks, learning rates and weights, shown on its own rows; red findings come with the mend.

Everything is done with the encoder, the learner and the engine that `isft train` uses, in memory; nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from iterative_sft_cli.config import LoadedConfig
from iterative_sft_cli.encoding import IGNORE
from iterative_sft_cli.prompts import load_prompts, num_per_round
from iterative_sft_cli.report.doctor_check import Check
from iterative_sft_cli.report.doctor_weights import check_weights
from iterative_sft_cli.report.workbench import Bench, open_bench
from iterative_sft_cli.train.pool import num_steps, pool_rounds
from iterative_sft_cli.types import EOS, LENGTH, PROMPT_TOO_LONG, Sample

ROUND_TRIP = (
    (
        "prompt_is_prefix",
        True,
        "a training row begins with exactly the ids that generation starts from",
        "use another prompts.template: this one writes a prompt differently once it is answered",
    ),
    (
        "mask_is_completion",
        True,
        "the loss mask covers the completion and nothing before it",
        "use another prompts.template",
    ),
    (
        "ends_with_one_eos",
        True,
        "a trained answer ends with exactly one end-of-sequence token",
        "set eos_token in the tokenizer to the token that ends the assistant's turn",
    ),
    (
        "text_survives",
        True,
        "the trained ids decode to the answer that was written",
        "use another prompts.template: this one changes the answer's text",
    ),
    (
        "two_bos",
        False,
        "no prompt begins with two bos tokens",
        "take the bos token out of prompts.template, or out of the tokenizer's settings",
    ),
)


def examine(loaded: LoadedConfig, *, num_rows: int) -> dict[str, Any]:
    """All checks of a config as plain data. Raises the errors of loading model, data and filters."""
    config = loaded.config
    prompts = load_prompts(config.prompts, base_dir=loaded.base_dir).prompts
    bench = open_bench(config, loaded.base_dir)
    at = config.at_round(1)
    decoding = at.generate.decoding(eos_token_ids=bench.encoder.eos_token_ids)
    chosen = prompts[:num_rows]
    made = bench.complete([one.prompt for one in chosen], decoding, weights=None, purpose="doctor")
    samples = [
        Sample(
            prompt_id=prompt.prompt_id,
            sample_id=f"1-{prompt.prompt_id}-0",
            round_index=1,
            prompt=prompt.prompt,
            completion=bench.text(completion),
            answer=prompt.answer,
            prompt_ids=tuple(bench.encoder.encode_prompt(prompt.prompt)),
            completion_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            logprob=completion.logprob,
            final=bench.text(completion),
        )
        for prompt, [completion] in zip(chosen, made, strict=True)
    ]
    rates = learning_rates(config, bench, len(prompts))
    checks = [
        *check_template(bench.encoder),
        *check_lengths(config, bench.encoder, prompts),
        *check_rows(bench.encoder, samples),
        check_rates(rates),
        *check_weights(bench, samples, decoding),
    ]
    return {
        "config": str(loaded.path),
        "model": str(config.model.path or config.model.use),
        "checks": [one.to_json() for one in checks],
        "rows": [describe_row(bench.encoder, sample) for sample in samples],
        "learning_rates": rates,
        "healthy": not any(one.ok is False for one in checks),
    }


def check_template(encoder: Any) -> Iterator[Check]:
    """Whether the chat template keeps the promises that training rests on."""
    if not hasattr(encoder, "template_roundtrip_report"):
        yield Check("chat template", None, "not looked at: a plug-in backend has an encoder of its own")
        return
    report = encoder.template_roundtrip_report()
    where = report["template"] or "none: prompts are raw text"
    yield Check(
        "chat template", None, f"{where}; answers end with {report['end_token']}, {report['eos_tokens']} all stop"
    )
    for key, wanted, what, mend in ROUND_TRIP:
        right = bool(report[key]) is wanted
        yield Check(key, right, what if right else f"not so: {what}", None if right else mend)
    if report["pad_is_eos"]:
        yield Check(
            "padding",
            True,
            "the pad token is an end-of-sequence token; rows are masked by their length, so it is still trained",
        )
    if report["reads_clock"]:
        yield Check(
            "clock", True, "the template asks for the date; it gets a fixed one, so that a resumed run asks the same"
        )
    if report["opens_thinking"]:
        yield Check("thinking", None, "the template opens a thinking block; answer filters see what follows its end")


def check_lengths(config: Any, encoder: Any, prompts: Sequence[Any]) -> Iterator[Check]:
    """Whether prompts and completions fit the model's context."""
    at = config.at_round(1)
    lengths = [len(encoder.encode_prompt(prompt.prompt)) for prompt in prompts]
    longest, room = max(lengths), int(at.generate.max_new_tokens)
    context = int(encoder.context_length)
    place = prompts[lengths.index(longest)].prompt_id
    fits = longest + room <= context
    yield Check(
        "context",
        fits,
        f"longest prompt {longest} tokens ({place}) + max_new_tokens {room} = {longest + room} of {context}",
        None if fits else "shorten the prompts, lower generate.max_new_tokens, or take a model with a longer context",
    )
    limit = at.train.max_length
    if limit is not None:
        right = longest + room <= limit
        yield Check(
            "max_length",
            right,
            f"train.max_length {limit}: longer rows are rejected as too_long",
            None if right else f"raise train.max_length to {longest + room}, or leave it out",
        )


def check_rows(encoder: Any, samples: Sequence[Sample]) -> Iterator[Check]:
    """Whether the rows made of real completions are trained where they should be."""
    cut = [one for one in samples if one.finish_reason == LENGTH]
    if samples:
        few = len(cut) < len(samples)
        yield Check(
            "cut off",
            few,
            f"{len(cut)} of {len(samples)} completions reached max_new_tokens",
            None if few else "raise generate.max_new_tokens: no answer of these was finished",
        )
    for sample in samples:
        if sample.finish_reason == PROMPT_TOO_LONG:
            continue
        row = encoder.training_row(sample)
        start = len(sample.prompt_ids)
        trained = [i for i, label in enumerate(row.labels) if label != IGNORE]
        exact = row.input_ids[:start] == sample.prompt_ids
        mask = trained == list(range(start, len(row.labels)))
        ids = [row.input_ids[i] for i in trained]
        stops = [token for token in ids if token in encoder.eos_token_ids]
        ended = sample.finish_reason == LENGTH or (len(stops) == 1 and ids[-1] in encoder.eos_token_ids)
        right = exact and mask and ended
        problem = (
            "its prompt ids differ"
            if not exact
            else "its mask is not the completion"
            if not mask
            else "its end is wrong"
        )
        end = "cut off, so without an end" if sample.finish_reason == LENGTH else "one end-of-sequence token at the end"
        detail = f"{start} prompt tokens not trained, {len(trained)} completion tokens trained, {end}"
        yield Check(
            f"row {sample.sample_id}",
            right,
            detail if right else f"{detail}; {problem}",
            None if right else "this is a bug in isft: please report it",
        )


def describe_row(encoder: Any, sample: Sample) -> dict[str, Any]:
    """The exact ids of a training row, each with its piece of text and whether it is trained."""
    if sample.finish_reason == PROMPT_TOO_LONG:
        return {"sample_id": sample.sample_id, "finish_reason": sample.finish_reason, "tokens": []}
    row = encoder.training_row(sample)
    show = getattr(encoder, "decode_all", encoder.decode)
    return {
        "sample_id": sample.sample_id,
        "finish_reason": sample.finish_reason,
        "ended_by_eos": sample.finish_reason == EOS,
        "completion": sample.completion,
        "tokens": [
            {"id": token, "piece": show([token]), "trained": label != IGNORE}
            for token, label in zip(row.input_ids, row.labels, strict=True)
        ],
    }


def learning_rates(config: Any, bench: Bench, num_prompts: int) -> list[dict[str, Any]]:
    """The learning rate at every step of every round (a warm-up's not), if every sample is accepted; empty for a plug-in backend."""
    if bench.model is None:
        return []
    from iterative_sft_cli.train.torch_settings import Schedule, settings_from_section

    found = []
    for index in range(1, config.rounds + 1):
        section = config.at_round(index).train
        rows = sum(
            num_per_round(config.at_round(r).prompts.per_round, num_prompts)
            * int(config.at_round(r).generate.samples_per_prompt)
            for r in pool_rounds(section.data, index)
        )
        steps = num_steps(
            rows,
            epochs=None if section.epochs is None else float(section.epochs),
            steps=None if section.steps is None else int(section.steps),
            batch_size=int(section.batch_size),
        )
        whole, before = steps, 0
        if section.lr_schedule == "continue":
            each = [int(config.at_round(r).train.steps or 0) for r in range(1, config.rounds + 1)]
            whole, before = sum(each), sum(each[: index - 1])
        schedule = Schedule(settings_from_section(section), max(1, whole))
        found.append({"round": index, "steps": steps, "rates": [schedule(before + step) for step in range(steps)]})
    return found


def check_rates(rates: Sequence[dict[str, Any]]) -> Check:
    """Whether every round trains something."""
    if not rates:
        return Check("learning rate", None, "not looked at: a plug-in backend has a learner of its own")
    flat = [one["round"] for one in rates if one["steps"] and not any(rate > 0 for rate in one["rates"])]
    highest = max((rate for one in rates for rate in one["rates"]), default=0.0)
    if flat:
        rounds = ", ".join(map(str, flat))
        return Check(
            "learning rate",
            False,
            f"it is 0 at every step of round {rounds}",
            "lower train.warmup_ratio, or raise train.epochs",
        )
    total = sum(one["steps"] for one in rates)
    return Check("learning rate", True, f"up to {highest:.3g} over at most {total} steps in {len(rates)} rounds")
