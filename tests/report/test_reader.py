"""`Run.open`: what a program sees of a run directory."""

from __future__ import annotations

import json

import pytest

from iterative_sft_cli import Run
from iterative_sft_cli.errors import DataError
from iterative_sft_cli.report.columns import columns_of
from iterative_sft_cli.samples import StoredSample, read_eval_prompts
from iterative_sft_cli.types import Sample


def test_the_prompts_of_the_evaluation_are_kept_with_the_run(done):
    run = Run.open(done)
    prompts = read_eval_prompts(run.view.shards)
    asked = {row["prompt_id"] for row in run.view.shards.read(0, "eval-00000")[0]}
    assert asked == set(prompts) and prompts["0"].prompt == "4+0" and prompts["0"].answer == "4"


def test_samples_are_a_data_set_or_a_data_frame(done):
    run = Run.open(done)
    stored = list(run.iter_samples())
    data = run.samples()
    assert len(data) == len(stored) == 144 and data["sample_id"] == [one.sample.sample_id for one in stored]
    frame = run.samples([2, 3], accepted=True, as_="pandas")
    assert frame["accepted"].all() and set(frame["round"]) == {2, 3}
    assert len(frame) == sum(row["filters/num_accepted"] for row in run.stats[2:])
    assert set(frame["score/numeric_answer"]) == {1.0} and (frame["numeric_answer/answer"] == frame["answer"]).all()
    assert json.loads(frame["row"].iloc[0])["question"] == frame["prompt"].iloc[0]
    with pytest.raises(ValueError, match="dataset"):
        run.samples(as_="polars")


def test_columns_have_one_type_whatever_the_data_holds():
    import datasets

    def one(index, **changes):
        fields = {"prompt_id": "p", "sample_id": f"1-p-{index}", "round_index": 1, "prompt": "x", "completion": "y"}
        return Sample(**{**fields, **changes})

    says = [
        {"filter": "a", "keep": True, "score": 1, "extra": {"n": 1}},
        {"filter": "a", "keep": False, "reason": "no", "extra": {"n": "one", "m": [1, "x"]}},
    ]
    samples = [
        StoredSample(one(0, answer=4), 1, (says[0],), True),
        StoredSample(one(1, answer="four", prompt=[{"role": "user", "content": "x"}]), 2, (says[1],), False),
        StoredSample(one(2, answer=None), 2**63 - 1, (), True),
    ]
    columns = columns_of(samples)
    assert columns["answer"] == ["4", "four", None] and columns["a/n"] == ["1", "one", None]
    assert columns["score/a"] == [1.0, None, None] and columns["a/m"] == [None, '[1, "x"]', None]
    assert columns["reason"] == [None, "no", None] and columns["seed"][2] == 2**63 - 1
    data = datasets.Dataset.from_dict(columns)
    assert data.num_rows == 3 and json.loads(data["prompt"][1])[0]["role"] == "user"
    chats = [StoredSample(one(0, prompt=[{"role": "user", "content": "x"}]), 1, (), True)]
    assert datasets.Dataset.from_dict(columns_of(chats))["prompt"][0] == [{"role": "user", "content": "x"}]
    assert columns_of([])["sample_id"] == []


def test_opening_what_is_no_run(tmp_path):
    with pytest.raises(DataError, match="no run here"):
        Run.open(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match="not a run of isft"):
        Run.open(tmp_path)
