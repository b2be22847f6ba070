"""Every early sign of collapse is said once, in the round in which it appears, and not without reason; limits of guards stop the run."""

import pytest
from test_loop import rows, run

from iterative_sft_cli.alarms import CONDITIONS, alarms
from iterative_sft_cli.errors import GuardStop

CALM = {
    "filters/accept_rate": 0.4,
    "filters/unique_rate": 0.9,
    "generate/token_nll": 1.0,
    "filters/distinct_2": 0.6,
    "filters/easy_share": 0.3,
    "generate/num_samples": 800,
    "generate/num_prompts": 100,
    "generate/length_drift": 0.0,
    "generate/truncated_rate": 0.01,
    "filters/known_rate": 0.2,
    "train/seed_loss": 0.5,
    "eval/pass@1": 0.5,
    "eval/pass@1_low": 0.45,
    "eval/pass@1_high": 0.55,
    "eval/pass@8": 0.8,
}
SIGNS = [
    ({"filters/accept_rate": 0.005}, "fewer than 1 %"),
    ({"filters/accept_rate": 0.99}, "over 98 %"),
    ({"filters/unique_rate": 0.45}, "repeat another one"),
    ({"generate/token_nll": 0.49}, "entropy collapse"),
    ({"filters/distinct_2": 0.29}, "distinct token pairs"),
    ({"filters/easy_share": 0.81}, "solved more than 3 times in 4"),
    ({"generate/length_drift": 0.31}, "30 % longer or shorter"),
    ({"generate/length_drift": -0.31}, "30 % longer or shorter"),
    ({"generate/truncated_rate": 0.06}, "cut off"),
    ({"filters/known_rate": 0.91}, "accepted in an earlier round"),
    ({"train/seed_loss": 0.61}, "forgetting"),
    ({"eval/pass@1": 0.44, "eval/pass@1_low": 0.40, "eval/pass@1_high": 0.48}, "clearly below its best"),
]


def history(*changes):
    return [{"round": index, **CALM, **change} for index, change in enumerate(changes)]


@pytest.mark.parametrize(("change", "said"), SIGNS, ids=[said for _, said in SIGNS])
def test_a_sign_is_said_once_in_the_round_in_which_it_appears(change, said):
    assert alarms(history({}, {})) == []
    [text] = alarms(history({}, {}, change))
    assert said in text
    assert alarms(history({}, {}, change, change)) == []
    assert [said in text for text in alarms(history({}, {}, change, {}, change))] == [True]


def test_every_condition_has_a_case():
    said = " ".join(said for _, said in SIGNS[:-1])
    assert len({text for change, _ in SIGNS for text in alarms(history({}, {}, change))}) == len(CONDITIONS) + 1, said


def test_coverage_is_lost_when_pass_at_k_falls_twice_while_pass_at_1_rises():
    steps = [{"eval/pass@1": 0.5 + 0.01 * i, "eval/pass@8": 0.8 - 0.01 * i} for i in range(3)]
    assert alarms(history(*steps[:2])) == []
    [text] = alarms(history(*steps))
    assert "pass@8 fell twice while pass@1 rose" in text
    assert alarms(history(*steps[:2], {"eval/pass@1": 0.52, "eval/pass@8": 0.79})) == []


def test_limits_are_not_reached_by_equality():
    edge = {
        "filters/accept_rate": 0.98,
        "generate/token_nll": 0.5,
        "filters/easy_share": 0.8,
        "filters/known_rate": 0.9,
    }
    assert alarms(history({}, {}, edge)) == []


def test_what_is_said_is_seen_by_a_person(toy, tmp_path):
    _, screen = run(toy(rounds=1, filters=["nonempty"], eval=None))
    assert "warning: round 1: over 98 % of the samples were accepted" in " ".join(screen.split())


@pytest.mark.parametrize(
    ("guard", "said"),
    [
        ({"min_accepted": 10_000}, "guards.min_accepted asks for at least 10000"),
        ({"min_accept_rate": 0.999}, "guards.min_accept_rate asks for at least 0.999"),
        ({"max_truncated_rate": 0.0}, "guards.max_truncated_rate asks for at most 0"),
    ],
)
def test_a_limit_stops_the_run_and_the_round_stays_open(toy, tmp_path, guard, said):
    changes = {"rounds": 1}
    if "max_truncated_rate" in guard:
        changes |= {"generate": {"max_new_tokens": 3}, "filters": ["nonempty"]}
    for _ in range(2):
        with pytest.raises(GuardStop, match=said):
            run(toy(guards=guard, **changes))
        assert not (tmp_path / "run" / "checkpoints" / "0001").exists()
    outcome, _ = run(toy(guards={"on_empty": "skip"}, **changes))
    assert outcome.code == 0 and rows(tmp_path / "run" / "stats.jsonl")[-1]["round"] == 1
