"""Seed data on its way into training rows."""

import pytest

from iterative_sft_cli.build import cut_row
from iterative_sft_cli.errors import DataError
from iterative_sft_cli.types import TrainRow

ROW = TrainRow("seed-0", (1, 2, 3, 4, 5), (-100, -100, 3, 4, 5))


def test_a_row_that_fits_is_left_alone():
    assert cut_row(ROW, None, "keep_end", "x") is ROW and cut_row(ROW, 5, "keep_end", "x") is ROW


def test_the_end_or_the_start_is_kept():
    assert cut_row(ROW, 3, "keep_end", "x").input_ids == (3, 4, 5)
    kept = cut_row(ROW, 3, "keep_start", "x")
    assert kept.input_ids == (1, 2, 3) and kept.labels == (-100, -100, 3)


def test_a_row_without_anything_left_to_train_is_named():
    with pytest.raises(DataError, match="seed.jsonl:4: 5 tokens, cut to 2 with keep_start"):
        cut_row(ROW, 2, "keep_start", "seed.jsonl:4")
