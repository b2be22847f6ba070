"""The loop on several ranks with the toy backend: the same bytes as one process, and an end that all ranks share."""

import os
import signal
import time
from pathlib import Path

import pytest
from rank_helpers import contents, rows, write_toy_many

QUICK = {"ISFT_RANK_PATIENCE_S": "0.3,8,60,60"}


@pytest.fixture(scope="module")
def alone(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert forks.run(folder, 1, "train", str(write_toy_many(folder, "run"))) == [0]
    return contents(folder / "run")


def test_two_ranks_leave_what_one_process_leaves(forks, tmp_path, alone):
    config = write_toy_many(tmp_path, "run")
    assert forks.run(tmp_path, 2, "train", str(config), **QUICK) == [0, 0], (tmp_path / "rank0.txt").read_text()
    assert contents(tmp_path / "run") == alone
    assert "on 2 processes" in (tmp_path / "rank0.txt").read_text()
    # nothing is written or said anywhere else
    assert (tmp_path / "rank1.txt").read_text() == ""


FILTERS = [
    "finished",
    "odd.py:not_odd",
    "numeric_answer",
    "dedup",
    {"top_k": {"by": "-num_tokens", "k": 3}},
    "even_level.py:even_level",
]
ODD = "def not_odd(sample, most=9):\n    return len(sample.completion) % 2 == 0 or int(sample.row['level']) < most\n"
WIDE = "def even_level(samples):\n    return [one.row['level'] % 2 == 0 for one in samples]\n"
COUNT = """
import time
import toy_backend
from iterative_sft_cli.filters.runners import DirectRunner
for name in ("made", "judged"):
    open(f"{FOLDER}/{name}-{RANK}", "a").close()
judged = DirectRunner.judge
def judge(self, sample):
    with open(f"{FOLDER}/judged-{RANK}", "a") as file:
        file.write(f"{self._one.name} {sample.sample_id}\\n")
    return judged(self, sample)
DirectRunner.judge = judge
made = toy_backend.ToyEngine.generate
def generate(self, requests, decoding, plan):
    open(f"{FOLDER}/made-{RANK}", "a").write(f"{len(requests)}\\n")
    time.sleep(0.3)
    yield from made(self, requests, decoding, plan)
toy_backend.ToyEngine.generate = generate
import iterative_sft_cli.build as build
build.open_backend = lambda config, base: toy_backend.make(config)
"""


@pytest.mark.parametrize("size", [2, 4])
def test_shards_are_made_and_judged_on_every_rank(forks, tmp_path, size, said):
    """Filters of samples, of groups and of the round: what one process accepts, each sample judged once."""
    (tmp_path / "odd.py").write_text(ODD)
    (tmp_path / "even_level.py").write_text(WIDE)
    whole = write_toy_many(tmp_path, "whole", rounds=1, filters=FILTERS)
    config = write_toy_many(tmp_path, "run", rounds=1, filters=FILTERS)
    assert forks.run(tmp_path, 1, "train", str(whole)) == [0], said(0)
    count = tmp_path / "count.py"
    count.write_text(COUNT.replace("{FOLDER}", str(tmp_path)))
    assert forks.run(tmp_path, size, "train", str(config), before=count, **QUICK) == [0] * size, said(0)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    made = [(tmp_path / f"made-{rank}").read_text().split() for rank in range(size)]
    assert sum(map(len, made)) == 4 + 2 * 2  # shards of the round, and of two evaluations
    assert sum(map(bool, made)) > 1  # a rank that starts late may find none left
    judged = [(tmp_path / f"judged-{rank}").read_text().splitlines() for rank in range(size)]
    first = [line for each in judged for line in each if line.startswith("finished 1-")]
    assert len(first) == 200 * 8 + 40 * 16  # of the round and of its evaluation
    assert sum(map(bool, judged)) > 1 and said(1) == ""


def test_a_filter_that_fails_on_another_rank_is_tried_by_rank_0(forks, tmp_path, alone, said):
    break_it = tmp_path / "break.py"
    break_it.write_text(
        "from iterative_sft_cli.filters.runners import DirectRunner\n"
        "judged = DirectRunner.judge\n"
        "def judge(self, sample):\n"
        "    if RANK:\n"
        "        raise RuntimeError('only here')\n"
        "    return judged(self, sample)\n"
        "DirectRunner.judge = judge\n"
    )
    config = write_toy_many(tmp_path, "run")
    assert forks.run(tmp_path, 2, "train", str(config), before=break_it, **QUICK) == [0, 0], said(0)
    assert contents(tmp_path / "run") == alone


def test_a_host_with_another_filter_is_refused(forks, tmp_path, said):
    other = tmp_path / "other.py"
    other.write_text(
        "from iterative_sft_cli.ranks import judging, worker\n"
        "worker.hashes_of = lambda filters: {**judging.hashes_of(filters), 'dedup': 'x'}\n"
    )
    config = write_toy_many(tmp_path, "run")
    assert forks.run(tmp_path, 2, "train", str(config), before=other, **QUICK) == [4, 4]
    assert "has another source of the filter `dedup` than rank 0" in said(0)


def test_a_config_error_ends_every_rank_with_its_code(forks, tmp_path, said):
    config = write_toy_many(tmp_path, "run")
    config.write_text(config.read_text().replace("rounds: 2", "rounds: two"))
    start = time.monotonic()
    assert forks.run(tmp_path, 2, "train", str(config), **QUICK) == [2, 2]
    assert "rounds" in said(0) and said(1) == ""
    assert time.monotonic() - start < 60


def test_a_rank_that_cannot_say_that_it_has_heard_of_the_end_ends_with_its_code(forks, tmp_path, said):
    """Its main thread waits for an answer over a network that was cut when the end had been told."""
    stuck = tmp_path / "stuck.py"
    stuck.write_text(
        "import time\n"
        "from iterative_sft_cli.ranks import link\n"
        "link.SURFACE_S = 1.0\n"
        "if RANK:\n"
        "    link.Link.join = lambda self: time.sleep(600)\n"
    )
    config = write_toy_many(tmp_path, "run")
    config.write_text(config.read_text().replace("rounds: 2", "rounds: two"))
    assert forks.run(tmp_path, 2, "train", str(config), before=stuck, **QUICK) == [2, 2]
    assert said(1) == ""


def test_a_filter_that_fails_on_rank_0_ends_every_rank(forks, tmp_path, said):
    (tmp_path / "bad.py").write_text("def bad(sample):\n    raise ValueError('no')\n")
    config = write_toy_many(tmp_path, "run", filters=["finished", "bad.py:bad"])
    assert forks.run(tmp_path, 2, "train", str(config), **QUICK) == [5, 5]
    assert "ValueError" in said(0) or "no" in said(0)


def test_a_rank_that_comes_after_the_end_hears_of_it(forks, tmp_path):
    config = write_toy_many(tmp_path, "run", rounds=1)
    assert forks.run(tmp_path, 1, "train", str(config)) == [0]
    late = tmp_path / "late.py"
    late.write_text("import time\nif RANK:\n    time.sleep(2)\n")
    assert forks.run(tmp_path, 2, "train", str(config), before=late, **QUICK) == [0, 0]


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_and_the_run_goes_on_to_the_same_bytes(forks, tmp_path, alone, victim, said):
    config = write_toy_many(tmp_path, "run")
    pids = forks.start(tmp_path, 2, "train", str(config), TOY_DELAY_S="0.002", **QUICK)
    wait_for(lambda: (tmp_path / "run" / "rounds" / "0001" / "generated-00000.jsonl").exists())
    os.kill(pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    codes = forks.wait(pids)
    assert time.monotonic() - killed < 60
    assert codes[victim] == -9 and codes[1 - victim] == 4
    other = said(1 - victim)
    assert f"pid {pids[1]}" in other if victim == 1 else "rank 0" in other
    assert "Traceback" not in other
    assert forks.run(tmp_path, 2, "train", str(config), **QUICK) == [0, 0]
    assert contents(tmp_path / "run") == alone


def test_a_signal_to_any_rank_saves_and_stops_all(forks, tmp_path, alone, said):
    config = write_toy_many(tmp_path, "run")
    pids = forks.start(tmp_path, 2, "train", str(config), TOY_DELAY_S="0.002", **QUICK)
    wait_for(lambda: (tmp_path / "run" / "rounds" / "0001" / "generated-00000.jsonl").exists())
    os.kill(pids[1], signal.SIGTERM)
    assert forks.wait(pids) == [75, 75]
    assert f"SIGTERM on rank 1 ({os.uname().nodename}, pid {pids[1]})" in said(0)
    assert forks.run(tmp_path, 2, "train", str(config), **QUICK) == [0, 0]
    assert contents(tmp_path / "run") == alone


def test_another_number_of_ranks_goes_on_and_the_ledger_says_so(forks, tmp_path, alone):
    config = write_toy_many(tmp_path, "run", rounds=1)
    assert forks.run(tmp_path, 2, "train", str(config), **QUICK) == [0, 0]
    assert forks.run(tmp_path, 1, "train", str(config), "rounds=2") == [0]
    changed = [row for row in rows(tmp_path / "run" / "ledger.jsonl") if row["event"] == "changed"]
    assert [(row["key"], row["old"], row["new"]) for row in changed] == [("processes", 2, None)]
    names = {name for name in alone if name.startswith("rounds/")}
    found = contents(tmp_path / "run")
    assert {name: found[name] for name in names} == {name: alone[name] for name in names}


def test_gpus_starts_the_others_and_names_how_one_ended(forks, tmp_path, alone, said):
    """`--gpus 2` without a GPU: the second process is started here, and its death is seen at once."""
    config = write_toy_many(tmp_path, "run")
    (pid,) = forks.start(tmp_path, 1, "train", str(config), "--gpus", "2", TOY_DELAY_S="0.002", **QUICK)
    wait_for(lambda: (tmp_path / "run" / "rounds" / "0001" / "generated-00000.jsonl").exists(), 60)
    children = (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text().split()
    workers = [int(one) for one in children if b"iterative_sft_cli" in (Path("/proc") / one / "cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    assert forks.wait([pid]) == [4]
    assert f"pid {workers[0]}) was ended by SIGKILL" in said(0)
    assert forks.run(tmp_path, 1, "train", str(config), "--gpus", "2", **QUICK) == [0]
    assert contents(tmp_path / "run") == alone
