"""The chain: order, funnel, scores, shards, rounds, thinking, and that nothing depends on timing."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from filter_samples import make_entries, new_sample

from iterative_sft_cli.errors import ConfigError, DataError, PluginError
from iterative_sft_cli.filters import FilterChain, Judged, Runtime, funnel, resolve_filters
from iterative_sft_cli.filters.says import FilterSays
from iterative_sft_cli.types import LENGTH, PROMPT_TOO_LONG, STOP, Sample

Judge = Callable[..., list[Judged]]

PLUGINS = """
import time
from iterative_sft_cli.types import Verdict

def slow_echo(sample, seconds: float = 0.0):
    time.sleep(seconds * (len(sample.completion) % 3))
    return Verdict(True, float(len(sample.completion)), extra={"scores": dict(sample.scores)})

def plain_float(sample):
    return 0.5

def reads(sample):
    return sample.scores["plain_float"] > 0.1

def near_first(group):
    return [Verdict(i < 2, float(i)) for i, _ in enumerate(group)]

def half(samples):
    return [i % 2 == 0 for i, _ in enumerate(samples)]

def draw(sample, context):
    return Verdict(True, context.rng.random(), extra={"round": context.round_index, "seed": context.seed})

def remember(sample, context):
    known = [(one["prompt_id"], one["completion"], one["round_index"]) for one in context.accepted_earlier]
    return Verdict(True, extra={"known": known, "again": len(list(context.accepted_earlier))})

class Loaded:
    count = 0
    def __init__(self, word: str):
        self.word = word
    def setup(self):
        Loaded.count += 1
    def __call__(self, sample):
        return Verdict(self.word in sample.completion, extra={"setups": Loaded.count})

def changes(sample):
    sample.row["question"] = "changed"
    sample.prompt[0]["content"] = "changed"
    return True
changes.in_process = True
"""


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    (tmp_path / "p.py").write_text(PLUGINS)
    return tmp_path


def group(*texts: str, prompt: str = "p0", answer: str = "4") -> list[Sample]:
    return [new_sample(text, answer, i=i, prompt=prompt) for i, text in enumerate(texts)]


def test_filters_run_in_order_and_the_funnel_adds_up(judge: Judge) -> None:
    samples = group("4", "5", "4", "4 ", "so 4") + [replace(new_sample("4", i=9, prompt="p1"), finish_reason=LENGTH)]
    judged = judge(samples, "finished", "numeric_answer", "dedup", {"max_per_prompt": 1})
    assert [one.kept for one in judged] == [True, False, False, False, False, False]
    assert [(row.filter, row.entered, row.dropped, row.reasons) for row in funnel(judged)] == [
        ("finished", 6, 1, {"truncated": 1}),
        ("numeric_answer", 5, 1, {"wrong_answer": 1}),
        ("dedup", 4, 2, {"duplicate": 2}),
        ("max_per_prompt", 2, 1, {"over_cap": 1}),
    ]
    assert judged[1].rejected_by == FilterSays("numeric_answer", False, 0.0, "wrong_answer", {"answer": "5"})
    assert judged[0].rejected_by is None
    assert judged[0].sample.scores == {"numeric_answer": 1.0}
    assert len(judged[5].says) == 1


def test_rows_survive_json(judge: Judge) -> None:
    judged = judge(group("4", "5"), "numeric_answer", "dedup")
    for one in judged:
        row = json.loads(json.dumps(one.to_row(), allow_nan=False))
        assert row["sample_id"] == one.sample.sample_id
        again = Judged.from_rows(replace(one.sample, scores={}), row["says"], row["kept"])
        assert again == one


def test_a_verifier_can_score_without_dropping(judge: Judge) -> None:
    judged = judge(
        group("4", "5"), {"numeric_answer": {"drop": False}}, {"threshold": {"by": "1 - numeric_answer", "min": 0.5}}
    )
    assert [one.kept for one in judged] == [False, True]
    assert [one.sample.scores["numeric_answer"] for one in judged] == [1.0, 0.0]


def test_an_unread_score_stops_the_run(judge: Judge, plugins: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        judge(group("4"), {"numeric_answer": {"drop": False}}, scores_read=set())
    assert "hint: add threshold: {by: numeric_answer, min: ...} after it" in str(caught.value)
    with pytest.raises(ConfigError, match="p.py:plain_float gives every sample a score that nothing reads"):
        judge(group("4"), "p.py:plain_float", scores_read=set())
    judge(group("4"), "p.py:plain_float", scores_read={"plain_float"})
    judge(group("4"), "p.py:plain_float", {"threshold": {"by": "plain_float", "min": 0.1}}, scores_read=set())
    judge(group("4"), "p.py:plain_float", "p.py:reads", scores_read=set())
    judge(group("4"), "p.py:plain_float")


def test_scores_reach_later_filters_under_the_given_name(judge: Judge, plugins: Path) -> None:
    judged = judge(group("4"), {"use": "numeric_answer", "name": "right"}, "p.py:slow_echo")
    assert judged[0].says[1].extra == {"scores": {"right": 1.0}}
    assert judged[0].sample.scores == {"right": 1.0, "slow_echo": 1.0}


def test_verdicts_do_not_depend_on_when_samples_come(plugins: Path) -> None:
    samples = [new_sample("x" * i, i=i, prompt=f"p{i // 5}") for i in range(40)]
    forms = ["p.py:slow_echo", {"p.py:draw": {}}, "p.py:near_first", {"p.py:slow_echo": 0.001}, {"max_per_prompt": 1}]
    filters = resolve_filters(make_entries(*forms), base_dir=plugins)
    results = []
    for order in range(3):
        shuffled = list(samples)
        random.Random(order).shuffle(shuffled)
        with FilterChain(filters, seed=0, round_index=1) as chain:
            shard = chain.open_shard()
            for sample in shuffled[: 15 * order]:
                shard.submit(sample)
            results.append(shard.finish(samples))
    assert results[0] == results[1] == results[2]
    assert [one.kept for one in results[0]] == [i % 5 == 0 for i in range(40)]


def test_shards_may_overlap_in_two_threads(plugins: Path) -> None:
    samples = [new_sample("x" * i, i=i, prompt=f"p{i // 5}") for i in range(60)]
    filters = resolve_filters(make_entries("p.py:slow_echo", "dedup"), base_dir=plugins)
    with FilterChain(filters, seed=0, round_index=1) as chain:
        alone = [chain.open_shard().finish(samples[i : i + 20]) for i in (0, 20, 40)]
        together: dict[int, list[Judged]] = {}
        shards = [(i, chain.open_shard()) for i in (0, 20, 40)]
        threads = [
            threading.Thread(target=lambda i=i, shard=shard: together.update({i: shard.finish(samples[i : i + 20])}))
            for i, shard in shards
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [together[i] for i in (0, 20, 40)] == alone


def test_the_round_part_runs_over_survivors(judge: Judge, plugins: Path) -> None:
    samples = [new_sample("4" if i % 3 else "5", i=i, prompt=f"p{i}") for i in range(9)]
    judged = judge(samples, "numeric_answer", "p.py:half", {"length": 100}, {"max_per_prompt": 1})
    assert [one.kept for one in judged] == [False, True, False, False, True, False, False, True, False]
    assert [len(one.says) for one in judged] == [1, 4, 2, 1, 4, 2, 1, 4, 2]
    rows = funnel(judged)
    assert [(row.filter, row.entered, row.dropped) for row in rows] == [
        ("numeric_answer", 9, 3),
        ("half", 6, 3),
        ("length", 3, 0),
        ("max_per_prompt", 3, 0),
    ]


def test_scores_of_the_round_part_are_read_later(judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "from iterative_sft_cli.types import Verdict\n"
        "def rank(samples):\n    return [Verdict(True, float(i)) for i, s in enumerate(samples)]\n"
    )
    judged = judge(group("a", "b", "c"), "r.py:rank", {"threshold": {"by": "rank", "min": 1.0}})
    assert [one.kept for one in judged] == [False, True, True]


def test_randomness_is_a_function_of_seed_round_and_sample(judge: Judge, plugins: Path) -> None:
    def draws(**options: Any) -> list[float | None]:
        return [one.says[0].score for one in judge(group("a", "b"), "p.py:draw", **options)]

    assert draws() == draws()
    assert len({*draws(), *draws(seed=1), *draws(round_index=2)}) == 6


def test_what_was_accepted_earlier_is_in_the_context(judge: Judge, plugins: Path) -> None:
    earlier = [{"prompt_id": "p0", "completion": "4\u2028", "round_index": 1}]
    said = judge(group("a"), "p.py:remember", accepted_earlier=earlier, round_index=2)[0].says[0]
    assert said.extra == {"known": [["p0", "4\u2028", 1]], "again": 1}


def test_a_class_is_set_up_once_a_worker(judge: Judge, plugins: Path) -> None:
    judged = judge(
        [new_sample("yes", i=i) for i in range(30)], {"use": "p.py:Loaded", "args": {"word": "yes"}, "workers": 1}
    )
    assert {one.says[0].extra["setups"] for one in judged} == {1}


def test_an_in_process_plugin_cannot_change_the_run(judge: Judge, plugins: Path) -> None:
    sample = replace(new_sample("x", row={"question": "q"}), prompt=[{"role": "user", "content": "q"}])
    judged = judge([sample], "p.py:changes")
    assert judged[0].kept
    assert (sample.row, sample.prompt) == ({"question": "q"}, [{"role": "user", "content": "q"}])


def test_one_runtime_serves_many_chains(plugins: Path) -> None:
    filters = resolve_filters(
        make_entries({"use": "p.py:Loaded", "args": {"word": "x"}, "workers": 1}), base_dir=plugins
    )
    with Runtime() as runtime:
        for round_index in (1, 2, 3):
            with FilterChain(filters, seed=0, round_index=round_index, runtime=runtime) as chain:
                judged = chain.open_shard().finish(group("x"))
                assert judged[0].says[0].extra == {"setups": 1}
        assert len(runtime._pools) == 1
    assert not runtime._pools


def test_a_plugin_with_a_device_waits_and_leaves(plugins: Path) -> None:
    entry = {"use": "p.py:Loaded", "args": {"word": "x"}, "device": "cuda"}
    filters = resolve_filters(make_entries("nonempty", entry), base_dir=plugins)
    with Runtime() as runtime:
        with FilterChain(filters, seed=0, round_index=1, runtime=runtime) as chain:
            assert chain.needs_device
            shard = chain.open_shard()
            sample = new_sample("x")
            shard.submit(sample)
            [pool] = runtime._pools.values()
            assert (pool.size, pool._workers) == (1, [])
            assert shard.finish([sample])[0].kept
            assert pool._workers[0]._link is not None
        assert not runtime._pools and pool._workers[0]._link is None


def test_waves_see_earlier_samples_of_a_prompt(tmp_path: Path) -> None:
    filters = resolve_filters(make_entries("numeric_answer", "dedup", {"max_per_prompt": 2}), base_dir=tmp_path)
    whole = group("4", "5", "4", "is 4", "the 4", "4 !")
    with FilterChain(filters, seed=0, round_index=1) as chain:
        assert chain.not_prefix_stable() == []
        at_once = chain.open_shard().finish(whole)
        first = chain.open_shard().finish(whole[:3])
        second = chain.open_shard(earlier=first).finish(whole[3:])
    assert first + second == at_once
    assert [one.kept for one in at_once] == [True, False, False, True, False, False]


def test_filters_that_look_ahead_are_named(tmp_path: Path, plugins: Path) -> None:
    forms = [
        "dedup",
        {"random_k": 2},
        {"use": "dedup", "name": "far", "args": {"level": "equation_list", "tie": "farthest"}},
    ]
    forms += [{"use": "dedup", "name": "wide", "args": {"scope": "round"}}, "p.py:near_first"]
    with FilterChain(resolve_filters(make_entries(*forms), base_dir=plugins), seed=0, round_index=1) as chain:
        assert chain.not_prefix_stable() == ["random_k", "far", "wide", "near_first"]


@dataclass
class Thinking:
    reasoning: str | None
    final: str
    closed: bool


class Splitter:
    def split_thinking(self, text: str, prompt_ids: Any) -> Thinking:
        if "<think>" not in text:
            return Thinking(None, text, True)
        inside, closed, after = text.removeprefix("<think>").partition("</think>")
        return Thinking(inside, after, bool(closed))


def test_answers_are_read_after_the_thinking(judge: Judge) -> None:
    samples = group("<think>maybe 5</think>4", "<think>it is 4", "4", "<think>it is 4</think>5")
    judged = judge(samples, "numeric_answer", encoder=Splitter())
    assert [one.kept for one in judged] == [True, False, True, False]
    assert (judged[0].sample.reasoning, judged[0].sample.final) == ("maybe 5", "4")
    assert judged[1].says == (FilterSays("generate", False, None, "thinking_unclosed"),)
    rows = funnel(judged)
    assert [(row.filter, row.entered, row.dropped) for row in rows] == [("generate", 4, 1), ("numeric_answer", 3, 1)]


def test_rows_that_cannot_be_trained_are_rejected_first(judge: Judge) -> None:
    long = new_sample("4", i=0, prompt_ids=tuple(range(7)), completion_ids=tuple(range(4)))
    fits = replace(long, sample_id="b", completion_ids=(1, 2, 3))
    stopped = replace(fits, sample_id="c", finish_reason=STOP)
    no_room = replace(long, sample_id="d", finish_reason=PROMPT_TOO_LONG, completion="", completion_ids=())
    judged = judge([long, fits, stopped, no_room], "numeric_answer", max_length=10)
    assert [one.kept for one in judged] == [False, True, False, False]
    assert [one.says[0].reason for one in judged] == ["too_long", None, "too_long", "prompt_too_long"]


def test_no_filters_keep_everything(judge: Judge) -> None:
    judged = judge(group("a", "b"))
    assert [one.kept for one in judged] == [True, True]
    assert funnel(judged) == []


def test_data_mistakes_are_data_errors_with_the_place(judge: Judge) -> None:
    with pytest.raises(DataError) as caught:
        judge([new_sample("4", "no digits")], "numeric_answer")
    assert caught.value.where == "filters[0]: numeric_answer"
    assert "prompt p0 has the answer 'no digits'" in caught.value.what


def test_the_first_failure_in_sample_order_is_told(judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(
        "def f(sample):\n    if sample.completion == 'bad': raise ValueError(sample.sample_id)\n    return True\n"
        "f.in_process = True\n"
    )
    with pytest.raises(PluginError, match="on prompt p0 \\(sample 1-p0-1\\)"):
        judge(group("good", "bad", "good", "bad"), "f.py:f")


def test_a_cache_spares_the_second_run(judge: Judge, tmp_path: Path) -> None:
    counter = tmp_path / "calls"
    (tmp_path / "c.py").write_text(
        "from iterative_sft_cli.types import Verdict\n"
        "def f(sample, word: str = 'x'):\n"
        f"    with open({str(counter)!r}, 'a') as file: file.write('.')\n"
        "    return Verdict('x' in sample.completion, 0.25, 'no_x', {'seen': sample.completion})\n"
    )
    cache = tmp_path / "cache"
    first = judge(group("x", "y"), "c.py:f", cache_dir=cache)
    assert judge(group("x", "y"), "c.py:f", cache_dir=cache) == first
    assert counter.read_text() == ".."
    [file] = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-30])
    assert judge(group("x", "y"), "c.py:f", cache_dir=cache) == first
    assert counter.read_text() == "..."
    assert judge(group("x", "y"), "c.py:f", cache_dir=cache) == first
    judge(group("x", "y"), {"c.py:f": "z"}, cache_dir=cache)
    assert counter.read_text() == "....."
    (tmp_path / "c.py").write_text((tmp_path / "c.py").read_text() + "# edited\n")
    judge(group("x", "y"), "c.py:f", cache_dir=cache)
    assert counter.read_text() == "......."


def test_failures_are_not_cached(judge: Judge, tmp_path: Path) -> None:
    flag = tmp_path / "mended"
    (tmp_path / "c.py").write_text(
        f"import os\ndef f(sample):\n    if not os.path.exists({str(flag)!r}): raise OSError('network')\n    return True\n"
    )
    entry = {"use": "c.py:f", "on_error": "drop"}
    assert not judge(group("x"), entry, cache_dir=tmp_path / "cache")[0].kept
    flag.touch()
    assert judge(group("x"), entry, cache_dir=tmp_path / "cache")[0].kept


def test_lone_surrogates_and_line_separators_pass_through_workers(judge: Judge, plugins: Path) -> None:
    text = "a\u2028b\ud800c\x00\x1b[2J"
    said = judge(group(text), "p.py:slow_echo")[0].says[0]
    assert said.score == float(len(text))
