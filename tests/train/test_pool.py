"""Which rows a round trains on, and in which step."""

from collections import Counter
from types import SimpleNamespace

from iterative_sft_cli.train.pool import deal, draw_seed_rows, num_seed_rows, num_steps, pool_rounds, times_trained


def dealt(**changes):
    settings = {"epochs": 2, "steps": None, "batch_size": 4, "seed": 1, "round_index": 1} | changes
    return list(deal(10, **settings))


def test_pools_by_policy():
    assert pool_rounds("replace", 3) == [3]
    assert pool_rounds("accumulate", 3) == [1, 2, 3]
    assert pool_rounds(SimpleNamespace(window=2), 3) == [2, 3]
    assert pool_rounds(SimpleNamespace(window=9), 3) == [1, 2, 3]


def test_every_row_is_dealt_once_an_epoch_and_only_the_last_step_is_short():
    steps = dealt()
    assert [len(s) for s in steps] == [4, 4, 4, 4, 4]
    assert times_trained(steps, 10) == [2] * 10
    assert Counter(sum(steps, [])[:10]) == Counter(range(10))
    assert [len(s) for s in dealt(epochs=1)] == [4, 4, 2] and num_steps(10, epochs=1, steps=None, batch_size=4) == 3


def test_the_order_is_a_function_of_seed_round_and_pass():
    assert dealt() == dealt()
    assert dealt() != dealt(seed=2) and dealt() != dealt(round_index=2) and dealt() != dealt(pass_index=1)


def test_steps_replace_epochs_and_go_round_the_data():
    steps = dealt(epochs=None, steps=7)
    assert len(steps) == 7 == num_steps(10, epochs=None, steps=7, batch_size=4)
    assert all(len(s) == 4 for s in steps) and max(times_trained(steps, 10)) == 3


def test_nothing_accepted_means_no_steps():
    assert list(deal(0, epochs=3, steps=None, batch_size=4, seed=0, round_index=1)) == []
    assert list(deal(0, epochs=None, steps=5, batch_size=4, seed=0, round_index=1)) == []
    assert num_steps(0, epochs=None, steps=5, batch_size=4) == 0


def test_seed_rows_make_up_their_share():
    assert num_seed_rows(0.5, 30, 100) == 30
    assert num_seed_rows(0.25, 30, 100) == 10
    assert num_seed_rows(0.5, 30, 20) == 20
    drawn = draw_seed_rows(100, 30, seed=0, round_index=1)
    assert len(set(drawn)) == 30 and drawn == sorted(drawn) and drawn != draw_seed_rows(100, 30, seed=0, round_index=2)
