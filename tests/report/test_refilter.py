"""`isft refilter`: the same verdicts that a run with those filters seals, and a fork that ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import report_runs
from report_runs import call, call_json

from iterative_sft_cli import Run
from iterative_sft_cli.rundir import verify

WIDE = ["finished", "numeric_answer", {"top_fraction": {"by": "numeric_answer", "q": 0.5}}, {"max_per_prompt": 1}]
OTHERS = {
    "fewer": ["finished", "numeric_answer"],
    "groups": ["finished", "numeric_answer", {"max_per_prompt": 1}],
    "round": WIDE,
    "judges": ["finished", {"contains": {"text": "1"}}, "dedup"],
    "thresholds": [
        "finished",
        {"numeric_answer": {"drop": False}},
        {"threshold": {"by": "numeric_answer", "min": 0.5}},
    ],
}


def contents(run):
    """Everything that must not depend on how the run came about."""
    files = [run / "ledger.jsonl", run / "stats.jsonl", *(run / "rounds").rglob("*")]
    files += [p for p in (run / "checkpoints").rglob("*") if p.name not in ("run.json", "MANIFEST.json")]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}


def logged(run):
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", OTHERS)
def test_a_fork_of_round_1_ends_with_the_bytes_of_a_fresh_run(name, done, tmp_path, capsys):
    fresh = report_runs.train(tmp_path / "fresh", filters=OTHERS[name])
    config = tmp_path / "fresh" / "toy.yaml"
    found = call_json(capsys, "refilter", done, config, "--round", 1, "--fork", tmp_path / "fork")
    stored = {one.sample.sample_id: one.accepted for one in Run.open(fresh).iter_samples([1])}
    before = {one.sample.sample_id: one.accepted for one in Run.open(done).iter_samples([1])}
    assert found["after"]["accepted"] == sum(stored.values()) and found["before"]["accepted"] == sum(before.values())
    assert found["gained"] == sum(stored[key] and not before[key] for key in stored)
    assert found["lost"] == sum(before[key] and not stored[key] for key in stored)
    code, _, err = call(capsys, "train", config, "--output-dir", tmp_path / "fork")
    assert code == 0, err
    assert logged(tmp_path / "fork") == logged(fresh)
    assert contents(tmp_path / "fork") == contents(fresh) and verify(tmp_path / "fork") == []
    assert Run.open(tmp_path / "fork").view.environment["forked_from"]["round"] == 1


def test_the_verdicts_are_those_of_the_stored_run_when_nothing_changes(done, capsys):
    for index in (1, 2, 3):
        found = call_json(capsys, "refilter", done, "--round", index)
        assert found["gained"] == found["lost"] == 0 and found["before"] == found["after"]
    code, out, err = call(capsys, "refilter", done)
    assert code == 0 and err == "" and "round 3: accepted 12 -> 12 of 48" in out


def test_examples_show_what_was_said_before_and_now(done, capsys):
    options = ("--round", "2", "filters=[finished, numeric_answer]", "--limit", "2")
    found = call_json(capsys, "refilter", done, *options)
    assert found["gained"] > 2 and len(found["examples"]["gained"]) == 2 and found["lost"] == 0
    one = found["examples"]["gained"][0]
    assert one["said_before"][-1]["reason"] == "duplicate" and all(says["keep"] for says in one["says"])
    code, out, _ = call(capsys, "refilter", done, *options)
    assert code == 0 and "dedup: dropped as duplicate" in out


def test_a_fork_of_a_later_round_keeps_what_came_before(done, tmp_path, capsys):
    fork = tmp_path / "fork"
    code, _, err = call(capsys, "refilter", done, "filters=[finished, numeric_answer]", "--round", 3, "--fork", fork)
    assert code == 0 and f"isft resume {fork}" in err
    assert "not started: forked at round 3" in call(capsys, "show", fork)[1]
    assert verify(fork) == []
    code, _, err = call(capsys, "resume", fork)
    assert code == 0, err
    old, new = Run.open(done), Run.open(fork)
    assert [row for row in new.stats if row["round"] < 3] == [row for row in old.stats if row["round"] < 3]
    assert new.stats[3]["filters/num_accepted"] > old.stats[3]["filters/num_accepted"]
    assert new.view.shards.read(3, "generated-00000") == old.view.shards.read(3, "generated-00000")
    assert new.stats[3]["train/num_rows"] == new.stats[3]["filters/num_accepted"]
    assert verify(fork) == [] and verify(done) == []


def test_the_same_filters_forked_later_end_with_the_same_bytes(done, tmp_path, capsys):
    assert call(capsys, "refilter", done, "--round", 3, "--fork", tmp_path / "fork")[0] == 0
    assert call(capsys, "resume", tmp_path / "fork")[0] == 0
    assert contents(tmp_path / "fork") == contents(done)


def test_a_fork_needs_the_checkpoint_that_the_round_began_with(done, tmp_path, capsys):
    code, _, err = call(capsys, "refilter", done, "--round", 2, "--fork", tmp_path / "fork")
    assert code == 4 and "checkpoint 0001, which was not kept" in err and not (tmp_path / "fork").exists()
    copy = tmp_path / "copy"
    shutil.copytree(done, copy)
    shutil.rmtree(copy / "checkpoints" / "0002" / "state")
    code, _, err = call(capsys, "refilter", copy, "--round", 3, "--fork", tmp_path / "fork")
    assert code == 4 and "optimizer" in err
    assert not list(tmp_path.glob(".*fork*")) and not (tmp_path / "fork").exists()


def test_a_config_that_would_have_drawn_other_samples_cannot_be_forked(done, tmp_path, capsys):
    for change in ("seed=8", "generate.temperature=0.5", "prompts.per_round=6", "eval.temperature=0.5"):
        code, _, err = call(capsys, "refilter", done, change, "--round", 1, "--fork", tmp_path / "fork")
        assert code == 2 and change.partition("=")[0] in err and not (tmp_path / "fork").exists(), change
    for change in ("train.learning_rate=0.3", "rounds=4"):
        assert call(capsys, "refilter", done, change, "--round", 1, "--fork", tmp_path / change)[0] == 0, change


def test_a_fork_never_touches_what_is_there(done, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for place in (tmp_path / "full", done):
        code, _, err = call(capsys, "refilter", done, "--round", 1, "--fork", place)
        assert code == 2 and "there already" in err
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (
            {"generate": {"until_accepted": 1, "samples_per_prompt": 4}, "filters": ["finished", "numeric_answer"]},
            "until_accepted",
        ),
        ({"rationalize": {"template": "{prompt} (it is {answer})"}}, "rationalize"),
    ],
)
def test_rounds_that_were_drawn_by_verdicts_are_refused(tmp_path, capsys, changes, word):
    config = report_runs.write_config(tmp_path, rounds=1, **changes)
    code, _, err = call(capsys, "train", config)
    if code != 0:
        pytest.skip(f"this version cannot train with {word}: {err[-200:]}")
    code, out, err = call(capsys, "refilter", tmp_path / "run", "--round", 1)
    assert code == 2 and word in err and out == ""


def test_wrong_arguments(done, tmp_path, capsys):
    for options, code, said in (
        (("--round", "7"), 2, "expected one of 1, 2, 3"),
        (("filters=[nonsense_filter]",), 2, "nonsense_filter"),
        ((tmp_path / "no.yaml",), 2, "no such file"),
    ):
        got, out, err = call(capsys, "refilter", done, *options)
        assert got == code and said in err and out == "", options


def test_thinking_is_split_as_in_training(done):
    from iterative_sft_cli.report.again import PlainSplitter, splitter_of

    run = Run.open(done)
    assert isinstance(splitter_of(run, 1, run.base_dir), PlainSplitter)


def test_a_thinking_completion_needs_the_encoder(done, tmp_path):
    from iterative_sft_cli.report.again import PlainSplitter, splitter_of

    copy = tmp_path / "copy"
    shutil.copytree(done, copy)
    run = Run.open(copy)
    rows, meta = run.view.shards.read(1, "generated-00000")
    rows[5]["completion"] = "<think>hm</think>4"
    report_runs.write_shard(copy, 1, "generated-00000", rows, meta)
    assert not isinstance(splitter_of(run, 1, run.base_dir), PlainSplitter)
