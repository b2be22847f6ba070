"""`isft why`: what it says of a sample is what happened to it."""

from __future__ import annotations

import io

import pytest
import report_runs
from report_runs import call, call_json

from iterative_sft_cli import Run, build
from iterative_sft_cli.console import Console
from iterative_sft_cli.experiment import run_experiment


@pytest.mark.parametrize(
    "train",
    [
        {"data": "accumulate", "start_from": "base"},
        {"passes": [{"epochs": 1}, {"threshold": 0.5, "by": "numeric_answer", "steps": 3}]},
    ],
    ids=["accumulate", "passes"],
)
def test_the_steps_are_those_in_which_the_sample_was_in_the_batch(tmp_path, capsys, monkeypatch, train):
    batches: list[list[str]] = []
    opened = build.open_backend

    def recording(*args):
        backend = opened(*args)
        step = backend.learner.step

        def record(rows, *rest):
            batches.append([row.sample_id for row in rows])
            return step(rows, *rest)

        backend.learner.step = record
        return backend

    monkeypatch.setattr(build, "open_backend", recording)
    config = report_runs.write_config(tmp_path, rounds=2, train=train)
    run = Run.open(run_experiment(config, view=Console(io.StringIO())).run_dir)
    counts = [row["num_steps"] for row in run.view.ledger_rows() if row["event"] == "selected"]
    by_round = {1: batches[: counts[0]], 2: batches[counts[0] :]}
    assert [len(one) for one in by_round.values()] == counts
    seen = 0
    for stored in list(run.iter_samples())[::5]:
        sample_id = stored.sample.sample_id
        story = call_json(capsys, "why", run.path, sample_id)
        told = {(one["round"], step["step"]) for one in story["trained"] for step in one["steps"]}
        happened = {(r, n) for r, steps in by_round.items() for n, ids in enumerate(steps, 1) if sample_id in ids}
        assert told == happened and bool(happened) <= stored.accepted
        for one in story["trained"]:
            assert one["times"] == sum(ids.count(sample_id) for ids in by_round[one["round"]]) == len(one["steps"])
        seen += bool(happened)
    assert seen >= 2


def test_seed_decoding_weights_and_verdicts(done, capsys):
    run = Run.open(done)
    stored = next(one for one in run.iter_samples([2]) if not one.accepted and one.rejected_by["filter"] != "dedup")
    story = call_json(capsys, "why", done, stored.sample.sample_id)
    _, meta = run.view.shards.read(2, "generated-00000")
    assert story["seed"] == stored.seed and story["weights"] == meta["weights"] and story["plan"] == meta["plan"]
    assert story["generated_with"] == "checkpoint 0001" and story["decoding"]["temperature"] == 1.0
    assert story["not_asked"] == ["dedup"] and story["trained"] == [] and story["reason"] == "wrong_answer"
    assert story["completion_ids"] == list(stored.sample.completion_ids)
    code, out, err = call(capsys, "why", done, stored.sample.sample_id)
    assert code == 0 and err == "" and "dedup: not asked" in out and "was not accepted" in out and "seed " in out


def test_a_sample_of_the_evaluation_has_its_story_too(done, capsys):
    rows = {row["sample_id"]: row for row in call_json(capsys, "samples", done, "--eval", "--round", 2, "--limit", 0)}
    _, meta = Run.open(done).view.shards.read(2, "eval-00000")
    for sample_id in list(rows)[::7]:
        story = call_json(capsys, "why", done, sample_id, "--eval")
        assert story["completion"] == rows[sample_id]["completion"] and story["says"] == rows[sample_id]["says"]
        assert story["generated_with"] == "checkpoint 0002" and story["weights"] == meta["weights"] != "toy-base"
        assert (
            story["trained"] == []
            and story["decoding"]["temperature"] == Run.open(done).settings.eval_decoding().temperature
        )
    assert call_json(capsys, "why", done, "0-0-0", "--eval")["generated_with"] == "the starting model"
    _, out, _ = call(capsys, "why", done, sample_id, "--eval")
    assert "never: it is a sample of the evaluation" in out and ("correct" in out or "wrong" in out)
    code, _, err = call(capsys, "why", done, "2-99-0", "--eval")
    assert code == 2 and "samples" in err and "--eval" in err


def test_every_sample_of_a_prompt_that_was_drawn_in_waves_is_found(tmp_path, capsys):
    run = report_runs.train(
        tmp_path,
        rounds=1,
        generate={"until_accepted": 2, "samples_per_prompt": 16},
        filters=["finished", "numeric_answer"],
    )
    stored = list(Run.open(run).iter_samples())
    shards = {call_json(capsys, "why", run, one.sample.sample_id)["shard"] for one in stored[:: len(stored) // 12]}
    assert len(shards) > 1


@pytest.mark.parametrize("sample_id", ["9-1-1", "1-none-0", "x", "", "1-0-99"])
def test_an_unknown_id_is_exit_2_with_the_way_to_find_one(done, capsys, sample_id):
    code, out, err = call(capsys, "why", done, sample_id)
    assert code == 2 and out == "" and "isft samples" in err
