"""Numerical proof that a decoder computes what the model computes, before it is used.

Guarantee: a decoder whose logits differ from the model's plain, cache-free forward by more than rounding is never used.
"""

from __future__ import annotations

from typing import Any

import torch

from iterative_sft_cli.generate.embedded_module import Decoder

_PROMPT_LENGTHS = (9, 5, 2)
_STEPS = 3


@torch.inference_mode()
def decoder_error(reference: Any, decoder: Decoder, vocab_size: int) -> float:
    """Largest difference between the decoder's log-probabilities and those of `reference`'s plain forward, in nats.

    Prompts of three lengths, each continued twice (so that rows share a prompt), a row leaving in mid-way; weighted by the
    reference's probabilities so that tokens which are never drawn do not count.
    """
    span = max(min(vocab_size, 4096) - 11, 1)
    prompts = [[(7 * i * i + 31 * i + 13 * n) % span + 3 for i in range(n)] for n in _PROMPT_LENGTHS]
    state, features = decoder.prefill(prompts)
    worst = 0.0
    for prompt, row in zip(prompts, decoder.logits(features), strict=True):
        worst = max(worst, _difference(reference, prompt, row))
    owners = [0, 0, 1, 1, 2, 2]
    decoder.admit(state, owners)
    rows = [list(prompts[i]) for i in owners]
    for step in range(_STEPS):
        tokens = [(17 * step + 5 * i + 3) % span + 3 for i in range(len(rows))]
        features = decoder.decode(tokens)
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        for ids, got in zip(rows, decoder.logits(features), strict=True):
            worst = max(worst, _difference(reference, ids, got))
        if step == 0:
            rows[1] = rows.pop()
            decoder.compact([1], [len(rows)], len(rows))
    decoder.reset()
    return worst


def _difference(reference: Any, ids: list[int], logits: torch.Tensor) -> float:
    device = next(reference.parameters()).device
    expected = reference(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1].float()
    want, got = expected.log_softmax(-1), logits.float().log_softmax(-1)
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float(((want - got).abs() * want.exp()).sum())
