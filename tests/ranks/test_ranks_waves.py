"""Waves of samples on several ranks, and stopped between two waves: each prompt is read once on a rank, and the bytes are the same."""

from rank_helpers import contents, rows, write_tiny

QUICK = {"ISFT_RANK_PATIENCE_S": "0.5,10,60,60"}
WAVES = {
    "model": {"dtype": "bfloat16"},
    "rounds": 1,
    "generate": {"until_accepted": 1, "samples_per_prompt": 6, "keep_logprobs": True},
    "filters": ["nonempty", "third.py:third"],
    "eval": None,
    "train": {"steps": 1, "epochs": None},
}
THIRD = "def third(sample):\n    return sum(sample.completion_ids) % 3 == 0\n"
SMALL = """
import time
from iterative_sft_cli.generate import embedded_plan, embedded_prompts
from iterative_sft_cli.generate.embedded import EmbeddedEngine
from iterative_sft_cli.rounds import sampling, waves
waves.into_units.__defaults__ = (4,)
embedded_plan.PREFILL_TOKENS_CPU = 60
made = EmbeddedEngine.generate
def generate(self, requests, decoding, plan):
    open(f"{FOLDER}/made-{RANK}", "a").write(f"{plan['kept_prompts']} of {len(requests)}\\n")
    time.sleep(0.2)
    yield from made(self, requests, decoding, plan)
EmbeddedEngine.generate = generate
"""
STOP = """
from iterative_sft_cli.rounds import judge
sealed = judge.RoundJudge._draw
def draw(self, draws):
    found = sealed(self, draws)
    if draws[0].first:
        raise KeyboardInterrupt
    return found
judge.RoundJudge._draw = draw
"""


def test_waves_on_two_ranks_and_after_a_stop_are_those_of_one_process(forks, tmp_path, tiny_model, said):
    (tmp_path / "third.py").write_text(THIRD)
    small, stop = tmp_path / "small.py", tmp_path / "stop.py"
    small.write_text(SMALL.replace("{FOLDER}", str(tmp_path)))
    stop.write_text(small.read_text() + STOP)
    runs = {name: write_tiny(tmp_path, name, tiny_model, **WAVES) for name in ("one", "two", "stopped")}
    assert forks.run(tmp_path, 1, "train", str(runs["one"]), before=small) == [0], said(0)
    drawn = [len(rows(path)) for path in sorted((tmp_path / "one/rounds/0001").glob("generated-*.jsonl"))]
    assert 14 < sum(drawn) < 42 and len(drawn) > 5, drawn
    assert forks.run(tmp_path, 2, "train", str(runs["two"]), before=small, **QUICK) == [0, 0], said(0)
    made = [line.split() for rank in range(2) for line in (tmp_path / f"made-{rank}").read_text().splitlines()]
    assert all(kept == asked for kept, _, asked in made) and (tmp_path / "made-1").read_text(), made
    assert forks.run(tmp_path, 1, "train", str(runs["stopped"]), before=stop) != [0]
    assert forks.run(tmp_path, 1, "train", str(runs["stopped"]), before=small) == [0], said(0)
    expected = contents(tmp_path / "one")
    samples = {name for name in expected if name.startswith("rounds/")}
    for name in ("two", "stopped"):
        found = contents(tmp_path / name)
        assert {one: found.get(one) for one in samples} == {one: expected[one] for one in samples}, name
    assert contents(tmp_path / "stopped") == expected
