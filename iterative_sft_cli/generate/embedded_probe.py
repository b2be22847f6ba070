"""Numerical proof that a decoder computes what the model computes, before it is used.

Guarantee: a decoder whose logits differ from the model's plain, cache-free forward by more than rounding is never used, nor
one that still runs on weights other than the reference's.
"""

from __future__ import annotations

from typing import Any

import torch

from iterative_sft_cli.generate.embedded_module import Decoder

PROMPT_LENGTHS = (9, 5, 2)
COPIES = 2
STEPS = 3
EXACT = 1e-3
"""Largest error of a decoder in float32, nats."""
HALF = 0.05
"""Error that is always granted to half-precision types, nats; three times what two forwards of the model's own differ by if
that is more. (SmolLM2-135M: transformers' bfloat16 forward is 0.08 from float32, the lean decoder 0.05.)"""

MOST = 0.5
"""Never more than this, nats."""


def rows_of(vocab_size: int) -> list[list[int]]:
    """The probe's token rows: three prompts, each continued in two ways."""
    span = max(min(vocab_size, 4096) - 11, 1)
    prompts = [[(7 * i * i + 31 * i + 13 * n) % span + 3 for i in range(n)] for n in PROMPT_LENGTHS]
    more = [[(17 * step + 5 * i + 3) % span + 3 for step in range(STEPS)] for i in range(COPIES * len(prompts))]
    return [[*prompts[i // COPIES], *ids] for i, ids in enumerate(more)]


@torch.inference_mode()
def expected(reference: Any, vocab_size: int) -> list[torch.Tensor]:
    """Log-probabilities of the plain forward at the last prompt token and after, [1 + STEPS, vocabulary] for each row."""
    rows = rows_of(vocab_size)
    longest = max(map(len, rows))
    # padded on the right, where causal attention never looks
    ids = torch.tensor([[*row, *([row[0]] * (longest - len(row)))] for row in rows])
    training = {module: module.training for module in reference.modules()}
    try:
        reference.eval()
        logits = reference(input_ids=ids.to(next(reference.parameters()).device), use_cache=False).logits
    finally:
        for module, flag in training.items():
            module.training = flag
    return [
        torch.log_softmax(part[len(row) - STEPS - 1 : len(row)].float(), -1)
        for row, part in zip(rows, logits, strict=True)
    ]


def difference(want: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """Largest mean absolute difference of log-probabilities, weighted by `want`'s probabilities."""
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        error = ((a - b).abs() * a.exp()).sum(-1).max()
        worst = max(worst, float(error) if bool(torch.isfinite(b).all()) else float("inf"))
    return worst


@torch.inference_mode()
def decoder_error(want: list[torch.Tensor], decoder: Decoder, vocab_size: int) -> float:
    """`difference` of a decoder's logits from `expected` ones, over a shared prefill, steps, and a row leaving in mid-way."""
    rows = rows_of(vocab_size)
    prompts = [rows[COPIES * i][:n] for i, n in enumerate(PROMPT_LENGTHS)]
    features = decoder.logits(decoder.admit(prompts, [COPIES] * len(prompts)))
    worst = difference(
        [row[0] for row in want], [features[i // COPIES].float().log_softmax(-1) for i in range(len(rows))]
    )
    alive = list(range(len(rows)))
    for step in range(STEPS):
        at = [len(rows[i]) - STEPS + step for i in alive]
        features = decoder.logits(decoder.decode([rows[i][a] for i, a in zip(alive, at, strict=True)]))
        got = [features[j].float().log_softmax(-1) for j in range(len(alive))]
        worst = max(worst, difference([want[i][1 + step] for i in alive], got))
        if step == 0:
            alive = [alive[j] for j in decoder.cache.remove([1])]
    decoder.reset()
    return worst


def granted(dtype: torch.dtype, noise: float) -> float:
    """The error that rounding may explain, nats."""
    return EXACT if dtype in (torch.float32, torch.float64) else min(max(HALF, 3 * noise), MOST)
