"""Training a tiny Llama on several ranks: what one process learns, to fp32 rounding, at any number of ranks."""

import numpy as np
import pytest
from rank_helpers import LORA, QUICK, contents, steps, weights_of, write_tiny


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_two_ranks_learn_what_one_process_learns(forks, tmp_path, tiny_model, changes, said):
    runs = {}
    for size in (1, 2):
        config = write_tiny(tmp_path, f"run{size}", tiny_model, **changes)
        assert forks.run(tmp_path, size, "train", str(config), **QUICK) == [0] * size, said(0)
        runs[size] = tmp_path / f"run{size}"
    one, two = steps(runs[1]), steps(runs[2])
    assert len(one) == len(two) > 4
    for a, b in zip(one, two, strict=True):
        for key in ("learning_rate", "num_samples", "num_tokens", "num_trained_tokens"):
            assert a[key] == b[key]  # every sample once, the same curve, the same divisor
        assert abs(a["loss"] - b["loss"]) < 1e-4
    for key in ("0001",):
        first, second = weights_of(runs[1], key), weights_of(runs[2], key)
        for name, value in first.items():
            np.testing.assert_allclose(second[name], value, rtol=1e-4, atol=2e-5)
    samples = "rounds/0001/generated-00000.jsonl"
    assert contents(runs[1])[samples] == contents(runs[2])[samples]


def test_state_goes_from_two_ranks_to_one_and_back(forks, tmp_path, tiny_model, said):
    config = write_tiny(tmp_path, "run", tiny_model, rounds=3)
    whole = write_tiny(tmp_path, "whole", tiny_model, rounds=3)
    assert forks.run(tmp_path, 1, "train", str(whole)) == [0]
    for rounds, size in ((1, 2), (2, 1), (3, 2)):
        codes = forks.run(tmp_path, size, "train", str(config), f"rounds={rounds}", **QUICK)
        assert codes == [0] * size, said(0)
    one, other = steps(tmp_path / "whole"), steps(tmp_path / "run")
    assert [row["learning_rate"] for row in one] == [row["learning_rate"] for row in other]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, other, strict=True)) < 1e-3


def test_a_step_that_a_signal_cuts_short_is_taken_on_no_rank(forks, tmp_path, tiny_model, said):
    hook = tmp_path / "stop.py"
    hook.write_text(
        "import os, signal\n"
        "from iterative_sft_cli.train.torch_core import TrainCore\n"
        "norm = TrainCore._norm\n"
        "steps = []\n"
        "def stopping(self, grads):\n"
        "    steps.append(1)\n"
        "    if RANK == 0 and len(steps) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return norm(self, grads)\n"
        "TrainCore._norm = stopping\n"
    )
    config = write_tiny(tmp_path, "run", tiny_model)
    whole = write_tiny(tmp_path, "whole", tiny_model)
    assert forks.run(tmp_path, 2, "train", str(config), before=hook, **QUICK) == [75, 75], said(0)
    assert (tmp_path / "run" / "checkpoints" / "0001-000002").is_dir()
    assert forks.run(tmp_path, 2, "train", str(config), **QUICK) == [0, 0], said(0)
    assert forks.run(tmp_path, 2, "train", str(whole), **QUICK) == [0, 0]
    left, right = contents(tmp_path / "run"), contents(tmp_path / "whole")
    assert {k: v for k, v in left.items() if "checkpoints" in k} == {
        k: v for k, v in right.items() if "checkpoints" in k
    }


def test_a_rank_that_dies_within_a_collective_is_named_and_nothing_else_is_said(forks, tmp_path, tiny_model, said):
    hook = tmp_path / "die.py"
    hook.write_text(
        "import os, signal\n"
        "import torch.distributed as dist\n"
        "if RANK == 0:\n"
        "    dist.broadcast = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    config = write_tiny(tmp_path, "run", tiny_model)
    assert forks.run(tmp_path, 2, "train", str(config), before=hook, **QUICK) == [-9, 4]
    assert said(1).startswith("isft: rank 1 (") and "lost the store of rank 0" in said(1), said(1)


FSDP = {"train": {"parallel": "fsdp2"}}


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_pieces_learn_what_one_process_learns(forks, tmp_path, tiny_model, changes, said):
    """fsdp2, in small micro-batches of which the ranks have different numbers; state goes to one process and on."""
    small = {**changes, "train": {"micro_batch_tokens": 40}}
    cut = {**changes, "train": {"micro_batch_tokens": 40, "parallel": "fsdp2"}}
    one = write_tiny(tmp_path, "run1", tiny_model, **small)
    two = write_tiny(tmp_path, "run2", tiny_model, **cut)
    assert forks.run(tmp_path, 1, "train", str(one)) == [0], said(0)
    assert forks.run(tmp_path, 2, "train", str(two), "rounds=1", **QUICK) == [0, 0], said(0)
    assert forks.run(tmp_path, 2, "train", str(two), **QUICK) == [0, 0], said(0) + said(1)
    left, right = steps(tmp_path / "run1"), steps(tmp_path / "run2")
    for a, b in zip(left, right, strict=True):
        for key in ("learning_rate", "num_samples", "num_tokens", "num_trained_tokens"):
            assert a[key] == b[key]
        assert abs(a["loss"] - b["loss"]) < 1e-4
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-3 * a["grad_norm"]
    first, second = weights_of(tmp_path / "run1", "0002"), weights_of(tmp_path / "run2", "0002")
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=1e-4, atol=2e-5)
    assert forks.run(tmp_path, 1, "train", str(two), "rounds=3") == [0], said(0)
    assert len(steps(tmp_path / "run2")) > len(right)
