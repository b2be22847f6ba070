"""pass@k, maj@k, best@k and intervals against brute force and closed forms."""

import itertools
import math

import pytest

from iterative_sft_cli.eval import (
    PromptResult,
    best_at_k,
    bootstrap_interval,
    changes,
    maj_at_k,
    paired_sign_test,
    pass_at_k,
    summarize,
)


@pytest.mark.parametrize("n,c,k", [(1, 0, 1), (4, 1, 2), (5, 3, 3), (6, 2, 6), (7, 0, 3), (7, 7, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_refuses_more_samples_than_there_are():
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples"):
        pass_at_k(4, 1, 5)


def test_best_at_k_is_the_mean_correctness_of_the_top_scored_of_every_subset():
    result = PromptResult("p", (True, False, True, False), scores=(0.1, 0.9, 0.5, None))
    rank = [0.1, 0.9, 0.5, -math.inf]
    subsets = list(itertools.combinations(range(4), 2))
    expected = sum(result.correct[max(s, key=lambda i: rank[i])] for s in subsets) / len(subsets)
    assert best_at_k(result, 2) == pytest.approx(expected)


def test_majority_shares_ties_and_ignores_samples_without_an_answer():
    result = PromptResult("p", (True, False, False, False), answers=("4", "5", None, None))
    assert maj_at_k(result, 4) == 0.5
    assert maj_at_k(PromptResult("p", (True, True, False), answers=("4", "4", "5")), 3) == 1.0
    assert maj_at_k(PromptResult("p", (False,), answers=(None,)), 1) == 0.0


def test_bootstrap_interval_covers_the_mean_and_is_repeatable():
    values = [0.0] * 30 + [1.0] * 70
    low, high = bootstrap_interval(values, seed=3)
    assert low < 0.7 < high and high - low == pytest.approx(2 * 1.96 * math.sqrt(0.21 / 100), rel=0.15)
    assert (low, high) == bootstrap_interval(values, seed=3)


def test_summary_names_every_figure():
    results = [
        PromptResult("a", (True, False), ("1", "2"), level=1, greedy_correct=True),
        PromptResult("b", (False, False), ("3", "3"), level=2, greedy_correct=False),
    ]
    row = summarize(results, [2, 8], seed=0)
    assert row["eval/pass@1"] == 0.25 and row["eval/pass@2"] == 0.5 and row["eval/greedy"] == 0.5
    assert row["eval/maj@2"] == 0.25 and row["eval/level/1/pass@1"] == 0.5
    assert "eval/pass@8" not in row and row["eval/num_samples"] == 4
    assert row["eval/pass@1_low"] <= row["eval/pass@1"] <= row["eval/pass@1_high"]


def test_sign_test_is_exact():
    before = {str(i): 0.0 for i in range(10)}
    after = {str(i): float(i < 8) for i in range(9)} | {"8": -1.0}
    gained, lost, p = paired_sign_test(before, after)
    assert (gained, lost) == (8, 1) and p == pytest.approx(2 * (1 + 9) / 2**9)


def test_changes_are_paired_by_prompt():
    before = [PromptResult(str(i), (i < 2, False)) for i in range(10)]
    after = [PromptResult(str(i), (True, i == 0)) for i in reversed(range(12))]
    row = changes(before, after, seed=0)
    assert row["eval/change"] == pytest.approx((0.5 + 0 + 8 * 0.5) / 10)
    assert (row["eval/num_gained"], row["eval/num_lost"]) == (9, 0) and row["eval/change_p"] == pytest.approx(2 / 2**9)
    # each of ten differences is 0.5 but one: far narrower than the intervals of the two sides
    assert 0.25 < row["eval/change_low"] <= row["eval/change"] <= row["eval/change_high"] == 0.5
    assert changes([], after, seed=0) == {}
