"""Whether generation uses the weights that were just trained: the check that a stale copy or a forgotten adapter cannot pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from iterative_sft_cli.report.doctor_check import Check
from iterative_sft_cli.types import PROMPT_TOO_LONG, Completion, Decoding, Sample

if TYPE_CHECKING:
    from iterative_sft_cli.report.workbench import Bench

STEPS = 5
LEARNING_RATES = (1e-3, 5e-3, 2e-2, 1e-1)
MOVED = 0.1
"""Nats a token by which training must have moved the completion before anything can be said."""


def check_weights(bench: Bench, samples: Sequence[Sample], decoding: Decoding) -> Iterator[Check]:
    """Train a few steps in memory, generate, and compare the engine's log probabilities with the trainer's own."""
    usable = [one for one in samples if one.finish_reason != PROMPT_TOO_LONG and one.completion_ids]
    engine_name = bench.config.generate.engine
    if bench.model is None or not usable or engine_name != "transformers":
        why = "no completion to train on"
        if engine_name != "transformers":
            why = f"engine {engine_name} serves weights of its own, and these rows come from the embedded engine"
        elif bench.model is None:
            why = "a plug-in backend has weights of its own"
        yield Check("weights", None, f"not looked at: {why}")
        return
    sample = usable[0]
    short = replace(decoding, do_sample=False, max_new_tokens=min(decoding.max_new_tokens, 24), repetition_penalty=1.0)
    rows = [bench.encoder.training_row(one) for one in usable]
    own = Completion(sample.prompt_id, 0, sample.completion_ids, sample.finish_reason)
    first, size = score(bench, sample, own), len(own.token_ids)
    for rate in LEARNING_RATES:
        changes = {"learning_rate": rate, "warmup_ratio": 0.0, "objective": "nll", "objective_args": {}}
        settings = bench.config.at_round(1).train.model_copy(update=changes)
        bench.learner.begin(settings, STEPS + 1, seed=bench.config.seed, keep_optimizer=False)
        for step in range(STEPS):
            bench.learner.step(rows, step, None)
        if abs(score(bench, sample, own) - first) / size >= MOVED:
            break
    [[made]] = bench.complete([sample.prompt], short, weights=None, purpose="doctor")
    if not made.token_ids or made.logprob is None:
        yield Check("weights", None, "not looked at: the engine gives no log probabilities")
        return
    trained = score(bench, sample, made)
    what = "the adapter" if bench.model.has_adapter else "the weights"
    bench.learner.load_weights(None)
    before = score(bench, sample, made)
    n = len(made.token_ids)
    engine, moved = made.logprob / n, abs(trained - before) / n
    to_trained, to_base = abs(engine - trained / n), abs(engine - before / n)
    figures = f"engine {engine:.4f}, trainer {trained / n:.4f}, before training {before / n:.4f} nats a token"
    if moved < MOVED / 5:
        yield Check("weights", None, f"training moved this completion too little to tell ({figures})")
        return
    right = to_trained < max(0.05, 0.5 * moved) and to_trained < to_base
    yield Check(
        "weights",
        right,
        f"generation uses {what} just trained: {figures}"
        if right
        else f"generation does not use {what} just trained: {figures}",
        None if right else "this is a bug in isft or in the engine: please report it with `isft env`",
    )


def score(bench: Bench, sample: Sample, made: Completion) -> float:
    """The log probability of a completion under the trainer's live weights, by a plain forward pass."""
    import torch

    model: Any = bench.model.model
    ids = torch.tensor([[*sample.prompt_ids, *made.token_ids]], device=bench.model.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1].float()
    finally:
        model.train(training)
    chosen = torch.log_softmax(logits, -1).gather(1, ids[0, len(sample.prompt_ids) :, None])
    return float(chosen.sum())
