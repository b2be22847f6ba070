"""dedup: levels, scopes, ties, and an index of fixed size that is the same after a resume."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from filter_samples import new_sample

from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.filters import Judged
from iterative_sft_cli.filters.builtin import keys
from iterative_sft_cli.filters.builtin.dedup_near import Signatures, first_of_each
from iterative_sft_cli.filters.builtin.dedup_round import Seen

Judge = Callable[..., list[Judged]]


def kept(
    judge: Judge, texts: list[str], *, prompts: list[str] | None = None, options: Any = None, **arguments: Any
) -> list[bool]:
    prompts = prompts or ["p0"] * len(texts)
    samples = [
        new_sample(text, i=i, prompt=prompt) for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
    ]
    samples = [replace(s, prompt=f"question of {s.prompt_id[:2]}") for s in samples]
    return [one.kept for one in judge(samples, {"dedup": arguments} if arguments else "dedup", **(options or {}))]


def test_levels(judge: Judge) -> None:
    texts = ["It is 4.", "It is 4. ", "it  is 4", "It is four."]
    assert kept(judge, texts) == [True, False, True, True]
    assert kept(judge, texts, level="normalized") == [True, False, False, True]
    texts = [
        "The train needs four hours to reach the city.",
        "The train needs 4 hours to reach the city.",
        "Nobody knows.",
    ]
    assert kept(judge, texts, level="near", similarity=0.85) == [True, False, True]
    assert kept(judge, texts, level="near", similarity=0.99) == [True, True, True]


def test_equation_lists_are_the_steps_not_the_words(judge: Judge) -> None:
    texts = [
        "In April 48/2 = <<48/2=24>>24, so <<48+24=72>>72.",
        "She sold <<48/2=24>>24 in May; in all <<48 + 24 = 72>>72 clips.",
        "<<48+24=72>>72 since <<48/2=24>>24",
        "48 * 1.5 = 72",
        "72.",
        "72",
    ]
    assert kept(judge, texts, level="equation_list") == [True, False, True, True, True, False]


def test_code_is_compared_by_its_tree(judge: Judge) -> None:
    texts = [
        "```python\ndef f(x):\n    return x + 1\n```",
        "def f(x):\n    '''Add one.'''\n    # one\n    return (x+1)",
        "def f(x):\n    return 1 + x",
        "def f(x: return",
        "def f(x:   return",
    ]
    assert kept(judge, texts, level="ast") == [True, False, True, True, False]


def test_ties(judge: Judge) -> None:
    texts = ["2+2=<<2+2=4>>4, a long way to say it", "<<2+2=4>>4", "other <<1+3=4>>4"]
    assert kept(judge, texts, level="equation_list", tie="first") == [True, False, True]
    assert kept(judge, texts, level="equation_list", tie="shortest") == [False, True, True]
    assert kept(
        judge,
        ["<<1+3=4>>4", "<<2+2=4>>4 near", "<<2+2=4>> entirely different words", "<<2+2=4>>4"],
        level="equation_list",
        tie="farthest",
    ) == [True, False, True, False]


def test_scope_prompt_compares_only_samples_of_a_prompt(judge: Judge) -> None:
    assert kept(judge, ["4", "4", "4"], prompts=["p0", "p1", "p1"]) == [True, True, False]


def test_scope_round_compares_equal_prompts(judge: Judge) -> None:
    prompts = ["p0a", "p0b", "p1"]
    assert kept(judge, ["4", "4", "4"], prompts=prompts, scope="round") == [True, False, True]
    assert kept(judge, ["4", "4", "4"], prompts=prompts, scope="round", across_prompts=True) == [True, False, False]


def test_scope_run_remembers_what_was_accepted(judge: Judge) -> None:
    earlier = [{"prompt_id": "p0", "completion": "It is 4.", "round_index": 1}]
    options = {"accepted_earlier": earlier, "round_index": 2}
    texts, prompts = ["It is 4.", "it is 4", "It is 4."], ["p0", "p0", "p1"]
    assert kept(judge, texts, prompts=prompts, scope="run", options=options) == [False, True, True]
    assert kept(judge, texts, prompts=prompts, scope="run", level="normalized", options=options) == [False, False, True]
    assert kept(judge, texts, prompts=prompts, scope="run", across_prompts=True, options=options) == [
        False,
        True,
        False,
    ]
    assert kept(judge, texts, prompts=prompts, scope="run") == [True, True, True]


TEXT = "The shop sells apples for two dollars each and pears for three, so Ann pays {} dollars for her {} bags on {} evening."


def test_near_duplicates_over_the_round_and_the_run(judge: Judge) -> None:
    texts = [
        TEXT.format(14, 5, "Monday"),
        TEXT.format(14, 5, "Sunday"),
        "Something else entirely happened in the village.",
    ]
    assert kept(judge, texts, level="near", scope="round", similarity=0.7) == [True, False, True]
    options = {"accepted_earlier": [{"prompt_id": "p0", "completion": texts[0], "round_index": 1}]}
    assert kept(judge, texts, level="near", scope="run", similarity=0.7, options=options) == [False, False, True]
    assert kept(judge, texts, prompts=["p0", "p1", "p2"], level="near", scope="round", similarity=0.7) == [True] * 3
    assert kept(
        judge, texts, prompts=["p0", "p1", "p2"], level="near", scope="round", similarity=0.7, across_prompts=True
    ) == [True, False, True]
    assert kept(judge, ["", "", "x"], level="near", scope="round") == [True, False, True]


def test_planted_copies_are_found_among_strangers() -> None:
    words = [f"word{i}" for i in range(2000)]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=60)) for _ in range(300)]
    copies = [" ".join([*text.split()[:-1], "changed"]) for text in texts[:100]]
    signatures = Signatures()
    signatures.add_all(("", text) for text in texts + copies)
    first = list(first_of_each(signatures, 0, 0.9))
    assert all(first[:300])
    assert sum(first[300:]) <= 2


def test_an_index_of_a_million_samples_stays_under_200_bytes_each() -> None:
    count = 200_000
    tracemalloc.start()
    seen = Seen()
    for i in range(count):
        seen.add(i * 0x9E3779B97F4A7C15 % 2**64)
    exact = tracemalloc.get_traced_memory()[1] / count
    tracemalloc.stop()
    assert exact < 200
    assert 5 * 0x9E3779B97F4A7C15 % 2**64 in seen and 3 not in seen
    signatures = Signatures()
    signatures.add_all(("", f"text number {i}") for i in range(50))
    assert signatures.bytes_each() < 200


def test_the_index_is_the_same_after_a_resume(judge: Judge, tmp_path: Any) -> None:
    draw = random.Random(1)
    earlier = [
        {"prompt_id": f"p{i % 7}", "completion": TEXT.format(i, i * 7, draw.random()), "round_index": 1}
        for i in range(60)
    ]
    texts = [one["completion"] for one in earlier[::3]] + [TEXT.format(i, 9, "x") for i in range(20)]
    prompts = [one["prompt_id"] for one in earlier[::3]] + ["p1"] * 20
    for arguments in ({"scope": "run"}, {"scope": "run", "level": "near", "similarity": 0.95, "across_prompts": True}):
        fresh = kept(
            judge, texts, prompts=prompts, options={"accepted_earlier": earlier, "round_index": 2}, **arguments
        )
        cached = {"accepted_earlier": earlier, "round_index": 2, "cache_dir": tmp_path}
        assert kept(judge, texts, prompts=prompts, options=cached, **arguments) == fresh
        assert kept(judge, texts, prompts=prompts, options=cached, **arguments) == fresh
        assert not all(fresh)


def test_a_damaged_or_foreign_index_is_made_again(judge: Judge, tmp_path: Any) -> None:
    earlier = [{"prompt_id": "p0", "completion": TEXT.format(i, 1, "a"), "round_index": 1} for i in range(20)]
    arguments = {"scope": "run", "level": "near", "similarity": 0.99}
    options = {"accepted_earlier": earlier, "round_index": 2, "cache_dir": tmp_path}
    texts = [earlier[3]["completion"], "new"]
    assert kept(judge, texts, options=options, **arguments) == [False, True]
    [file] = tmp_path.glob("*.index")
    for damage in (
        lambda data: data[: len(data) // 2],
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
        lambda data: b"",
    ):
        file.write_bytes(damage(file.read_bytes()))
        assert kept(judge, texts, options=options, **arguments) == [False, True]
    other = [{**one, "completion": f"quite another story, told {i} times"} for i, one in enumerate(earlier)]
    assert kept(judge, texts, options={**options, "accepted_earlier": other}, **arguments) == [True, True]


def test_every_flipped_byte_of_an_index_is_noticed(tmp_path: Any) -> None:
    made = Signatures()
    made.add_all(("", TEXT.format(i, i, i)) for i in range(3))
    file = tmp_path / "x.index"
    made.save(file)
    whole = file.read_bytes()
    assert Signatures.load(file).keys().tolist() == made.keys().tolist()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert Signatures.load(file).count == 0, at


def test_what_cannot_work_is_refused(judge: Judge) -> None:
    for wrong in (
        {"similarity": 0.9},
        {"level": "near", "similarity": 0.2},
        {"tie": "shortest", "scope": "round"},
        {"across_prompts": True},
        {"level": "fuzzy"},
    ):
        with pytest.raises(ConfigError):
            judge([], {"dedup": wrong})


def test_hostile_texts_have_keys() -> None:
    def texts() -> Iterator[str]:
        yield from (
            "(" * 100_000,
            "[" * 5000 + "]" * 5000,
            "x=" * 30_000,
            "\x00",
            "\ud800",
            "-" * 5000 + "1",
            "1+" * 20_000 + "=1",
            "def f():\n" + " " * 50_000,
        )

    for text in texts():
        for make in (keys.normalized, keys.equation_list, keys.syntax_tree):
            assert isinstance(make(text), str)
