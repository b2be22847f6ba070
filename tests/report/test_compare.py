"""`isft compare`: figures against a count by hand, pairing by what was asked, and a table that pools seeds."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import report_runs
from report_runs import call, call_json

from iterative_sft_cli import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, done):
    """The finished run, one that learned faster, and two further seeds."""
    folder = tmp_path_factory.mktemp("runs")
    made = {"a": done}
    made["b"] = report_runs.train(folder / "b", train={"learning_rate": 0.2, "data": "accumulate"})
    for seed in (1, 2):
        made[f"s{seed}"] = report_runs.train(folder / f"s{seed}", seed=seed)
    return made


def by_hand(run, round_index):
    """Prompt id to the share of correct samples, from the sealed rows."""
    rows, _ = run.view.shards.read(round_index, "eval-00000")
    made: dict[str, list[bool]] = {}
    for row in rows:
        made.setdefault(row["prompt_id"], []).append(row["correct"])
    return {key: sum(values) / len(values) for key, values in made.items()}


def test_two_runs_paired_by_prompt(runs, capsys):
    found = call_json(capsys, "compare", runs["a"], runs["b"])
    a, b = by_hand(Run.open(runs["a"]), 3), by_hand(Run.open(runs["b"]), 3)
    paired = found["paired"]
    gained, lost = sum(b[k] > a[k] for k in a), sum(b[k] < a[k] for k in a)
    assert (paired["num_prompts"], paired["gained"], paired["lost"]) == (12, gained, lost) and gained > 0
    assert math.isclose(paired["difference"], sum(b.values()) / 12 - sum(a.values()) / 12)
    n, few = gained + lost, min(gained, lost)
    assert math.isclose(paired["p_value"], min(1, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n))
    assert paired["difference_low"] <= paired["difference"] <= paired["difference_high"]
    assert {one["prompt_id"] for one in found["gained"]} <= {k for k in a if b[k] > a[k]}
    assert all(one["prompt"] for one in found["gained"])
    assert {one["key"] for one in found["config"]} == {"train.data", "train.learning_rate"}
    assert found["runs"][0]["cost"]["generated_tokens"] == sum(
        row.get("generate/num_tokens", 0) for row in Run.open(runs["a"]).stats
    )
    code, out, err = call(capsys, "compare", runs["a"], runs["b"])
    assert code == 0 and err == "" and f"gained {gained}, lost {lost}" in out and "train.learning_rate" in out


def test_prompts_are_paired_by_what_they_ask_not_by_their_place(runs, tmp_path, capsys):
    config = report_runs.write_config(tmp_path)
    lines = (tmp_path / "dev.jsonl").read_text().splitlines()
    (tmp_path / "dev.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    code, _, err = call(capsys, "train", config)
    assert code == 0, err
    found = call_json(capsys, "compare", tmp_path / "run", runs["a"], "--limit", 20)
    other, mine = by_hand(Run.open(runs["a"]), 3), by_hand(Run.open(tmp_path / "run"), 3)
    for one in found["gained"] + found["lost"]:
        assert one["before"] == mine[one["prompt_id"]] and one["after"] == other[str(11 - int(one["prompt_id"]))]
    assert found["gained"] + found["lost"]


def test_one_run_with_its_starting_model(runs, capsys):
    found = call_json(capsys, "compare", runs["a"])
    assert [one["round"] for one in found["runs"]] == [0, 3] and found["config"] == []
    assert found["paired"]["after"] > found["paired"]["before"]
    assert call_json(capsys, "compare", runs["a"], "--at", "2")["runs"][1]["round"] == 2
    code, out, _ = call(capsys, "compare", runs["a"])
    assert code == 0 and "one run" in out


def test_other_metrics(runs, capsys):
    found = call_json(capsys, "compare", runs["a"], runs["b"], "--metric", "pass@2")
    assert found["paired"]["after"] >= call_json(capsys, "compare", runs["a"], runs["b"])["paired"]["after"]
    for metric, said in {"pass@9": "2 samples a prompt", "greedy": "no greedy samples", "f1": "such as pass@1"}.items():
        code, _, err = call(capsys, "compare", runs["a"], runs["b"], "--metric", metric)
        assert code == 2 and said in err, metric


def test_more_runs_are_a_table_and_seeds_are_pooled(runs, capsys):
    found = call_json(capsys, "compare", *runs.values())
    assert [one["value"] for one in found["runs"]] == sorted((one["value"] for one in found["runs"]), reverse=True)
    [pool] = found["pools"]
    values = [Run.open(runs[name]).stats[-1]["eval/pass@1"] for name in ("a", "s1", "s2")]
    mean = sum(values) / 3
    half = 4.303 * math.sqrt(sum((v - mean) ** 2 for v in values) / 2 / 3)
    assert sorted(pool["seeds"]) == [1, 2, 7] and math.isclose(pool["mean"], mean)
    assert math.isclose(pool["low"], mean - half) and math.isclose(pool["high"], mean + half)
    code, out, _ = call(capsys, "compare", *runs.values())
    assert code == 0 and "3 runs of one config" in out


def test_a_pattern_names_runs(runs, capsys):
    folder = runs["b"].parent.parent
    found = call_json(capsys, "compare", f"{folder}/*/run")
    assert {one["run"] for one in found["runs"]} == {str(runs[name]) for name in ("b", "s1", "s2")}
    code, _, err = call(capsys, "compare", f"{folder}/none*/run")
    assert code == 2 and "no run is called like that" in err


def test_runs_that_cannot_be_compared_say_why(runs, tmp_path, capsys):
    config = report_runs.write_config(tmp_path, rounds=1)
    rows = [{"question": f"{n}0+1", "answer": str(n * 10 + 1)} for n in range(7, 9)]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call(capsys, "train", config)[0] == 0
    code, _, err = call(capsys, "compare", runs["a"], tmp_path / "run")
    assert code == 4 and "no prompt in common" in err
    shutil.rmtree(tmp_path / "run")
    config = report_runs.write_config(tmp_path, rounds=1)
    text = config.read_text()
    config.write_text(text[: text.index("eval:")])
    assert call(capsys, "train", config)[0] == 0
    code, _, err = call(capsys, "compare", runs["a"], tmp_path / "run")
    assert code == 4 and "no evaluated round" in err
    code, _, err = call(capsys, "compare", runs["a"], runs["b"], "--at", "7")
    assert code == 2 and "last, best, or one of 0, 1, 2, 3" in err


def test_a_difference_in_judging_is_said(runs, tmp_path, capsys):
    other = report_runs.train(tmp_path, rounds=1, eval={"temperature": 0.5})
    notes = call_json(capsys, "compare", runs["a"], other)["notes"]
    assert any("eval.temperature" in note for note in notes)
