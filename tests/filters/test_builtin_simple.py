"""The built-ins that need no library: what each keeps, what it drops and for which reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from filter_samples import Judge, make_entries, new_sample, outcome, reasons

from iterative_sft_cli.errors import ConfigError, DataError, PluginError
from iterative_sft_cli.filters import resolve_filters
from iterative_sft_cli.filters.builtin import NAMES, load_builtin
from iterative_sft_cli.filters.contract import inspect_filter
from iterative_sft_cli.types import LENGTH, STOP

SELF_EVIDENT = {"drop", "ignore_case", "batch_size", "of", "mode", "temperature", "max_tokens", "seconds", "memory_mb"}


def test_every_builtin_is_documented_with_cost_and_arguments() -> None:
    for name in NAMES:
        target, spec = load_builtin(name)
        shape = inspect_filter(target)
        doc = target.__doc__ or ""
        assert len(doc.split()) > 15, name
        assert spec.cost and spec.role in ("verifier", "check", "scorer", "selector"), name
        undocumented = [p.name for p in shape.parameters if p.name not in doc and p.name not in SELF_EVIDENT]
        assert not undocumented, f"{name}: {undocumented}"


def test_finished(judge: Judge) -> None:
    cut = replace(new_sample("x"), finish_reason=LENGTH)
    stopped = replace(new_sample("x", i=1), finish_reason=STOP)
    ended = new_sample("x", i=2)
    assert [outcome(one) for one in judge([cut, stopped, ended], "finished")] == ["truncated", None, None]
    assert [outcome(one) for one in judge([stopped, ended], {"finished": False})] == ["stop_string", None]


def test_nonempty(judge: Judge) -> None:
    assert reasons(judge, ["", " \n\t", "a", "ab"], "nonempty") == ["empty", "empty", None, None]
    assert reasons(judge, ["a", "ab"], {"nonempty": 2}) == ["empty", None]
    stub = {"nonempty": {"drop_stubs": True}}
    assert reasons(judge, ["I see.", "a\nb", "long enough text"], stub) == ["stub", None, None]
    with pytest.raises(ConfigError):
        reasons(judge, [], {"nonempty": 0})


def test_length(judge: Judge) -> None:
    assert reasons(judge, ["a b", "a b c"], {"length": 3}) == [None, "too_long"]
    assert reasons(judge, ["a", "a b c"], {"length": {"min": 3, "max": 9}}) == ["too_short", None]
    assert reasons(judge, ["abc", "abcd"], {"length": {"max": 3, "unit": "chars"}}) == [None, "too_long"]
    assert reasons(judge, ["a b c", "abc"], {"length": {"max": 2, "unit": "words"}}) == ["too_long", None]
    assert reasons(judge, ["x"], {"length": {"max": 2, "unit": "chars", "of": "reasoning"}}, reasoning="abc") == [
        "too_long"
    ]
    for wrong in ("length", {"length": {"max": 2, "of": "final"}}):
        with pytest.raises(ConfigError):
            reasons(judge, [], wrong)


def test_regex(judge: Judge) -> None:
    assert reasons(judge, ["#### 4", "4"], {"regex": r"^#### \d+$"}) == [None, "no_match"]
    assert reasons(judge, ["a1", "a"], {"regex": {"pattern": r"\d", "invert": True}}) == ["match", None]
    assert reasons(judge, [" 42 ", "x 42"], {"regex": {"pattern": r"\d+", "mode": "fullmatch"}}) == [None, "no_match"]
    assert reasons(judge, ["YES", "no"], {"regex": {"pattern": "yes", "ignore_case": True}}) == [None, "no_match"]
    judged = judge([new_sample("b")], {"regex": {"pattern": "a", "drop": False}})
    assert (judged[0].kept, judged[0].says[0].score) == (True, 0.0)


def test_a_catastrophic_pattern_is_an_error_not_a_hang(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    from iterative_sft_cli.filters.builtin import regex

    monkeypatch.setattr(regex, "SECONDS_PER_MATCH", 0.2)
    with pytest.raises(PluginError, match="took over 0 s|took over"):
        reasons(judge, ["a" * 40 + "!"], {"regex": {"pattern": r"^(a|aa)+$"}})


def test_contains(judge: Judge) -> None:
    assert reasons(judge, ["a b", "b"], {"contains": "a"}) == [None, "text_missing"]
    assert reasons(judge, ["a b", "b"], {"contains": {"text": ["a", "b"], "mode": "all"}}) == [None, "text_missing"]
    assert reasons(judge, ["a b", "b"], {"contains": {"text": ["a"], "mode": "none"}}) == ["text_found", None]
    assert reasons(judge, ["STRASSE"], {"contains": {"text": "straße", "ignore_case": True}}) == [None]
    with pytest.raises(ConfigError):
        reasons(judge, [], {"contains": ""})


def test_exact_match(judge: Judge) -> None:
    texts = ["Paris", " Paris \n", "paris", "Paris.", "London"]
    assert reasons(judge, texts, "exact_match", answer="Paris") == [None, None, *["wrong_answer"] * 3]
    loose = {"exact_match": {"ignore_case": True, "ignore_punctuation": True}}
    assert reasons(judge, texts, loose, answer="Paris") == [None] * 4 + ["wrong_answer"]
    assert reasons(judge, ["4", "four"], "exact_match", answer=["4", "four"]) == [None, None]
    assert reasons(judge, ["4"], "exact_match", answer=4) == [None]
    assert reasons(judge, [" 4"], {"exact_match": {"ignore_space": False}}, answer="4") == ["wrong_answer"]
    with pytest.raises(DataError, match="prompt p0 has no answer"):
        reasons(judge, ["4"], "exact_match", answer=None)


def test_repetition(judge: Judge) -> None:
    fine = "The cat sat on the mat and looked at the moon while rain fell softly on the old roof."
    loop = "we add one and get two " * 6
    assert reasons(judge, [fine, loop, "no " * 9, "line\n" * 9, "short short"], "repetition") == [
        None,
        "repeated_ngrams",
        "repeated_run",
        "repeated_run",
        None,
    ]
    assert reasons(judge, [loop], {"repetition": {"max_share": 1.0, "max_run": None}}) == [None]
    with pytest.raises(ConfigError):
        judge([], {"repetition": 0.0})


def test_threshold(judge: Judge) -> None:
    score = {"numeric_answer": {"drop": False}}
    by = {"threshold": {"by": "numeric_answer * 2", "min": 1.0, "max": 1.5}}
    assert reasons(judge, ["4", "5"], score, by) == ["above_threshold", "below_threshold"]
    condition = {"threshold": "numeric_answer >= 1 and num_tokens < 3"}
    assert reasons(judge, ["4", "it is 4", "5"], score, condition) == [None, "below_threshold", "below_threshold"]
    logprob = {"threshold": {"by": "logprob_per_token", "min": -1.0}}
    assert reasons(judge, ["4"], logprob, logprob=-2.0, completion_ids=(1, 2, 3, 4)) == [None]
    assert reasons(judge, ["4"], logprob) == ["no_score"]
    for wrong in (
        {"by": "num_tokens"},
        {"by": "num_tokens > 1", "min": 0},
        {"by": "num_tokens +", "min": 0},
        {"by": "num_tokens", "min": 2, "max": 1},
    ):
        with pytest.raises(ConfigError):
            judge([], {"threshold": wrong})
    with pytest.raises(PluginError, match="has no value"):
        reasons(judge, ["4"], {"threshold": {"by": "1 / (num_tokens - 2)", "min": 0}})


def test_top_k_and_best_of_n(judge: Judge) -> None:
    texts = ["a b c", "a", "a b", "a b c"]
    assert reasons(judge, texts, {"top_k": "num_tokens"}) == [None, *["not_in_top_k"] * 3]
    assert reasons(judge, texts, {"top_k": {"by": "-num_tokens", "k": 2}}) == [
        "not_in_top_k",
        None,
        None,
        "not_in_top_k",
    ]
    assert reasons(judge, texts, {"best_of_n": {"by": "num_tokens", "n": 2}}) == [
        None,
        "not_in_top_k",
        "not_in_top_k",
        None,
    ]
    assert reasons(judge, ["a"], {"top_k": "logprob"}) == ["no_score"]
    two = [new_sample("a", i=0), new_sample("a b", i=1), new_sample("a", i=0, prompt="p1")]
    assert [outcome(one) for one in judge(two, {"best_of_n": "num_tokens"})] == ["not_in_top_k", None, None]


def test_top_fraction(judge: Judge) -> None:
    texts = ["a " * n for n in (3, 1, 2, 5, 4)]
    assert reasons(judge, texts, {"top_fraction": {"by": "num_tokens", "q": 0.4}}) == [
        *["not_in_top_fraction"] * 3,
        None,
        None,
    ]
    kept = [one is None for one in reasons(judge, ["a"] * 30, {"top_fraction": {"by": "num_tokens", "q": 0.1}})]
    assert sum(kept) == 3
    assert reasons(judge, ["a"], {"top_fraction": {"by": "logprob", "q": 0.5}}) == ["no_score"]
    with pytest.raises(ConfigError):
        judge([], {"top_fraction": {"by": "num_tokens", "q": 0}})


def test_max_per_prompt_and_random_k(judge: Judge) -> None:
    assert reasons(judge, ["a"] * 3, {"max_per_prompt": 2}) == [None, None, "over_cap"]
    drawn = reasons(judge, ["a"] * 20, {"random_k": 5})
    assert drawn.count(None) == 5 and drawn.count("not_drawn") == 15
    assert drawn == reasons(judge, ["a"] * 20, {"random_k": 5})
    assert drawn != [None] * 5 + ["not_drawn"] * 15
    assert reasons(judge, ["a"] * 3, {"random_k": 5}) == [None] * 3
    with pytest.raises(ConfigError):
        judge([], {"random_k": 0})


def test_drop_solved(judge: Judge) -> None:
    score = {"numeric_answer": {"drop": False}}
    always, never, mixed = ["4", "4"], ["5", "6"], ["4", "5"]
    samples = [
        new_sample(text, i=i, prompt=name)
        for name, texts in (("always", always), ("never", never), ("mixed", mixed))
        for i, text in enumerate(texts)
    ]
    both = {"drop_solved": {"by": "numeric_answer", "at_least": 1.0, "at_most": 0.0}}
    assert [outcome(one) for one in judge(samples, score, both)] == [
        *["solved_too_often"] * 2,
        *["solved_too_seldom"] * 2,
        None,
        None,
    ]
    assert [outcome(one) for one in judge(samples, score, {"drop_solved": "numeric_answer"})] == [
        *["solved_too_often"] * 2,
        *[None] * 4,
    ]
    with pytest.raises(ConfigError):
        judge([], score, {"drop_solved": {"by": "numeric_answer", "at_least": 0.2, "at_most": 0.5}})


def test_balance(judge: Judge) -> None:
    samples = [
        new_sample("x", i=i, prompt=f"p{i}", row={"level": 1 if i < 10 else 2 if i < 15 else 3}) for i in range(18)
    ]

    def per_level(**arguments: Any) -> list[int]:
        kept = [one.kept for one in judge(samples, {"balance": arguments})]
        return [sum(kept[:10]), sum(kept[10:15]), sum(kept[15:])]

    assert per_level(ratio=1.0) == [3, 3, 3]
    assert per_level(ratio=1.5) == [5, 5, 3]
    assert per_level(max_per_level=4) == [4, 4, 3]
    assert per_level(ratio=2.0, max_per_level=4) == [4, 4, 3]
    assert [outcome(one) for one in judge(samples, {"balance": 1})] == [
        outcome(one) for one in judge(samples, {"balance": 1})
    ]
    with pytest.raises(DataError, match="no column `depth`"):
        per_level(ratio=1.0, level="depth")
    for wrong in ({}, {"ratio": 0.5}, {"max_per_level": 0}):
        with pytest.raises(ConfigError):
            judge([], {"balance": wrong} if wrong else "balance")


def test_majority(judge: Judge) -> None:
    def ask(texts: list[str], **arguments: Any) -> list[str | None]:
        return reasons(judge, texts, {"majority": arguments} if arguments else "majority")

    assert ask(["is 5", "5", "so 6", "?"]) == [None, None, "minority", "no_answer"]
    assert ask(["5", "6", "5", "6"]) == ["tie"] * 4
    assert ask(["5", "5", "?"]) == ["too_few_votes"] * 3
    assert ask(["5", "5", "6", "7", "?"], min_agree=0.5) == ["low_agreement"] * 5
    assert ask(["5", "5.0", "10/2"]) == [None] * 3
    assert ask(["A cat", "a  cat.", "dog"], answer="text") == [None, None, "minority"]
    assert ask(["x\nA", "y\na", "z\nb"], answer="last_line") == [None, None, "minority"]
    assert ask(["(A) or (B)", "(B)", "(A)"], answer="regex", pattern=r"\((\w)\)") == [None, None, "minority"]
    judged = judge([new_sample(t, i=i) for i, t in enumerate(["5", "5", "6", "5"])], {"majority": {"drop": False}})
    assert [one.says[0].score for one in judged] == [0.75, 0.75, 0.25, 0.75]
    assert judged[2].says[0].extra == {"answer": "6", "majority": "5"}
    for wrong in ({"answer": "regex"}, {"pattern": "x"}, {"min_agree": 2.0}, {"min_votes": 0}):
        with pytest.raises(ConfigError):
            ask([], **wrong)


def test_length_vs_group(judge: Judge) -> None:
    texts = ["a b c d", "a b c", "a b", "a b c d"]
    assert reasons(judge, texts, {"length_vs_group": 1}) == [None, None, "shorter_than_group", None]
    assert reasons(judge, texts, {"length_vs_group": {"max_shorter": 0}}) == [None, *["shorter_than_group"] * 2, None]
    median = {"length_vs_group": {"max_longer": 0, "max_shorter": 0, "than": "median", "unit": "words"}}
    assert reasons(judge, texts, median) == ["longer_than_group", None, "shorter_than_group", "longer_than_group"]
    leveled = [
        new_sample(t, i=i, prompt=f"p{i}", row={"level": 1 if i < 2 else 2})
        for i, t in enumerate(["a b c", "a", "a", "a b"])
    ]
    by_level = {"length_vs_group": {"max_shorter": 1, "scope": "level"}}
    assert [outcome(one) for one in judge(leveled, by_level)] == [None, "shorter_than_group", None, None]
    over_round = {"length_vs_group": {"max_shorter": 1, "scope": "round"}}
    assert [outcome(one) for one in judge(leveled, over_round)] == [
        None,
        "shorter_than_group",
        "shorter_than_group",
        None,
    ]
    with pytest.raises(DataError, match="no column `depth`"):
        judge(leveled, {"length_vs_group": {"max_shorter": 1, "scope": "level", "level": "depth"}})
    for wrong in ({}, {"max_shorter": -1}, {"max_longer": 1}):
        with pytest.raises(ConfigError):
            judge([], {"length_vs_group": wrong} if wrong else "length_vs_group")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("48/2 = <<48/2=24>>24, 48+24 = <<48+24=72>>72", None),
        ("<<48/2=25>>", "wrong_equation"),
        ("<<(16-3-4)*2=18>>", None),
        ("<<50%*80=40>>", None),
        ("<<1,000*2=2000>>", None),
        ("<<$5*3=$15>>", None),
        ("<<10/3=3.333>>", None),
        ("<<10/3=3.3>>", "wrong_equation"),
        ("<<2*2=4=8/2>>", None),
        ("<<x+1=2>>", "wrong_equation"),
        ("<<__import__('os').system('id')=0>>", "wrong_equation"),
        ("<<9**9**9**9=1>>", "wrong_equation"),
        ("<<1/0=1>>", "wrong_equation"),
        ("so 2 + 3 = 5 and 5 * 2 = 10.", None),
        ("so 2 + 3 = 6", "wrong_equation"),
        ("x = 5", None),
        ("nothing", None),
    ],
)
def test_equations_valid(judge: Judge, text: str, reason: str | None) -> None:
    assert reasons(judge, [text], "equations_valid") == [reason]


def test_equations_valid_options(judge: Judge) -> None:
    assert reasons(judge, ["nothing"], {"equations_valid": {"require": True}}) == ["no_equations"]
    assert reasons(judge, ["2 + 2 = 5"], {"equations_valid": {"marked_only": True}}) == [None]
    assert reasons(judge, ["2 + 2 = 4.05"], {"equations_valid": 0.1}) == [None]


def test_not_in_eval(judge: Judge, tmp_path: Any) -> None:
    long = "Natalia sold clips to 48 of her friends in April and then she sold half as many clips in May"
    (tmp_path / "dev.jsonl").write_text(f'{{"question": "{long}"}}\n\n{{"question": "What is 3 + 4?"}}\n')
    entry = {"not_in_eval": {"path": "dev.jsonl", "column": "question"}}
    samples = [
        new_sample("fine", i=0),
        new_sample(f"As in: {long.upper()}!", i=1),
        replace(new_sample("7", i=2), prompt="what is 3 + 4"),
        replace(new_sample("7", i=3), prompt=[{"role": "user", "content": long + ". How many?"}]),
        new_sample("We know what is 3 + 4 here", i=4),
    ]
    assert [outcome(one) for one in judge(samples, entry)] == [
        None,
        "in_eval_completion",
        "in_eval_prompt",
        "in_eval_prompt",
        None,
    ]
    judged = judge(samples, "not_in_eval", eval_texts=[long])
    assert [one.kept for one in judged] == [True, False, True, False, True]
    with pytest.raises(ConfigError, match="nothing to compare with"):
        judge(samples, "not_in_eval")
    with pytest.raises(ConfigError, match="there is no file gone.jsonl"):
        resolve_filters(make_entries({"not_in_eval": "gone.jsonl"}), base_dir=tmp_path)
    with pytest.raises(DataError, match="dev.jsonl:1: no column `text`"):
        judge(samples, {"not_in_eval": {"path": "dev.jsonl", "column": "text"}})
