"""What `isft plan` says of a round: weights, data, samples, steps, temperature, threshold."""

import json

from iterative_sft_cli.cli import run as isft
from iterative_sft_cli.config import load_config
from iterative_sft_cli.plan import describe_plan, render_plan


def planned(path):
    return describe_plan(load_config(path))["rounds"]


def test_a_plain_run_and_what_its_rounds_come_from(toy):
    first, second, third = planned(toy(train={"data": {"window": 2}}))
    assert (first["generate_with"], first["start_from"], first["data"]) == (
        "the starting model",
        "the starting model",
        "round 1",
    )
    assert (third["generate_with"], third["start_from"], third["data"]) == (
        "checkpoint 0002",
        "checkpoint 0002",
        "rounds 2 to 3",
    )
    assert (first["num_prompts"], first["num_samples"], first["max_rows"], first["max_steps"]) == (12, 48, 48, 24)
    assert (second["max_rows"], second["max_steps"]) == (96, 48)


def test_schedules_show_their_value_of_each_round(toy):
    rounds = planned(
        toy(
            generate={"temperature": {"linear": [1.0, 0.5]}, "do_sample": {"by_round": [True, True, True]}},
            filters=[
                {"numeric_answer": {"drop": False}},
                {"threshold": {"by": "numeric_answer", "min": {"by_round": [0, 0.5, 1]}}},
            ],
            train={"steps": {"start": 10, "factor": 2}, "epochs": None},
        )
    )
    assert [row["temperature"] for row in rounds] == [1.0, 0.75, 0.5]
    assert [row["max_steps"] for row in rounds] == [10, 20, 40]
    assert [row["thresholds"] for row in rounds] == [
        ["numeric_answer >= 0"],
        ["numeric_answer >= 0.5"],
        ["numeric_answer >= 1"],
    ]


def test_methods_bound_what_is_drawn_and_trained(toy, tmp_path):
    (tmp_path / "seed.jsonl").write_text('{"prompt": "1+1", "completion": "The answer is 2."}\n' * 4)
    (row,) = planned(toy(rounds=1, generate={"until_accepted": 1, "samples_per_prompt": 8}))
    assert (row["num_samples"], row["max_rows"], row["stops"]) == (96, 12, "until 1 of a prompt are accepted")
    (row,) = planned(toy(rounds=1, generate={"budget": "gvm"}, filters=["numeric_answer"], prompts={"per_round": 2}))
    assert row["num_samples"] == 2 * (4 + 8) and "gvm" in row["stops"]
    changes = {"mix": {"path": "seed.jsonl", "share": "all"}, "max_rows": 10, "formats": [{}, {"prompt": "{prompt}?"}]}
    (row,) = planned(toy(rounds=1, train=changes))
    assert row["max_rows"] == 14 and "in 2 forms" in row["data"] and "seed data" in row["data"]
    passes = [{"threshold": 0.5, "by": "numeric_answer", "epochs": 1}, {"steps": 7}]
    (row,) = planned(toy(rounds=1, train={"passes": passes}, filters=[{"numeric_answer": {"drop": False}}]))
    assert row["max_steps"] == 12 + 7 and row["thresholds"] == ["passes at numeric_answer >= 0.5"]


def test_the_text_names_every_source_and_the_search(toy, tmp_path, capsys):
    (tmp_path / "seed.jsonl").write_text('{"prompt": "1+1", "completion": "The answer is 2."}\n' * 4)
    sources = [{"model": "current", "share": 0.75}, {"model": "base", "share": 0.25}]
    search = {"temperature": [0.5, 1.0], "min": [0, 1]}
    config = toy(
        generate={"from": sources, "search": search},
        filters=[{"numeric_answer": {"drop": False}}, {"threshold": {"by": "numeric_answer", "min": 0}}],
        warmup={"path": "seed.jsonl"},
        guards={"stop_if": "plateau(eval/pass@1, 2)"},
    )
    text = render_plan(describe_plan(load_config(config)))
    for part in (
        "warm-up   1 steps on 4 seed rows",
        "with checkpoint 0000 (warm-up) (75%) and base (25%), temperature searched among 0.5, 1",
        "threshold numeric_answer >= 0 (min searched among 0, 1)",
        "from checkpoint 0001",
        "stop_if: plateau(eval/pass@1, 2)",
    ):
        assert part in text, text
    assert isft(["plan", str(config), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rounds"]) == 3


def test_a_curriculum_counts_the_prompts_of_its_window(toy):
    prompts = {"order": "curriculum", "level": "level", "per_round": "all", "curriculum": {"start": 0, "width": 1}}
    assert [row["num_prompts"] for row in planned(toy(prompts=prompts))] == [6, 6, 6]
