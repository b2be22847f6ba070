"""What a round holds in memory: so much a prompt, next to nothing a sample."""

import gc
import json
import tracemalloc

import pytest
from test_loop import run

from iterative_sft_cli import stats
from iterative_sft_cli.rounds.rows import PackedRows
from iterative_sft_cli.rounds.waves import into_units
from iterative_sft_cli.rundir import RunDir
from iterative_sft_cli.samples import PROMPTS, read_prompts
from iterative_sft_cli.types import Prompt, TrainRow


def peak(toy, tmp_path, prompts, samples, train=None):
    """Bytes at the peak of a run of one round."""
    config = toy(
        rounds=1,
        output_dir=f"run-{prompts}-{samples}",
        prompts={"per_round": "all", "order": "shuffle"},
        generate={"samples_per_prompt": samples},
        filters=["finished", "numeric_answer", {"max_per_prompt": 1}],
        train={"epochs": None, "steps": 4, **(train or {})},
        eval=None,
    )
    lines = [json.dumps({"question": f"{n}+{n % 7}", "answer": str(n + n % 7)}) + "\n" for n in range(prompts)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    gc.collect()
    tracemalloc.start()
    try:
        run(config)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_with_the_prompts_by_less_than_a_kilobyte_and_hardly_with_the_samples(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(into_units, "__defaults__", (64,))  # many shards of a small run
    monkeypatch.setattr(stats, "DIVERSITY_TOKENS", 100)  # what is bounded is full in the smallest
    peak(toy, tmp_path, 16, 1)  # what is loaded once a process
    few, many, deep = (peak(toy, tmp_path, *size) for size in [(1024, 1), (4096, 1), (1024, 4)])
    a_prompt, a_sample = (many - few) / 3072, (deep - few) / 3072
    print(f"{a_prompt:.0f} bytes a prompt, {a_sample:.0f} a sample")
    assert 0 < a_prompt < 1000
    assert a_sample < 100


def test_packed_rows_give_back_what_was_put_in():
    rows = [
        TrainRow("1-0-0", (5, 70_000, 0), (-100, 70_000, 0), 1.0),
        TrainRow("1-1-0", (), (), -0.5),
        TrainRow("seed-0", (1, 2), (-100, 2), 0.1, (-0.25,)),
    ]
    packed = PackedRows(rows)
    assert list(packed) == rows and packed[-1] == rows[2] and packed[:2] == rows[:2] and len(packed) == 3
    with pytest.raises(IndexError):
        packed[3]


def test_prompts_read_back_are_those_in_memory_only_where_they_are_the_same(tmp_path):
    whole, text = Prompt("0", "a", row={"n": 1}), Prompt("1", "b", row={"n": 1})
    with RunDir.create(tmp_path / "run", config_source=b"", resolved={}, environment={}) as held:
        rows = [{"prompt_id": p.prompt_id, "prompt": p.prompt, "answer": None, "level": None} for p in (whole, text)]
        held.shards.seal(1, PROMPTS, [{**rows[0], "row": {"n": 1}}, {**rows[1], "row": {"n": 1.0}}], {})
        found = read_prompts(held.shards, 1, {"0": whole, "1": text})
    assert found["0"] is whole
    assert found["1"] == text and found["1"] is not text and type(found["1"].row["n"]) is float
