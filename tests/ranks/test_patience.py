"""How long ranks wait for each other: never longer than was promised, and a rank that does not come is named."""

import time

from rank_helpers import write_toy_many

from iterative_sft_cli.ranks.connect import ANSWER_S
from iterative_sft_cli.ranks.faults import Patience
from iterative_sft_cli.ranks.link import SURFACE_S

PROMISED_S = 120


def test_no_wait_of_the_defaults_is_longer_than_two_minutes():
    patience = Patience.of({})
    assert patience.join_s < PROMISED_S and 2 * ANSWER_S < PROMISED_S
    assert patience.dead_after_s + 2 * patience.beat_s + SURFACE_S < PROMISED_S


def test_a_rank_that_does_not_come_is_named(forks, tmp_path, said):
    config = write_toy_many(tmp_path, "run")
    start = time.monotonic()
    options = {"ISFT_RANK_PATIENCE_S": "0.5,10,3,60", "MASTER_PORT": "29873"}
    assert forks.wait(forks.start(tmp_path, 2, "train", str(config), ranks=[0], **options)) == [4]
    assert "rank 1 of 2 did not come within 3 s" in said(0) and "ISFT_RANK_PATIENCE_S" in said(0)
    assert forks.wait(forks.start(tmp_path, 2, "train", str(config), ranks=[1], **options)) == [4]
    assert "rank 1 cannot reach rank 0's store" in said(1)
    assert time.monotonic() - start < 30
