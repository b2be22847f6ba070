"""A cut between two hosts at random instants: both ranks end in a named error, and the run goes on to the same bytes.

ISFT_RANK_CUTS is the number of cuts [10], ISFT_RANK_CUT the number of the first one [0]: what a cut is like depends on its number
alone, so that any one can be made again.
"""

import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from hosts import CUTS
from rank_helpers import AGAIN, PIECES, contents, rows, write_tiny, write_toy_many

pytestmark = pytest.mark.slow
DELAYS = Path(__file__).resolve().parent / "delays.py"
NUMBER, FIRST = int(os.environ.get("ISFT_RANK_CUTS", "10")), int(os.environ.get("ISFT_RANK_CUT", "0"))
PATIENCE = {"ISFT_RANK_PATIENCE_S": "0.5,6,20,60"}
LONGER = {"ISFT_RANK_PATIENCE_S": "0.5,15,30,60"}
"""For cuts that heal: TCP sends again after pauses that double, so a cut of 4 s is felt for 8."""
LIMIT_S = 120
HELD_S = 1.5
HOLDS = {"load": 1, "serve": 3, "generate": 3, "filters": 4, "weights": 2, "begin": 2, "batches": 4, "backward": 4}
HOLDS |= {"reduce": 8, "save": 2}
"""Phases of delays.py in which a rank can be held, and how many calls of each there are at least."""
ONLY_RANK_0 = ("weights", "save", "filters")


@dataclass
class Cut:
    """One cut: its kind, the phase in which a rank is held (None: anywhere in the run), whether it heals."""

    number: int

    def __post_init__(self) -> None:
        self.draw = random.Random(f"cut {self.number}")
        self.kind = CUTS[self.number % len(CUTS)]
        self.held = list(HOLDS)[self.number // 2 % len(HOLDS)] if self.number % 2 else None
        self.heals = self.number % 5 == 2
        self.patience = LONGER if self.heals else {} if self.number % 10 == 6 else PATIENCE  # {}: what users have

    def before(self, mark: Path) -> dict[str, object]:
        """Options of `Hosts.start` that hold a rank."""
        if self.held is None:
            return {}
        rank = 0 if self.held in ONLY_RANK_0 else self.draw.randrange(2)
        late = f"{rank},{self.held},{HELD_S},{self.draw.randint(1, HOLDS[self.held])}"
        return {"before": DELAYS, "LATE": late, "LATE_MARK": str(mark)}

    def await_instant(self, mark: Path, length: float) -> None:
        if self.held is None:
            time.sleep(self.draw.uniform(0.0, length))
            return
        deadline = time.monotonic() + 5 * length
        while not mark.exists():
            if time.monotonic() > deadline:
                return  # the other rank was quicker and made the shards
            time.sleep(0.01)
        time.sleep(self.draw.uniform(0.0, HELD_S))


def place_of(run: Path) -> str:
    """How far a run is, in a word: its last line in the ledger."""
    try:
        return str(rows(run / "ledger.jsonl")[-1]["event"])
    except (OSError, IndexError, ValueError):
        return "before the first line"


def named(rank: int, text: str) -> bool:
    """Whether what a rank said last is an error that names the other one."""
    last = text.rpartition("isft: ")[2]
    return "Traceback" not in text and ("rank 1" in last if rank == 0 else "rank 0" in last)


def test_cuts_at_random_instants(hosts, tmp_path, tiny_model, undisturbed, said):
    for name in ("first", "whole"):  # a host's first run is slower
        whole = write_tiny(tmp_path, name, tiny_model, **AGAIN)
        start = time.monotonic()
        assert hosts.run(tmp_path, "train", str(whole), **LONGER) == [0, 0], said(0) + said(1)
        length = time.monotonic() - start
        assert contents(tmp_path / name) == undisturbed
    longest, ended, places = {0: 0.0, 1: 0.0}, Counter(), Counter()
    for number in range(FIRST, FIRST + NUMBER):
        cut = Cut(number)
        name, mark = f"run{number}", tmp_path / f"mark{number}"
        config = write_tiny(tmp_path, name, tiny_model, **AGAIN)
        for rank in range(2):
            (tmp_path / f"rank{rank}.txt").unlink(missing_ok=True)
        pids = hosts.start(tmp_path, "train", str(config), **cut.before(mark), **cut.patience)
        cut.await_instant(mark, length)
        place = cut.held if mark.exists() else place_of(tmp_path / name)
        hosts.cut(cut.kind)
        instant = time.monotonic()
        try:
            if cut.heals:
                time.sleep(cut.draw.uniform(0.5, 4.0))
                hosts.mend(cut.kind)
            ends = hosts.wait(pids)
        finally:
            if not cut.heals:
                hosts.mend(cut.kind)
        codes = [code for code, _ in ends]
        seconds = [max(0.0, when - instant) for _, when in ends]
        words = f"cut {number}: {cut.kind}, {place}, heals {cut.heals}: {codes} after {seconds[0]:.1f} and {seconds[1]:.1f} s"
        print(words, flush=True)
        about = f"{words}\n{said(0)}{said(1)}"
        if cut.heals:
            assert codes == [0, 0], about
        else:
            for rank, code in enumerate(codes):
                # a run that is complete is that although the other rank cannot hear it
                done = codes[0] == 0 and json.loads((tmp_path / name / "outcome.json").read_text())["code"] == 0
                assert (code == 0 and done) or (code == 4 and named(rank, said(rank))), about
                assert seconds[rank] < LIMIT_S, about
                if code:
                    longest[rank] = max(longest[rank], seconds[rank])
        ended[str(codes)] += 1
        places[place] += 1
        assert hosts.run(tmp_path, "train", str(config), **LONGER) == [0, 0], f"{about}\nthen\n{said(0)}{said(1)}"
        assert contents(tmp_path / name) == undisturbed, about
    print(f"{NUMBER} cuts in a run of {length:.1f} s: {dict(ended)}, at {dict(places)}")
    print(f"rank 0 ended within {longest[0]:.1f} s, rank 1 within {longest[1]:.1f} s")


@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_within_a_pass_over_pieces(hosts, tmp_path, tiny_model, undisturbed_pieces, kind, said):
    """With fsdp2 one rank waits in an all-gather while the other is held before its own."""
    config = write_tiny(tmp_path, "run", tiny_model, **PIECES)
    options = {"LATE": f"1,backward,{HELD_S},4", "LATE_MARK": str(tmp_path / "mark"), **PATIENCE}
    pids = hosts.start(tmp_path, "train", str(config), before=DELAYS, **options)
    deadline = time.monotonic() + 60
    while not (tmp_path / "mark").exists():
        assert time.monotonic() < deadline, said(0) + said(1)
        time.sleep(0.01)
    hosts.cut(kind)
    codes = [code for code, _ in hosts.wait(pids)]
    hosts.mend(kind)
    assert codes == [4, 4] and named(0, said(0)) and named(1, said(1)), said(0) + said(1)
    assert hosts.run(tmp_path, "train", str(config), **LONGER) == [0, 0], said(0)
    assert contents(tmp_path / "run") == undisturbed_pieces


def test_a_cut_names_the_host_and_how_long_it_was_silent(hosts, tmp_path, said):
    config = write_toy_many(tmp_path, "run")
    pids = hosts.start(tmp_path, "train", str(config), TOY_DELAY_S="0.02", **PATIENCE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "rounds" / "0001" / "generated-00000.jsonl").exists():
        assert time.monotonic() < deadline, said(0) + said(1)
        time.sleep(0.05)
    hosts.cut("unplugged")
    codes = [code for code, _ in hosts.wait(pids)]
    hosts.mend("unplugged")
    assert codes == [4, 4]
    assert f"rank 1 ({hosts.names[1]}, pid" in said(0) and "not been heard of for 6 s" in said(0)
    assert "rank 0" in said(1)
    assert hosts.run(tmp_path, "train", str(config), **PATIENCE) == [0, 0], said(0)
