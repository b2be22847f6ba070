"""What the keys of published methods do in a whole run on the toy model."""

import json

import pytest
from test_loop import SEARCH, rows, run

from iterative_sft_cli.errors import ConfigError, GuardStop
from iterative_sft_cli.rundir import RunDir, verify
from iterative_sft_cli.samples import iter_round


def stored(tmp_path, round_index, folder="run"):
    return list(iter_round(RunDir.peek(tmp_path / folder).shards, round_index))


def ledger(tmp_path, event, folder="run"):
    return [row for row in rows(tmp_path / folder / "ledger.jsonl") if row["event"] == event]


def test_until_accepted_stops_prompts_and_records_the_surplus(toy, tmp_path):
    run(toy(rounds=1, generate={"until_accepted": 1, "samples_per_prompt": 8}, filters=["finished", "numeric_answer"]))
    samples = stored(tmp_path, 1)
    kept = [one for one in samples if one.accepted]
    assert len({one.sample.prompt_id for one in kept}) == len(kept)
    surplus = [one for one in samples if (one.rejected_by or {}).get("reason") == "surplus"]
    assert surplus and all(one.rejected_by["filter"] == "until_accepted" for one in surplus)
    made = {}
    for one in samples:
        made.setdefault(one.sample.prompt_id, []).append(one)
    for group in made.values():
        indices = [one.sample.sample_index for one in group]
        assert indices == list(range(len(indices)))
        first = next((i for i, one in enumerate(group) if one.rejected_by is None), None)
        # waves of one sample; the one after the first accepted sample's is drawn before that one's verdicts are known
        assert len(group) == (8 if first is None else min(8, first + 2))
        if first is not None:
            assert not any(one.accepted for one in group[first + 1 :])
    assert len(samples) < 12 * 8 and verify(tmp_path / "run") == []


def test_waves_are_drawn_in_pairs_where_filters_answer_at_once_and_one_by_one_where_they_take_time(toy, tmp_path):
    (tmp_path / "mine.py").write_text("def slow(sample):\n    return True\n")
    changes = {"rounds": 1, "generate": {"until_accepted": 1, "samples_per_prompt": 8}}
    filters = ["finished", "numeric_answer"]
    run(toy(output_dir="pairs", filters=filters, **changes))
    run(toy(output_dir="single", filters=[*filters, "mine.py:slow"], **changes))
    shards, samples = {}, {}
    for name in ("pairs", "single"):
        paths = sorted((tmp_path / name / "rounds/0001").glob("generated-*.jsonl"))
        shards[name] = [len(rows(path)) for path in paths]
        samples[name] = {one["sample_id"]: one["completion"] for path in paths for one in rows(path)}
    assert samples["pairs"] == samples["single"]
    assert len(shards["pairs"]) == 4 and len(shards["single"]) == 7, shards


def test_dedup_of_a_later_wave_sees_the_earlier_ones(toy, tmp_path):
    run(toy(rounds=1, generate={"until_accepted": 2, "samples_per_prompt": 8}))
    samples = stored(tmp_path, 1)
    assert {one.rejected_by["reason"] for one in samples if one.rejected_by} >= {"duplicate"}
    kept = [(one.sample.prompt_id, one.sample.completion) for one in samples if one.accepted]
    assert len(kept) == len(set(kept))


def test_what_looks_at_later_samples_is_refused_with_waves(toy, tmp_path):
    (tmp_path / "mine.py").write_text("def best(group):\n    return [True] * len(group)\n")
    with pytest.raises(ConfigError, match="not drawn yet"):
        run(toy(rounds=1, generate={"until_accepted": 1}, filters=["numeric_answer", "mine.py:best"]))


def test_until_total_asks_no_more_prompts_than_it_needs(toy, tmp_path):
    run(toy(rounds=1, generate={"until_total": 6, "samples_per_prompt": 2}, prompts={"per_round": 24}))
    row = rows(tmp_path / "run" / "stats.jsonl")[-1]
    assert row["filters/num_accepted"] == 6 and row["generate/num_prompts"] < 24


def test_prop_difficulty_takes_more_of_hard_prompts(toy, tmp_path):
    changes = {"until_accepted": 4, "samples_per_prompt": 32, "budget": {"kind": "prop_difficulty", "pilot": 4}}
    run(toy(rounds=1, generate=changes, filters=["finished", "numeric_answer"], prompts={"per_round": 24}))
    groups = {}
    for one in stored(tmp_path, 1):
        groups.setdefault(one.sample.prompt_id, []).append(one)
    by_pilot = {}
    for group in groups.values():
        solved = sum((one.rejected_by or {"reason": "surplus"})["reason"] == "surplus" for one in group[:4])
        by_pilot.setdefault(solved, []).append(sum(one.accepted for one in group))
    worst = min(by_pilot)
    assert max(by_pilot[worst]) == 4
    for solved, kept in by_pilot.items():
        assert max(kept) <= max(1, -(-4 * (4 - solved) // (4 - worst)))


def test_second_tries_are_stored_and_trained_without_the_hint(toy, tmp_path):
    hint = {"template": "{prompt} hint {answer}", "samples_per_prompt": 2}
    run(toy(rounds=1, rationalize=hint, generate={"samples_per_prompt": 1}, filters=["finished", "numeric_answer"]))
    samples = stored(tmp_path, 1)
    plain = [one for one in samples if not one.hinted]
    hinted = [one for one in samples if one.hinted]
    failed = {one.sample.prompt_id for one in plain if not one.accepted}
    assert {one.sample.prompt_id for one in hinted} == failed and len(hinted) == 2 * len(failed)
    assert len({one.sample.sample_id for one in samples}) == len(samples)
    for one in hinted:
        assert one.sample.prompt_ids == tuple(one.sample.prompt.encode()) and "hint" not in one.sample.prompt
    raw = rows(tmp_path / "run" / "rounds" / "0001" / "generated-hinted-00000.jsonl")
    assert all(b" hint " in bytes(row["hinted"]) for row in raw)
    trained = rows(tmp_path / "run" / "rounds" / "0001" / "train.jsonl")
    assert [row["sample_id"] for row in trained] == [one.sample.sample_id for one in samples if one.accepted]
    row = rows(tmp_path / "run" / "stats.jsonl")[-1]
    assert row["generate/num_samples"] == 12 and row["rationalize/num_samples"] == len(hinted)
    assert row["rationalize/num_accepted"] == sum(one.accepted for one in hinted) > 0
    assert row["filters/num_accepted"] + row["rationalize/num_accepted"] == row["train/num_rows"]


def test_a_share_of_the_failed_prompts_and_of_the_training_rows(toy, tmp_path):
    hint = {"template": "{prompt} hint {answer}", "samples_per_prompt": 2, "share": 0.5, "max_share": 0.25}
    run(toy(rounds=1, rationalize=hint, generate={"samples_per_prompt": 1}, filters=["numeric_answer"]))
    samples = stored(tmp_path, 1)
    failed = {one.sample.prompt_id for one in samples if not one.hinted and not one.accepted}
    tried = {one.sample.prompt_id for one in samples if one.hinted}
    assert 0 < len(tried) < len(failed) and tried < failed
    trained = {row["sample_id"] for row in rows(tmp_path / "run" / "rounds" / "0001" / "train.jsonl")}
    hinted = {one.sample.sample_id for one in samples if one.hinted}
    assert 0 < len(trained & hinted) <= 0.25 * len(trained)


def test_two_models_share_a_prompts_samples_and_one_group_sees_both(toy, tmp_path):
    (tmp_path / "strong").mkdir()
    (tmp_path / "strong" / "model.json").write_text(json.dumps({"skill": 1.0, "steps": 0, "digest": ""}))
    shares = [{"model": "base", "share": 0.25}, {"model": "strong", "share": 0.75}]
    run(toy(rounds=1, generate={"from": shares, "samples_per_prompt": 8}, filters=[{"majority": {"drop": True}}]))
    names = ("generated-00000", "generated-00001")
    seals = [json.loads((tmp_path / "run/rounds/0001" / f"{n}.seal.json").read_text()) for n in names]
    assert [seal["meta"]["source"] for seal in seals] == ["base", "strong"]
    assert [seal["count"] for seal in seals] == [12 * 2, 12 * 6]
    strong = rows(tmp_path / "run" / "rounds" / "0001" / "generated-00001.jsonl")
    samples = {one.sample.sample_id: one for one in stored(tmp_path, 1)}
    assert all(samples[row["sample_id"]].accepted for row in strong)
    assert sum(one.accepted for one in samples.values()) > len(strong)


def test_a_search_chooses_the_pair_with_the_best_balance(toy, tmp_path):
    run(toy(**SEARCH))
    chosen = ledger(tmp_path, "tuned")
    assert len(chosen) == 3 and all(row["temperature"] == 0.5 and row["min"] in (0.5, 1) for row in chosen)
    tried = rows(tmp_path / "run" / "rounds" / "0001" / "tuned.jsonl")
    assert len(tried) == 6 and sum(row["chosen"] for row in tried) == 1
    assert max(row["balance"] for row in tried) == next(row["balance"] for row in tried if row["chosen"])
    row = rows(tmp_path / "run" / "stats.jsonl")[1]
    assert row["generate/temperature"] == 0.5 and row["generate/trial_tokens"] > 0
    said = {one.rejected_by["filter"] for one in stored(tmp_path, 1) if one.rejected_by}
    assert "threshold" in said


def test_a_condition_stops_the_run_until_it_is_changed(toy, tmp_path):
    config = {"guards": {"stop_if": "eval/pass@1 > 0.1"}, "rounds": 3}
    for _ in range(2):
        with pytest.raises(GuardStop, match=r"pass@1 > 0.1` holds after round 0"):
            run(toy(**config))
        assert len(rows(tmp_path / "run" / "stats.jsonl")) == 1
    outcome, _ = run(toy(guards={"stop_if": "eval/pass@1 > 2"}, rounds=3))
    assert outcome.code == 0


def test_a_roll_back_goes_on_from_the_best_weights(toy, tmp_path):
    run(toy(output_dir="plain", rounds=2))
    _, screen = run(toy(output_dir="run", rounds=2, guards={"rollback_if": "round == 1 and eval/pass@1 < 0"}))
    assert "goes on from" not in screen
    never_better = {"generate": {"samples_per_prompt": 4}, "eval": {"do_sample": False, "samples_per_prompt": 1}}
    _, screen = run(toy(output_dir="back", rounds=2, guards={"rollback_if": "round == 1"}, **never_better))
    assert "round 2 goes on from checkpoint base" in screen
    assert [row["to"] for row in ledger(tmp_path, "rolled_back", "back")] == ["base"]
    seals = [
        json.loads((tmp_path / f"back/rounds/{r}/generated-00000.seal.json").read_text()) for r in ("0001", "0002")
    ]
    assert [seal["meta"]["weights"] for seal in seals] == ["toy-base", "toy-base"]
    steps = [json.loads((tmp_path / f"back/checkpoints/000{r}/model.json").read_text())["steps"] for r in (1, 2)]
    trained = [row["train/num_steps"] for row in rows(tmp_path / "back" / "stats.jsonl")[1:]]
    assert steps == trained


def test_tokens_and_hours_are_bounded_over_the_whole_run(toy, tmp_path):
    with pytest.raises(GuardStop, match="tokens were generated"):
        run(toy(guards={"max_tokens": 2000}))
    done = rows(tmp_path / "run" / "stats.jsonl")
    spent = sum(row.get("generate/num_tokens", 0) + row.get("eval/num_tokens", 0) for row in done)
    assert 0 < spent < 2000
    outcome, _ = run(toy(guards={"max_tokens": 10**6}))
    assert outcome.code == 0
    with pytest.raises(GuardStop, match="worked for"):
        run(toy(output_dir="other", guards={"max_hours": 1e-9}))


def test_passes_train_on_what_reaches_their_threshold(toy, tmp_path):
    filters = [{"numeric_answer": {"drop": False}}]
    passes = [{}, {"threshold": 1, "by": "numeric_answer", "epochs": 1, "learning_rate": 0.05}]
    run(toy(rounds=1, filters=filters, train={"passes": passes, "epochs": 2}))
    samples = stored(tmp_path, 1)
    trained = {row["sample_id"]: row["times"] for row in rows(tmp_path / "run" / "rounds" / "0001" / "train.jsonl")}
    for one in samples:
        right = f"The answer is {one.sample.answer}." == one.sample.completion
        assert trained[one.sample.sample_id] == (3 if right else 2)
    rates = [row["learning_rate"] for row in ledger(tmp_path, "step")]
    assert max(rates) == 0.1 and rates[-1] <= 0.05


def test_one_learning_rate_shape_over_all_rounds(toy, tmp_path):
    train = {"steps": 4, "epochs": None, "lr_schedule": "continue"}
    run(toy(rounds=3, train=train))
    rates = [row["learning_rate"] for row in ledger(tmp_path, "step")]
    assert rates == pytest.approx([0.1 * (1 - i / 12) for i in range(12)])


def test_forms_write_each_sample_once_each(toy, tmp_path):
    forms = [{}, {"prompt": "Q: {prompt}\nA:", "completion": " {answer}"}]
    run(toy(rounds=1, train={"formats": forms}))
    samples = [one for one in stored(tmp_path, 1) if one.accepted]
    trained = rows(tmp_path / "run" / "rounds" / "0001" / "train.jsonl")
    assert len(trained) == 2 * len(samples)
    sizes = [row["num_tokens"] for row in trained[:2]]
    sample = samples[0].sample
    assert sizes == [
        len(sample.prompt) + len(sample.completion) + 1,
        len(f"Q: {sample.prompt}\nA: {sample.answer}") + 1,
    ]


def test_the_newest_rows_get_their_share(toy, tmp_path):
    train = {"data": "accumulate", "new_share": 0.5, "steps": 10, "epochs": None, "batch_size": 12}
    run(toy(rounds=3, train=train))
    times = {1: 0, 2: 0, 3: 0}
    for row in rows(tmp_path / "run" / "rounds" / "0003" / "train.jsonl"):
        times[int(row["sample_id"].split("-")[0])] += row["times"]
    assert times == {1: 30, 2: 30, 3: 60}


@pytest.mark.parametrize(("which", "expected"), [("oldest", {3}), ("random", {1, 2, 3})])
def test_rows_over_the_limit_leave(toy, tmp_path, which, expected):
    run(toy(rounds=3, train={"data": "accumulate", "max_rows": 10, "evict": which}))
    trained = rows(tmp_path / "run" / "rounds" / "0003" / "train.jsonl")
    assert len(trained) == 10 and {int(row["sample_id"].split("-")[0]) for row in trained} == expected


def test_a_curriculum_moves_up_only_when_it_may(toy, tmp_path):
    curriculum = {"start": 0, "width": 1, "promote_if": "round == 2"}
    prompts = {"order": "curriculum", "level": "level", "per_round": "all", "curriculum": curriculum}
    run(toy(rounds=4, prompts=prompts, guards={"on_empty": "skip"}))
    levels = [{one.sample.row["level"] for one in stored(tmp_path, r)} for r in (1, 2, 3, 4)]
    assert levels == [{0}, {0}, {1}, {1}]


def test_adaptive_order_asks_the_same_prompts_again_while_it_knows_little(toy, tmp_path):
    prompts = {"order": "adaptive", "advance": "accept_rate ** 2", "per_round": 8}
    run(toy(rounds=2, prompts=prompts, filters=["finished", "numeric_answer"]))
    first, second = ([one.sample.prompt_id for one in stored(tmp_path, r)] for r in (1, 2))
    rate = rows(tmp_path / "run" / "stats.jsonl")[1]["filters/accept_rate"]
    asked = list(dict.fromkeys(first))[: int(rate**2 * 8)]
    assert len(asked) < 8 and not set(asked) & set(second)


def test_figures_of_drift_and_repetition_are_written(toy, tmp_path):
    train = {"mix": {"path": "seed.jsonl", "share": 0.2}}
    (tmp_path / "seed.jsonl").write_text('{"prompt": "1+1", "completion": "The answer is 2."}\n' * 4)
    run(toy(rounds=2, prompts={"per_round": 24}, train=train))
    first, second = rows(tmp_path / "run" / "stats.jsonl")[1:]
    assert first["filters/known_rate"] == 0.0 and 0 < second["filters/known_rate"] <= 1
    assert "generate/length_drift" not in first and abs(second["generate/length_drift"]) < 1
    assert second["train/seed_loss"] < first["train/seed_loss"] < 2
    assert first["eval/num_tokens"] > 0


def test_best_at_k_ranks_by_the_score_that_is_named(toy, tmp_path):
    (tmp_path / "mine.py").write_text("def short(sample):\n    return -float(len(sample.completion))\n")
    filters = ["mine.py:short", "numeric_answer", {"threshold": {"by": "short", "min": -100}}]
    run(toy(rounds=1, filters=filters, eval={"samples_per_prompt": 4, "k": [1, 4], "rank_by": "short"}))
    row = rows(tmp_path / "run" / "stats.jsonl")[-1]
    assert 0 <= row["eval/best@4"] <= 1 and row["eval/best@4_low"] <= row["eval/best@4"]


def test_logprobs_are_kept_for_the_objective_that_reads_them(toy, tmp_path):
    run(toy(rounds=1, generate={"keep_logprobs": True}))
    made = rows(tmp_path / "run" / "rounds" / "0001" / "generated-00000.jsonl")
    assert all(len(row["token_logprobs"]) == len(row["completion_ids"]) for row in made)


def test_the_warm_up_stays_as_long_as_rounds_start_from_it(toy, tmp_path):
    (tmp_path / "seed.jsonl").write_text('{"prompt": "1+1", "completion": "The answer is 2."}\n' * 8)
    run(toy(rounds=5, warmup={"path": "seed.jsonl"}, train={"start_from": "warmup"}))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept[0] == "0000" and kept[-1] == "0005" and len(kept) <= 4
    warm = json.loads((tmp_path / "run" / "checkpoints" / "0000" / "model.json").read_text())["steps"]
    last = json.loads((tmp_path / "run" / "checkpoints" / "0005" / "model.json").read_text())["steps"]
    assert last == warm + rows(tmp_path / "run" / "stats.jsonl")[-1]["train/num_steps"]
