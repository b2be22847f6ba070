"""Figures of held-out evaluation: unbiased pass@k, maj@k, best@k, and bootstrap intervals over prompts, all deterministic."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from iterative_sft_cli.types import derive_seed

NUM_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class PromptResult:
    """The outcome of one eval prompt: for each sample whether it was correct, its final answer (for votes) and its score."""

    prompt_id: str
    correct: tuple[bool, ...]
    answers: tuple[str | None, ...] = ()
    scores: tuple[float | None, ...] = ()
    level: object = None
    greedy_correct: bool | None = field(default=None)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that at least one of k samples drawn without replacement is correct: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.1. Raises ValueError when k > n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a prompt, got {num_samples}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def maj_at_k(result: PromptResult, k: int) -> float:
    """Whether the most frequent answer among the first k samples is correct; ties are shared out evenly.

    Samples without an answer do not vote; with no votes at all it is 0.
    """
    votes: Counter[str] = Counter()
    right: dict[str, bool] = {}
    for answer, correct in zip(result.answers[:k], result.correct[:k], strict=False):
        if answer is not None:
            votes[answer] += 1
            right[answer] = right.get(answer, False) or correct
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return sum(right[answer] for answer in winners) / len(winners)


def best_at_k(result: PromptResult, k: int) -> float:
    """The expected correctness of the highest-scored of k samples drawn without replacement (ties by order).

    Source: Hosseini et al. 2024, "V-STaR", equation 3. Samples without a score rank last.
    """
    n = len(result.correct)
    if not 1 <= k <= n:
        raise ValueError(f"best@{k} needs at least {k} samples a prompt, got {n}")
    scores = result.scores or (None,) * n
    order = sorted(range(n), key=lambda i: -math.inf if scores[i] is None else float(scores[i] or 0.0))
    total = sum(math.comb(rank, k - 1) * result.correct[i] for rank, i in enumerate(order))
    return total / math.comb(n, k)


def bootstrap_interval(values: Sequence[float], *, seed: int, level: float = 0.95) -> tuple[float, float]:
    """A percentile bootstrap interval of the mean over prompts; (mean, mean) for fewer than two prompts."""
    n = len(values)
    if n == 0:
        return (0.0, 0.0)
    if n == 1:
        return (values[0], values[0])
    rng = random.Random(derive_seed(seed, "bootstrap", n))
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(NUM_RESAMPLES))
    tail = (1.0 - level) / 2.0
    return (means[int(tail * NUM_RESAMPLES)], means[min(NUM_RESAMPLES - 1, int((1.0 - tail) * NUM_RESAMPLES))])


def summarize(results: Sequence[PromptResult], ks: Sequence[int], *, seed: int) -> dict[str, float | int]:
    """The flat `eval/...` figures of one evaluation. A k larger than the samples of some prompt is left out."""
    out: dict[str, float | int] = {"eval/num_prompts": len(results)}
    if not results:
        return out
    out["eval/num_samples"] = sum(len(r.correct) for r in results)
    fewest = min(len(r.correct) for r in results)

    def put(name: str, value: Callable[[PromptResult], float]) -> None:
        values = [value(r) for r in results]
        low, high = bootstrap_interval(values, seed=seed)
        out[f"eval/{name}"] = sum(values) / len(values)
        out[f"eval/{name}_low"], out[f"eval/{name}_high"] = low, high

    for k in sorted({1, *ks}):
        if k <= fewest:
            put(f"pass@{k}", lambda r, k=k: pass_at_k(len(r.correct), sum(r.correct), k))  # type: ignore[misc]
    has_votes = any(answer is not None for r in results for answer in r.answers)
    has_scores = any(score is not None for r in results for score in r.scores)
    for k in sorted({fewest, *ks} - {1}):
        if k <= fewest and k > 1:
            if has_votes:
                put(f"maj@{k}", lambda r, k=k: maj_at_k(r, k))  # type: ignore[misc]
            if has_scores:
                put(f"best@{k}", lambda r, k=k: best_at_k(r, k))  # type: ignore[misc]
    if all(r.greedy_correct is not None for r in results):
        put("greedy", lambda r: float(bool(r.greedy_correct)))
    by_level: dict[str, list[float]] = defaultdict(list)
    for r in results:
        if r.level is not None:
            by_level[str(r.level)].append(pass_at_k(len(r.correct), sum(r.correct), 1))
    for name, values in sorted(by_level.items()):
        out[f"eval/level/{name}/pass@1"] = sum(values) / len(values)
    return out


def changes(before: Sequence[PromptResult], after: Sequence[PromptResult], *, seed: int) -> dict[str, float | int]:
    """The flat figures of the change of pass@1 between two evaluations of the same prompts, paired by prompt; empty without a pair.

    `eval/change`: mean difference over prompts, with its bootstrap interval `_low`, `_high`; `eval/num_gained`, `eval/num_lost`:
    prompts whose value rose or fell; `eval/change_p`: the p-value of the sign test on these.
    """
    old, new = ({r.prompt_id: sum(r.correct) / len(r.correct) for r in side if r.correct} for side in (before, after))
    shared = [key for key in new if key in old]
    if not shared:
        return {}
    differences = [new[key] - old[key] for key in shared]
    low, high = bootstrap_interval(differences, seed=seed)
    gained, lost, p_value = paired_sign_test(old, new)
    return {
        "eval/change": sum(differences) / len(differences),
        "eval/change_low": low,
        "eval/change_high": high,
        "eval/change_p": p_value,
        "eval/num_gained": gained,
        "eval/num_lost": lost,
    }


def paired_sign_test(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[int, int, float]:
    """(gained, lost, p): prompts whose value rose or fell, and the exact two-sided binomial p-value under no change.

    Compares the prompts that both have; ties are left out (McNemar's exact test for 0/1 values).
    """
    shared = before.keys() & after.keys()
    gained = sum(after[k] > before[k] for k in shared)
    lost = sum(after[k] < before[k] for k in shared)
    n = gained + lost
    if n == 0:
        return (0, 0, 1.0)
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1)) / 2**n
    return (gained, lost, min(1.0, 2.0 * tail))
