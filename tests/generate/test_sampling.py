"""The sampler draws from exactly the distribution that Hugging Face's logits processors describe."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from iterative_sft_cli.generate.embedded_sampling import Sampler, uniforms
from iterative_sft_cli.types import Decoding, derive_seed

DRAWS = 20_000


def logits_of(vocab: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draw_many(logits: torch.Tensor, decoding: Decoding, history: list[int] | None = None) -> torch.Tensor:
    """DRAWS tokens from one row of logits, each with a seed of its own."""
    sampler = Sampler(decoding)
    tokens: list[int] = []
    for at in range(0, DRAWS, 2_000):
        seeds = [derive_seed("draw", at + i) for i in range(2_000)]
        rows = logits.expand(2_000, -1)
        tokens += sampler.draw(rows, seeds, [at % 7] * 2_000, [history or [0]] * 2_000).tokens
    return torch.tensor(tokens)


def huggingface(logits: torch.Tensor, decoding: Decoding, history: list[int] | None = None) -> torch.Tensor:
    """The distribution transformers' `generate` samples from."""
    steps = LogitsProcessorList()
    if decoding.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k:
        steps.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1.0:
        steps.append(TopPLogitsWarper(decoding.top_p))
    if decoding.min_p:
        steps.append(MinPLogitsWarper(decoding.min_p))
    ids = torch.tensor([history or [0]])
    return torch.softmax(steps(ids, logits.clone().unsqueeze(0)), -1)[0]


def chi_square_z(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The chi-square statistic as a normal deviate (Wilson-Hilferty); rare tokens are pooled."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    assert float(counts[probabilities == 0].sum()) == 0
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum().view(1)])
    wanted = torch.cat([expected[common], expected[~common].sum().view(1)])
    observed, wanted = observed[wanted > 1e-6], wanted[wanted > 1e-6]
    df = len(wanted) - 1
    if df == 0:
        return 0.0
    chi2 = float(((observed - wanted) ** 2 / wanted).sum())
    return ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.6},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"repetition_penalty": 1.5},
    {"top_k": 40, "top_p": 0.9, "temperature": 0.8},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.02, "temperature": 1.2, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [7, 200, 1000])
def test_draws_follow_huggingface_distribution(setting: dict[str, float], vocab: int) -> None:
    decoding = Decoding(**setting)  # type: ignore[arg-type]
    logits = logits_of(vocab, seed=vocab)
    history = [1, 2, 3, 3, 5]
    tokens = draw_many(logits, decoding, history)
    assert abs(chi_square_z(tokens, huggingface(logits, decoding, history))) < 4.5


def test_a_nucleus_wider_than_the_first_candidates_is_exact() -> None:
    logits = logits_of(3000, scale=0.1)
    decoding = Decoding(top_p=0.5)
    probabilities = huggingface(logits, decoding)
    assert int((probabilities > 0).sum()) > 1000
    tokens = draw_many(logits, decoding)
    assert bool((probabilities[tokens] > 0).all())
    assert len(tokens.unique()) > 1000


def test_bfloat16_logits_are_drawn_from_as_they_are() -> None:
    logits = logits_of(200).bfloat16()
    tokens = draw_many(logits, Decoding())
    assert abs(chi_square_z(tokens, torch.softmax(logits.float(), -1))) < 4.5


def test_tokens_without_probability_are_never_drawn() -> None:
    logits = torch.full((300,), -torch.inf)
    logits[[0, 130, 299]] = torch.tensor([0.0, 1.0, 2.0])
    assert set(draw_many(logits, Decoding()).tolist()) == {0, 130, 299}


@pytest.mark.parametrize("offset", [-300.0, 0.0, 300.0])
def test_the_level_of_the_logits_does_not_matter(offset: float) -> None:
    logits = logits_of(200)
    assert abs(chi_square_z(draw_many(logits + offset, Decoding()), torch.softmax(logits, -1))) < 4.5


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("do_sample", [True, False])
def test_logprobs_are_of_the_raw_distribution(setting: dict[str, float], do_sample: bool) -> None:
    decoding = Decoding(do_sample=do_sample, **setting)  # type: ignore[arg-type]
    rows = torch.stack([logits_of(333, seed=i) + 3 * i for i in range(6)])
    drawn = Sampler(decoding).draw(rows, [derive_seed(i) for i in range(6)], list(range(6)), [[1, 2]] * 6)
    expected = rows.log_softmax(-1)[torch.arange(6), torch.tensor(drawn.tokens)]
    assert torch.allclose(torch.tensor(drawn.logprobs), expected, atol=2e-5)


def test_greedy_takes_the_largest_after_the_penalty() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0]])
    assert Sampler(Decoding(do_sample=False)).draw(logits, [1], [0]).tokens == [0]
    penalised = Sampler(Decoding(do_sample=False, repetition_penalty=1.5))
    assert penalised.draw(logits, [1], [0], [[0]]).tokens == [1]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = torch.stack([logits_of(500, seed=i) for i in range(40)])
    seeds = [derive_seed("row", i) for i in range(40)]
    sampler = Sampler(Decoding(top_p=0.9))
    together = sampler.draw(rows, seeds, list(range(40))).tokens
    alone = [sampler.draw(rows[i : i + 1], seeds[i : i + 1], [i]).tokens[0] for i in range(40)]
    assert together == alone


def test_uniforms_are_splitmix64_and_uniform() -> None:
    def reference(seed: int, position: int) -> float:
        mask = (1 << 64) - 1
        z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 11) / 2**53

    seeds = [derive_seed("u", i) for i in range(50)]
    assert uniforms(seeds, range(50)).tolist() == [reference(s, p) for p, s in enumerate(seeds)]
    many = uniforms([derive_seed("v", i // 100) for i in range(100_000)], [i % 100 for i in range(100_000)])
    counts = np.histogram(many, bins=100, range=(0, 1))[0]
    assert abs(float(((counts - 1000) ** 2 / 1000).sum()) - 99) < 5 * math.sqrt(2 * 99)
    assert abs(float(np.corrcoef(many[:-1], many[1:])[0, 1])) < 0.015


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    draw_many(logits_of(50), Decoding(temperature=0.9))
    assert torch.equal(before, torch.random.get_rng_state())
