"""Ranks under strain: four of them, delays in every phase, kills at random instants, stopped processes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rank_helpers import AGAIN, LORA, PIECES, QUICK, contents, steps, weights_of, write_tiny, write_toy_many

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
COLLECTIVE_S = 4
KILLS = int(os.environ.get("ISFT_RANK_KILLS", "20"))


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_four_ranks_with_fewer_rows_than_ranks(forks, tmp_path, tiny_model, changes, said):
    """21 rows in steps of 6: the last step has 3 rows for 4 ranks."""
    for size in (1, 4):
        config = write_tiny(tmp_path, f"run{size}", tiny_model, **{**changes, "rounds": 1, "filters": ["nonempty"]})
        assert forks.run(tmp_path, size, "train", str(config), **QUICK) == [0] * size, said(0)
    one, four = steps(tmp_path / "run1"), steps(tmp_path / "run4")
    assert min(row["num_samples"] for row in one) < 4
    for a, b in zip(one, four, strict=True):
        for key in ("learning_rate", "num_samples", "num_tokens", "num_trained_tokens"):
            assert a[key] == b[key]
        assert abs(a["loss"] - b["loss"]) < 1e-4
    first, second = weights_of(tmp_path / "run1", "0001"), weights_of(tmp_path / "run4", "0001")
    worst = max(float(np.abs(second[name] - value).max()) for name, value in first.items())
    assert worst < 2e-5, worst


PHASES = ("load", "serve", "generate", "filters", "begin", "batches", "backward")
LATE = [*(f"1,{phase}" for phase in PHASES), *(f"0,{phase}" for phase in (*PHASES, "weights", "save"))]


def run_late(forks, folder, tiny_model, late, **changes):
    """The exit codes of a run in which one rank sleeps for longer than a collective's time-out."""
    config = write_tiny(folder, "run", tiny_model, **changes)
    options = {"LATE": f"{late},{COLLECTIVE_S + 3},1", "ISFT_RANK_PATIENCE_S": f"0.5,30,60,{COLLECTIVE_S}"}
    return forks.run(folder, 2, "train", str(config), before=HERE / "delays.py", **options)


@pytest.mark.parametrize("late", LATE)
def test_a_rank_that_is_late_breaks_nothing(forks, tmp_path, tiny_model, undisturbed, late, said):
    assert run_late(forks, tmp_path, tiny_model, late, **AGAIN) == [0, 0], said(0)
    assert contents(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("late", [one for one in LATE if not one.endswith("backward")])
def test_a_rank_that_is_late_breaks_nothing_between_pieces(forks, tmp_path, tiny_model, undisturbed_pieces, late, said):
    """The same with fsdp2, whose collectives stand in the forward and backward passes too."""
    assert run_late(forks, tmp_path, tiny_model, late, **PIECES) == [0, 0], said(0) + said(1)
    assert contents(tmp_path / "run") == undisturbed_pieces


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_late_within_a_pass_over_pieces_is_an_error_of_the_ranks(
    forks, tmp_path, tiny_model, rank, said
):
    """There the other one waits in a collective: a device that stands still for ten minutes."""
    assert run_late(forks, tmp_path, tiny_model, f"{rank},backward", **PIECES) == [4, 4]
    assert "isft: rank " in said(0) and "Traceback" not in said(0) + said(1), said(0) + said(1)
    config = write_tiny(tmp_path, "run", tiny_model, **PIECES)
    assert forks.run(tmp_path, 2, "train", str(config), **QUICK) == [0, 0]


def test_kills_at_random_instants(forks, tmp_path, tiny_model, undisturbed, said):
    """Each kill ends both ranks in a named error; the run goes on to the same bytes."""
    draw = random.Random(9)
    start = time.monotonic()
    whole = write_tiny(tmp_path, "timed", tiny_model, **AGAIN)
    assert forks.run(tmp_path, 2, "train", str(whole), **QUICK) == [0, 0]
    length = time.monotonic() - start
    longest, finished = 0.0, 0
    for number in range(KILLS):
        config = write_tiny(tmp_path, f"run{number}", tiny_model, **AGAIN)
        while True:
            for rank in range(2):
                (tmp_path / f"rank{rank}.txt").unlink(missing_ok=True)
            pids = forks.start(tmp_path, 2, "train", str(config), **QUICK)
            victim = draw.randrange(2)
            time.sleep(draw.uniform(0.0, 1.1 * length))
            os.kill(pids[victim], signal.SIGKILL)  # not yet waited for, so the number is still theirs
            killed = time.monotonic()
            codes = forks.wait(pids)
            longest = max(longest, time.monotonic() - killed)
            if codes[victim] != -9:
                break
            other = said(1 - victim)
            if codes[1 - victim] == 0:
                break  # the run was complete and all had been told
            assert codes[1 - victim] == 4, (codes, other)
            assert "rank " in other.rpartition("isft: ")[2] and "Traceback" not in other, other
            if draw.random() < 0.5:
                break
        assert longest < 120
        assert forks.run(tmp_path, 2, "train", str(config), **QUICK) == [0, 0], said(0)
        assert contents(tmp_path / f"run{number}") == undisturbed
        finished += 1
    print(f"{finished} runs killed, the other rank ended within {longest:.1f} s")


SHIPPED = HERE.parents[1] / "configs" / "accelerate"
ACCELERATE = ["accelerate.commands.launch"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        *(*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
    "accelerate-ddp": [*ACCELERATE, "--config_file", str(SHIPPED / "ddp.yaml")],
    "accelerate-fsdp2": [*ACCELERATE, "--config_file", str(SHIPPED / "fsdp2.yaml")],
}


def launch(folder, launcher, config):
    environ = {
        **os.environ,
        **QUICK,
        "HF_HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "iterative_sft_cli", "train", str(config)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "accelerate-ddp"])
def test_the_real_launchers(tmp_path, tiny_model, undisturbed, launcher):
    config = write_tiny(tmp_path, "run", tiny_model, **AGAIN)
    done = launch(tmp_path, launcher, config)
    assert done.returncode == 0 and "on 2 processes" in done.stderr, done.stderr
    assert contents(tmp_path / "run") == undisturbed


def test_accelerate_told_of_fsdp2(forks, tmp_path, tiny_model):
    """It runs what the config says, and refuses where the two disagree."""
    config = write_tiny(tmp_path, "run", tiny_model, **AGAIN)
    done = launch(tmp_path, "accelerate-fsdp2", config)
    assert done.returncode != 0 and "train.parallel is auto" in done.stderr and not (tmp_path / "run").exists()
    for name in ("run", "forked"):
        config = write_tiny(tmp_path, name, tiny_model, **PIECES)
        if name == "run":
            done = launch(tmp_path, "accelerate-fsdp2", config)
            assert done.returncode == 0 and "on 2 processes" in done.stderr, done.stderr
        else:
            assert forks.run(tmp_path, 2, "train", str(config), **QUICK) == [0, 0]
    assert contents(tmp_path / "run") == contents(tmp_path / "forked")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_stops_without_dying_is_given_up(forks, tmp_path, victim, said):
    config = write_toy_many(tmp_path, "run")
    pids = forks.start(tmp_path, 2, "train", str(config), TOY_DELAY_S="0.01", ISFT_RANK_PATIENCE_S="0.5,5,20,20")
    deadline = time.monotonic() + 30
    while not (tmp_path / "run" / "rounds" / "0001" / "generated-00000.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(pids[victim], signal.SIGSTOP)
    stopped = time.monotonic()
    codes = forks.wait([pids[1 - victim]])
    assert codes == [4] and time.monotonic() - stopped < 60
    named = ("not been heard of for 5 s", "lost the store", "no answer from rank 0's store")
    assert any(words in said(1 - victim) for words in named), said(1 - victim)
    os.kill(pids[victim], signal.SIGCONT)
    assert forks.wait([pids[victim]])[0] in (4, 0)
