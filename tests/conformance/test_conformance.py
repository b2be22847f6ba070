"""Closed forms of the literature, met by the real loop on models that are fitted exactly (closed_form_models.py).

Each test says what the theory gives, over how many draws the figure is taken, and how far it may be off by chance.
"""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from closed_form_models import softmax
from test_loop import rows, run

from iterative_sft_cli.rundir import RunDir
from iterative_sft_cli.samples import iter_round

MODELS = Path(__file__).resolve().parent / "closed_form_models.py"


@pytest.fixture
def start(tmp_path):
    """Runs a model on prompts: `start(name, args, prompts, rounds=..., train=..., ...)`; the run's folder."""

    def begin(name, args, prompts, *, folder="run", **changes):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps({"question": text, "answer": "1"}) + "\n" for text in prompts))
        train = {"start_from": "base", "data": "replace", "batch_size": 100_000, "learning_rate": 1.0}
        config = {
            "model": {"use": f"{MODELS}:{name}", "args": args},
            "output_dir": str(tmp_path / folder),
            "prompts": {"path": "prompts.jsonl", "prompt": "question", "answer": "answer", "order": "sequential"},
            "generate": {"samples_per_prompt": 1, "max_new_tokens": 100_000},
            "guards": {"on_empty": "skip"},
            **changes,
        }
        config["train"] = train | changes.get("train", {})
        config["generate"] = {"samples_per_prompt": 1, "max_new_tokens": 100_000} | changes.get("generate", {})
        (tmp_path / f"{folder}.yaml").write_text(yaml.safe_dump(config))
        run(tmp_path / f"{folder}.yaml")
        return tmp_path / folder

    return begin


def weights(folder, round_index):
    return json.loads((folder / "checkpoints" / f"{round_index:04d}" / "model.json").read_text())


def stored(folder, round_index):
    return list(iter_round(RunDir.peek(folder).shards, round_index))


def test_t1_least_squares_error_grows_by_n_under_replace_and_stays_bounded_under_accumulate(start):
    """E_n / E_1 = n under replace, sum of 1/i^2 under accumulate (Gerstgrasser et al. 2024, Dohmatob et al. 2024).

    d = 20, T = 60, 200 replicates: one error is known to 2 %, a ratio to 4 %.
    """
    d, t, replicates, rounds = 20, 60, 200, 8
    args = {"d": d, "t": t, "replicates": replicates}
    ratios = {}
    for data in ("replace", "accumulate"):
        folder = start(
            "OLS",
            args,
            [str(i) for i in range(t)],
            folder=data,
            rounds=rounds,
            train={"data": data},
            checkpoints={"keep": rounds},
        )
        true = np.random.default_rng(0)
        true.standard_normal((t, d))
        w = true.standard_normal((d, replicates))
        errors = [((np.asarray(weights(folder, n)["w"]) - w) ** 2).sum(0).mean() for n in range(1, rounds + 1)]
        ratios[data] = np.array(errors) / errors[0]
    assert ratios["replace"] == pytest.approx(np.arange(1, rounds + 1), rel=0.1)
    assert ratios["accumulate"] == pytest.approx(np.cumsum(1 / np.arange(1, rounds + 1) ** 2), rel=0.06)


def test_t2_the_variance_of_a_gaussian_fades_under_replace(start):
    """E var = (1 - 1/n)^t and E log var = t (psi((n-1)/2) + log(2/n)) for fits by maximum likelihood on n = 20 own samples.

    1,000 replicates: the mean is known to 1 % after 1 round and 4 % after 10, the mean log to 0.06 after 30.
    """
    n, replicates = 20, 1000
    folder = start(
        "Gaussian", {"replicates": replicates}, [str(i) for i in range(n)], rounds=30, checkpoints={"keep": 30}
    )
    variance = {t: np.asarray(weights(folder, t)["s"]) ** 2 for t in (1, 10, 30)}
    assert variance[1].mean() == pytest.approx(1 - 1 / n, rel=0.03)
    assert variance[10].mean() == pytest.approx((1 - 1 / n) ** 10, rel=0.12)
    digamma = 2.19760  # psi(9.5)
    expected = 30 * (digamma + math.log(2 / n))
    assert np.log(variance[30]).mean() == pytest.approx(expected, abs=0.2)
    assert np.median(variance[30]) < 0.1 < (1 - 1 / n) ** 30


def test_t3_best_of_k_has_its_quantile_and_its_divergence(start):
    """The mean quantile of the best of K is K / (K + 1); KL(best of K || model) = ln K - (K - 1) / K.

    400 prompts: the quantile is known to 0.01 (K = 2) and better, the divergence to 0.05.
    """
    ks = [2, 4, 8, 16, 32]
    folder = start(
        "Uniform",
        {},
        [str(i) for i in range(400)],
        rounds=len(ks),
        generate={"samples_per_prompt": {"by_round": ks}},
        filters=[{"best_of_n": {"by": "logprob"}}],
    )
    for round_index, k in enumerate(ks, start=1):
        best = np.array([one.sample.logprob for one in stored(folder, round_index) if one.accepted])
        assert len(best) == 400
        assert best.mean() == pytest.approx(k / (k + 1), abs=0.04 if k == 2 else 0.02)
        divergence = (math.log(k) + (k - 1) * np.log(best)).mean()
        assert divergence == pytest.approx(math.log(k) - (k - 1) / k, abs=0.15)


def test_t4_training_and_decoding_temperatures_multiply(start):
    """A model fitted to its samples at T, decoded at T', is the model at T x T' (simple self-distillation without truncation).

    6,000 draws over 6 words, twice: a share is known to 0.01.
    """
    p = [0.4, 0.25, 0.15, 0.1, 0.07, 0.03]
    folder = start(
        "Table",
        {"p": p},
        [str(i) for i in range(300)],
        rounds=2,
        generate={"samples_per_prompt": 20, "temperature": {"by_round": [1.6, 0.9]}},
        train={"start_from": "previous"},
    )
    counts = Counter(int(one.sample.completion) for one in stored(folder, 2))
    shares = np.array([counts[i] for i in range(6)]) / 6000
    assert shares == pytest.approx(softmax(np.log(p), 1.6 * 0.9), abs=0.03)
    assert abs(shares - softmax(np.log(p), 1.6)).max() > 0.02


P = (0.02, 0.1, 0.3, 0.6, 0.95)


def test_t5_and_t6_a_cap_evens_out_easy_prompts_and_coverage_is_binomial(start):
    """Shares of the accepted by difficulty under no cap, cap 10 and cap 4 of 32; P(solved) = 1 - (1 - p)^32.

    60 prompts of each p: a share is known to 0.01, a coverage to 0.05.
    """
    n, each = 32, 60
    folder = start(
        "Solver",
        {},
        [f"p={p} {i}" for p in P for i in range(each)],
        rounds=2,
        generate={"samples_per_prompt": n},
        filters=["numeric_answer", {"max_per_prompt": {"n": {"by_round": [10, 4]}}}],
    )

    def shares(samples):
        counts = Counter(float(one.sample.prompt.split("p=")[1].split()[0]) for one in samples)
        return [counts[p] / sum(counts.values()) for p in P]

    def capped(p, cap):
        return sum(min(k, cap) * math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1))

    rounds = {1: stored(folder, 1), 2: stored(folder, 2)}
    right = [one for one in rounds[1] if one.says[0]["keep"]]
    assert shares(right) == pytest.approx([p / sum(P) for p in P], abs=0.02)
    for round_index, cap in ((1, 10), (2, 4)):
        expected = np.array([capped(p, cap) for p in P])
        kept = [one for one in rounds[round_index] if one.accepted]
        assert shares(kept) == pytest.approx(expected / expected.sum(), abs=0.02)
    solved = Counter(float(one.split("p=")[1].split()[0]) for one in {one.sample.prompt for one in right})
    assert [solved[p] / each for p in P] == pytest.approx([1 - (1 - p) ** n for p in P], abs=0.15)


def test_t7_a_majority_is_right_as_often_as_the_binomial_says(start):
    """P(more than half of m votes right) + P(tie) / 2, for two answers.

    200 prompts of each p: a share is known to 0.035.
    """
    ps, votes, each = (0.4, 0.55, 0.7), [5, 16, 32], 200
    folder = start(
        "Solver",
        {},
        [f"p={p} {i}" for p in ps for i in range(each)],
        rounds=3,
        generate={"samples_per_prompt": {"by_round": votes}},
        filters=["majority"],
    )
    for round_index, m in enumerate(votes, start=1):
        right, tied = Counter(), Counter()
        for one in stored(folder, round_index):
            p = float(one.sample.prompt.split("p=")[1].split()[0])
            if one.sample.sample_index == 0:
                says = one.says[0]
                tied[p] += says.get("reason") == "tie"
                right[p] += (says.get("extra") or {}).get("majority") == "1"
        for p in ps:
            expected = sum(
                math.comb(m, k) * p**k * (1 - p) ** (m - k) * (1 if 2 * k > m else 0.5 if 2 * k == m else 0)
                for k in range(m + 1)
            )
            assert (right[p] + tied[p] / 2) / each == pytest.approx(expected, abs=0.1), (m, p)


def test_t8_gvm_splits_its_budget_by_the_closed_form(start):
    """n_i in proportion to 1 / sqrt(p + alpha / p): .346, .251, .182, .129, .092 for these p; exact up to rounding."""
    ps = (0.02, 0.125, 0.25, 0.5, 1.0)
    folder = start(
        "Solver",
        {"exact": True},
        [f"p={p}" for p in ps],
        rounds=1,
        generate={"samples_per_prompt": 400, "budget": {"kind": "gvm", "pilot": 200}},
        filters=["numeric_answer"],
    )
    made = Counter(one.sample.prompt for one in stored(folder, 1))
    shares = [(made[f"p={p}"] - 200) / 2000 for p in ps]
    weight = [1 / math.sqrt(p + 1e-3 / p) for p in ps]
    assert shares == pytest.approx([w / sum(weight) for w in weight], abs=0.001)
    assert shares == pytest.approx([0.346, 0.251, 0.182, 0.129, 0.092], abs=0.001)


def test_t9_a_step_on_the_accepted_is_reinforce_over_the_acceptance_rate(start):
    """Mean over the accepted of grad log p = (mean over all of r grad log p) / acceptance rate; exact."""
    p = [0.5, 0.2, 0.2, 0.1]
    rate = 0.25
    folder = start(
        "Table",
        {"p": p},
        [str(i) for i in range(100)],
        rounds=1,
        generate={"samples_per_prompt": 4},
        filters=[{"use": "regex", "args": {"pattern": "^[12]$"}}],
        train={"learning_rate": rate},
    )
    samples = stored(folder, 1)
    accept_rate = sum(one.accepted for one in samples) / len(samples)
    score = np.eye(4)[[int(one.sample.completion) for one in samples]] - softmax(np.log(p), 1.0)
    reward = np.array([one.accepted for one in samples], float)
    reinforce = (reward[:, None] * score).mean(0)
    moved = np.asarray(weights(folder, 1)["logits"]) - np.log(p)
    assert 0.2 < accept_rate < 0.6
    assert moved == pytest.approx(rate * reinforce / accept_rate, abs=1e-12)


def test_t10_shares_of_new_older_and_seed_rows(start, tmp_path):
    """Self-improving transformers: with seed data of 16 lengths and 3 rounds done, 1/2 is new, 8/18 seed, 1/36 each older round."""
    (tmp_path / "seed.jsonl").write_text('{"prompt": "x", "completion": "1"}\n' * 160)
    folder = start(
        "Solver",
        {},
        [f"p=1.0 {i}" for i in range(10)],
        rounds=3,
        filters=["numeric_answer"],
        train={
            "data": "accumulate",
            "new_share": 0.5,
            "mix": {"path": "seed.jsonl", "share": "all", "weight": 16},
            "steps": 20,
            "batch_size": 180,
        },
    )
    times = Counter()
    for row in rows(folder / "rounds" / "0003" / "train.jsonl"):
        times[row["sample_id"].split("-")[0]] += row["times"]
    total = sum(times.values())
    assert total == 3600
    expected = {"3": 0.5, "seed": 0.5 * 16 / 18, "1": 0.5 / 18, "2": 0.5 / 18}
    assert {key: count / total for key, count in times.items()} == pytest.approx(expected, abs=1e-3)
    each: dict[str, list[int]] = {}
    for row in rows(folder / "rounds" / "0003" / "train.jsonl"):
        each.setdefault(row["sample_id"].split("-")[0], []).append(row["times"])
    assert all(max(counts) - min(counts) <= 1 for counts in each.values())
