"""A loss or gradient that is NaN or infinite never reaches the weights and never hides: three policies, each resumable to the same bytes."""

import json
import math
from pathlib import Path

import pytest
from test_loop import digest, rows, run

from iterative_sft_cli import build
from iterative_sft_cli.errors import GuardStop
from iterative_sft_cli.rounds import training
from iterative_sft_cli.rundir import verify


@pytest.fixture
def nonfinite(monkeypatch):
    """Makes steps of the toy go wrong: `nonfinite({("2", 3): math.nan})`."""
    wrong = {}
    original = build.open_backend

    def open_backend(config, base_dir):
        backend = original(config, base_dir)
        known = type(backend.learner).step.__globals__["NONFINITE"]
        known.clear()
        known.update(wrong)
        return backend

    monkeypatch.setattr(build, "open_backend", open_backend)
    return wrong.update


def weights(folder: Path, key: str) -> dict:
    return json.loads((folder / "checkpoints" / key / "model.json").read_text())


def stopped_at(monkeypatch, call: int, start) -> None:
    """Run `start` until the `call`-th optimizer step."""
    original, left = training._step, [call]

    def crash(*args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", crash)
        with pytest.raises(KeyboardInterrupt):
            start()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_skip_leaves_the_step_out_and_counts_it(toy, tmp_path, nonfinite, value):
    nonfinite({("2", 1): value})
    outcome, _ = run(toy())
    folder = tmp_path / "run"
    assert outcome.code == 0 and verify(folder) == []
    stats = rows(folder / "stats.jsonl")
    assert [row.get("train/skipped_nonfinite") for row in stats] == [None, 0, 1, 0]
    assert stats[2]["train/num_steps"] > 1 and math.isfinite(stats[2]["train/loss"])
    steps = [row for row in rows(folder / "ledger.jsonl") if row["event"] == "step" and row["round"] == 2]
    assert [row["loss"] for row in steps].index(None) == 1 and steps[1]["skipped_nonfinite"] == 1
    for path in folder.rglob("*.json*"):
        assert not {"NaN", "Infinity"} & set(path.read_text().replace('"', " ").replace(":", " ").split()), path
    taken = weights(folder, "0003")["steps"]
    assert taken == sum(row["train/num_steps"] for row in stats[1:]) - 1


def test_stop_is_exit_3_and_goes_on_once_the_policy_allows_it(toy, tmp_path, nonfinite):
    nonfinite({("2", 1): math.nan})
    with pytest.raises(GuardStop, match="round 2, step 2: the loss or gradient is not finite") as caught:
        run(toy(train={"on_nonfinite": "stop"}))
    assert caught.value.exit_code == 3 and "train.on_nonfinite" in caught.value.render()
    with pytest.raises(GuardStop, match="round 2, step 2"):
        run(toy(train={"on_nonfinite": "stop"}))
    outcome, _ = run(toy(train={"on_nonfinite": "skip"}))
    assert outcome.code == 0
    assert rows(tmp_path / "run" / "stats.jsonl")[2]["train/skipped_nonfinite"] == 1
    changed = [row for row in rows(tmp_path / "run" / "ledger.jsonl") if row["event"] == "changed"]
    assert [(row["key"], row["old"], row["new"]) for row in changed] == [("train.on_nonfinite", "stop", "skip")]


STARTS = {
    "previous": {"start_from": "previous"},
    "base": {"start_from": "base", "data": "replace"},
    "best": {"start_from": "best"},
}


@pytest.mark.parametrize("case", STARTS)
@pytest.mark.parametrize("round_index", [1, 2])
def test_rollback_undoes_the_training_of_the_round(toy, tmp_path, nonfinite, case, round_index):
    nonfinite({(str(round_index), 2): math.nan})
    changes = {"rounds": round_index, "checkpoints": {"every_steps": 1}}
    run(toy(train={**STARTS[case], "on_nonfinite": "rollback"}, **changes))
    folder = tmp_path / "run"
    row = rows(folder / "stats.jsonl")[-1]
    assert (row["train/undone"], row["train/skipped_nonfinite"], row["train/num_steps"]) == (1, 1, 0)
    assert "train/loss" not in row
    undone = [row for row in rows(folder / "ledger.jsonl") if row["event"] == "undone"]
    assert [(row["round"], row["step"]) for row in undone] == [(round_index, 3)]
    now = weights(folder, f"{round_index:04d}")
    before = {"skill": 0.3, "steps": 0, "digest": ""} if round_index == 1 else weights(folder, "0001")
    # what each way of starting begins with: nothing of the undone round is in it
    assert now == before if case != "base" else now["steps"] == 0
    assert verify(folder) == []


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_stopped_around_such_a_step_it_ends_with_the_same_bytes(toy, tmp_path, monkeypatch, nonfinite, policy):
    nonfinite({("2", 2): math.nan})
    changes = {"train": {"on_nonfinite": policy}, "checkpoints": {"every_steps": 1}}
    run(toy(output_dir="whole", **changes))
    per_round = [row["train/num_steps"] for row in rows(tmp_path / "whole" / "stats.jsonl")[1:]]
    first = per_round[0]
    for call in range(first + 1, first + 5):
        folder = f"run-{call}"
        stopped_at(monkeypatch, call, lambda folder=folder: run(toy(output_dir=folder, **changes)))
        run(toy(output_dir=folder, **changes))
        assert digest(tmp_path / folder) == digest(tmp_path / "whole"), call


def test_an_exploding_torch_model_keeps_finite_weights(tmp_path):
    import torch
    from safetensors.torch import load_file
    from tiny import save_tiny

    torch.set_num_threads(1)
    save_tiny(tmp_path / "model")
    lines = [json.dumps({"question": f"{n} + 1", "answer": str(n + 1)}) + "\n" for n in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    (tmp_path / "boom.yaml").write_text(
        f"""\
model: {{path: {tmp_path / "model"}, device: cpu}}
output_dir: {tmp_path / "run"}
rounds: 2
prompts: {{path: prompts.jsonl, prompt: question, answer: answer}}
generate: {{samples_per_prompt: 2, max_new_tokens: 4}}
filters: [nonempty]
train: {{start_from: previous, data: replace, learning_rate: 1e30, max_grad_norm: null, batch_size: 3}}
"""
    )
    outcome, _ = run(tmp_path / "boom.yaml")
    assert outcome.code == 0
    stats = rows(tmp_path / "run" / "stats.jsonl")
    assert sum(row["train/skipped_nonfinite"] for row in stats) > 0
    files = list((tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    assert len(files) >= 4
    for path in files:
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values() if tensor.is_floating_point()), (
            path
        )
