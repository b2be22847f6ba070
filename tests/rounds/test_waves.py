"""Waves are pure functions of the config, the prompts and the verdicts they wait for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterative_sft_cli.rounds.waves import (
    ByDifficulty,
    ByVariance,
    Draw,
    OneWave,
    UntilAccepted,
    UntilTotal,
    gvm_weight,
    into_units,
    largest_remainder,
    owners_of,
    wave_size,
)
from iterative_sft_cli.types import Prompt

PROMPTS = [Prompt(name, name) for name in "abcd"]


def play(waves, right, upto=40):
    """Runs waves on a model that is right at the sample indices `right[prompt]`; the draws of each wave, and how many were accepted."""
    accepted: list[dict[str, list[int]]] = []
    drawn = []
    for number in range(upto):
        known: dict[str, list[int]] = {}
        for one in accepted[: waves.waits_for(number)]:
            for key, indices in one.items():
                known[key] = known.get(key, []) + indices
        draws = waves.plan(number, known)
        if draws is None:
            break
        drawn.append({d.prompt.prompt_id: (d.first, d.count) for d in draws})
        accepted.append(
            {
                d.prompt.prompt_id: [i for i in range(d.first, d.first + d.count) if i in right[d.prompt.prompt_id]]
                for d in draws
            }
        )
    total = {p.prompt_id: sum(len(one.get(p.prompt_id, ())) for one in accepted) for p in PROMPTS}
    return drawn, total


def test_one_wave_draws_alike():
    drawn, _ = play(OneWave(PROMPTS, 3), dict.fromkeys("abcd", range(9)))
    assert drawn == [dict.fromkeys("abcd", (0, 3))]


def test_a_prompt_stops_two_waves_after_it_has_enough_and_never_goes_beyond_its_limit():
    right = {"a": {0}, "b": {3}, "c": {}, "d": {0, 1, 2}}
    drawn, _ = play(UntilAccepted(PROMPTS, 1, 6), right)
    assert drawn[0] == dict.fromkeys("abcd", (0, 2))
    # `a` and `d` were accepted in the first wave; `b` in the fourth, whose verdicts the fifth does not wait for
    assert drawn[1:] == [{k: (i, 1) for k in "bc"} for i in (2, 3, 4)] + [{"c": (5, 1)}]
    assert UntilAccepted(PROMPTS, 1, 6).limits() == (dict.fromkeys("abcd", 1), None)


def test_what_passed_in_the_second_wave_does_not_stop_the_third():
    drawn, _ = play(UntilAccepted(PROMPTS[:1], 1, 6), {"a": {1}})
    assert drawn == [{"a": (0, 2)}, {"a": (2, 1)}]


@pytest.mark.parametrize(("wanted", "most", "size"), [(1, 6, 1), (40, 2048, 128), (4, 4, 4), (3, 8, 3), (1, 64, 4)])
def test_waves_are_as_large_as_what_is_wanted_and_not_many(wanted, most, size):
    assert wave_size(wanted, most) == size


def test_every_wave_has_one_size_and_the_first_two_are_drawn_as_one():
    right = {"a": {0, 1}, "b": {0, 5}, "c": {}, "d": {9, 10, 11}}
    drawn, _ = play(UntilAccepted(PROMPTS, 2, 20), right)
    assert [{key: count for key, (_, count) in wave.items()} for wave in drawn] == [
        dict.fromkeys("abcd", 4),
        dict.fromkeys("bcd", 2),
        dict.fromkeys("bcd", 2),
        *[dict.fromkeys("cd", 2)] * 3,
        *[{"c": 2}] * 3,
    ]
    drawn, _ = play(UntilAccepted(PROMPTS, 2, 20, size=5), right)
    assert [set(wave.values()) for wave in drawn] == [{(0, 10)}, {(10, 5)}, {(15, 5)}]


@given(
    st.lists(st.sets(st.integers(0, 19)), min_size=4, max_size=4),
    st.integers(1, 4),
    st.integers(4, 20),
    st.integers(1, 6),
    st.sampled_from([None, 1, 3]),
)
def test_pairs_draw_the_same_samples_in_fewer_batches(right, wanted, most, size, pilot):
    def waves(pairs):
        if pilot is None:
            return UntilAccepted(PROMPTS, wanted, most, size, pairs=pairs)
        return ByDifficulty(PROMPTS, wanted, most, pilot, size, pairs=pairs)

    by_prompt = dict(zip("abcd", right, strict=True))
    (one, passed), (two, again) = (play(waves(pairs), by_prompt, upto=99) for pairs in (False, True))
    drawn = [{key: sum(wave.get(key, (0, 0))[1] for wave in each) for key in "abcd"} for each in (one, two)]
    assert drawn[0] == drawn[1] and passed == again
    assert len(two) <= len(one) / 2 + 2


def test_the_total_stops_further_prompts():
    many = [Prompt(str(i), "") for i in range(20)]
    waves = UntilTotal(many, 2, 8)
    assert [len(waves.plan(i, {"x": range(n)}) or []) for i, n in enumerate((0, 0, 4))] == [2, 2, 2]
    assert waves.plan(3, {"x": range(8)}) is None and waves.plan(10, {}) is None
    assert waves.limits() == (None, 8)


def test_difficulty_gives_the_hardest_prompt_the_whole_number_and_the_easiest_one():
    waves = ByDifficulty(PROMPTS, 12, 100, 4)
    assert [waves.waits_for(wave) for wave in range(5)] == [0, 1, 2, 2, 3]
    assert [(d.first, d.count) for d in waves.plan(0, {})] == [(0, 4)] * 4
    passed = {"a": range(4), "b": range(3), "c": range(2)}
    # two waves after the pilot; of `b` and `c` all that is wanted passed in the first of them, of `d` in the second
    assert [(d.first, d.count) for d in waves.plan(1, passed)] == [(4, 24)] * 2
    assert waves.limits()[0] == {"a": 1, "b": 3, "c": 6, "d": 12}
    passed = {"a": range(4), "b": range(3), "c": range(12), "d": range(16, 28)}
    assert [(d.prompt.prompt_id, d.first, d.count) for d in waves.plan(2, passed)] == [("d", 28, 12)]


def test_gvm_splits_as_its_paper_says():
    waves = ByVariance([Prompt(name, "") for name in "abcde"], 1000, 1000, 1e-3, 2.0)
    waves.plan(0, {})
    right = {"a": 20, "b": 125, "c": 250, "d": 500, "e": 1000}
    draws = waves.plan(1, {key: range(number) for key, number in right.items()})
    shares = [d.count / 5000 for d in draws]
    assert shares == pytest.approx([0.346, 0.251, 0.182, 0.129, 0.092], abs=0.001)
    assert sum(d.count for d in draws) == 5000 and all(d.first == 1000 for d in draws)
    assert waves.plan(2, {}) is None and gvm_weight(0.0, 1e-3, 2.0) == 0.0
    assert ByVariance(PROMPTS, 4, 4, 1e-3, 2.0).plan(1, {}) is None


def test_largest_remainder_keeps_the_sum():
    assert largest_remainder([1, 1, 1], 10) == [4, 3, 3]
    assert largest_remainder([0, 0], 5) == [0, 0]


def test_each_source_makes_its_share_of_every_prefix():
    assert owners_of([0.5, 0.5], 4) == [0, 1, 0, 1]
    assert owners_of([0.75, 0.25], 8).count(0) == 6
    assert owners_of([0.2] * 5, 5) == [0, 1, 2, 3, 4]


def test_units_are_cut_by_samples():
    draws = [Draw(p, 0, 3) for p in PROMPTS]
    assert [[d.prompt.prompt_id for d in unit] for unit in into_units(draws, 6)] == [["a", "b"], ["c", "d"]]
    assert [len(unit) for unit in into_units(draws, 2)] == [1, 1, 1, 1]
