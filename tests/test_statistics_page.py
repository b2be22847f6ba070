"""Every figure that a run writes is defined in `isft docs statistics`, and every figure that a warning reads is written."""

import json
import re

import pytest
from test_loop import SEARCH, rows, run

from iterative_sft_cli.alarms import CONDITIONS
from iterative_sft_cli.config.condition import Condition
from iterative_sft_cli.harness import figures
from iterative_sft_cli.report.documents import page
from iterative_sft_cli.stats import TrainCounter

PLACES = {"K": r"\d+", "NAME": r"[\w.]+", "WORD": r"[\w.]+", "LEVEL": r"[^/]+", "TASK": r"\w+", "METRIC": r"[\w/,-]+"}


def defined():
    """(pattern, whether it has an interval) of every key in the tables."""
    text = page("statistics")
    before, _, after = text.partition("Each figure of this table comes with")
    _, with_interval, plain = after.split("\n\n| key |")
    for part, interval in ((before, False), (with_interval, True), (plain, False)):
        for line in part.splitlines():
            if line.startswith("| `"):
                for key in re.findall(r"`([a-z]+/[^`]+)`", line.split(" | ")[0]):
                    words = re.split(rf"\b({'|'.join(PLACES)})\b", key)
                    made = "".join(PLACES.get(word, re.escape(word)) for word in words)
                    yield made + ("(?:_low|_high)?" if interval else "")


PATTERNS = [re.compile(one) for one in defined()]


def undefined(row):
    return [key for key in row if key != "round" and not any(pattern.fullmatch(key) for pattern in PATTERNS)]


CASES = {
    "plain": {"rounds": 2, "eval": {"samples_per_prompt": 4, "k": [1, 4], "greedy": True, "level": "level"}},
    "search": SEARCH,
    "second tries": {"rationalize": {"template": "{prompt} hint {answer}"}, "filters": ["numeric_answer"]},
}


@pytest.mark.parametrize("case", CASES)
def test_every_figure_of_a_run_is_defined(toy, tmp_path, case):
    run(toy(**CASES[case]))
    stats = rows(tmp_path / "run" / "stats.jsonl")
    assert not {key: row["round"] for row in stats for key in undefined(row)}
    if case == "plain":
        assert stats[1].keys() >= {"eval/change", "eval/change_low", "eval/num_gained", "eval/maj@4", "eval/greedy_low"}
        assert stats[1]["eval/change"] == pytest.approx(stats[1]["eval/pass@1"] - stats[0]["eval/pass@1"])
        read = {figure for condition, _ in CONDITIONS for figure in Condition(condition).figures}
        # seed data and a second round are what these two need
        assert read - set(stats[-1]) == {"train/seed_loss"}


def test_figures_that_this_run_does_not_have_are_defined_too():
    counter = TrainCounter()
    counter.undo()
    counter.add({"loss": 1.0, "grad_norm": 2.0})
    harness = [{"task": "arc_easy", "metric": "exact_match", "filter": "strict-match", "value": 0.5, "stderr": 0.1}]
    assert not undefined({**counter.row(3), **figures(harness), "train/seed_loss": 1.0})
    assert undefined({"eval/pass": 1, "filters/odd": 2}) == ["eval/pass", "filters/odd"]
    assert json.dumps(sorted(figures(harness))) == (
        '["eval/lm_eval/arc_easy/exact_match/strict-match", "eval/lm_eval/arc_easy/exact_match/strict-match_stderr"]'
    )
