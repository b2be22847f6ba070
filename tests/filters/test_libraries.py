"""Built-ins on libraries: math-verify in its workers, reasoning-gym's verifiers, py3langid."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from filter_samples import new_sample

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.filters import Judged

Judge = Callable[..., list[Judged]]

MATH = [
    ("1/2", "The answer is 0.5", None),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}", None),
    ("1000", "1,000", None),
    ("x=3", r"\boxed{3}", None),
    (r"\sqrt{2}/2", r"$\frac{1}{\sqrt{2}}$", None),
    ("[0,10]", r"$[0, 10]$", None),
    (r"\{1,2\}", r"\boxed{\{2, 1\}}", None),
    ("5", r"\boxed{5} and \boxed{6}", "wrong_answer"),
    ("6", r"\boxed{5}\boxed{6}", "wrong_answer"),
    ("5", "The answer is 5 or 6", "several_answers"),
    ("19", r"\boxed{12+7}", "not_evaluated"),
    ("84", r"$12 \cdot 7$", "not_evaluated"),
    ("8", r"\boxed{2^3}", "not_evaluated"),
    ("0.75", r"\boxed{\frac{3}{4}}", None),
    ("4", r"\boxed{2 \cdot 2}", "not_evaluated"),
    ("30000", r"\boxed{3 \times 10^4}", None),
    ("3", r"\boxed{\sqrt{9}}", None),
    ("5", "no idea", "no_expression"),
    ("5", "", "no_expression"),
    ("5", "6", "wrong_answer"),
    ("5", "[1,2,3,4,5]", "no_expression"),
]


def test_math_verify(judge: Judge) -> None:
    pytest.importorskip("math_verify")
    samples = [new_sample(said, answer, i=i, prompt=f"p{i}") for i, (answer, said, _) in enumerate(MATH)]
    judged = judge(samples, {"use": "math_verify", "workers": 1})
    assert [one.says[0].reason for one in judged] == [reason for _, _, reason in MATH]
    assert all(one.says[0].score == float(one.kept) for one in judged)
    assert judged[7].says[0].extra == {"answer": "5,6"}


def test_math_verify_gives_up_on_what_takes_too_long(judge: Judge) -> None:
    pytest.importorskip("math_verify")
    samples = [new_sample(r"\boxed{9^{9^{9^{9}}}!}", "5", i=0), new_sample("5", "5", i=1)]
    start = time.monotonic()
    judged = judge(samples, {"use": "math_verify", "timeout_s": 1.0, "workers": 1})
    assert [(one.kept, one.says[0].reason, one.says[0].score) for one in judged] == [
        (False, "timeout", None),
        (True, None, 1.0),
    ]
    assert time.monotonic() - start < 15


def test_math_verify_needs_a_gold_expression(judge: Judge) -> None:
    pytest.importorskip("math_verify")
    with pytest.raises(DataError, match="prompt p0 has the answer None, in which math_verify finds no expression"):
        judge([new_sample("5", None)], {"use": "math_verify", "workers": 1})


def test_reasoning_gym(judge: Judge) -> None:
    library = pytest.importorskip("reasoning_gym")
    dataset = library.create_dataset("chain_sum", size=1, seed=1, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    item = dataset[0]
    right, wrong = str(item["answer"]), str(int(item["answer"]) + 1)
    texts = [
        right,
        f"I think <answer>{right}</answer> it is",
        f"<answer>{wrong}</answer>",
        f"so\n{right}",
        "",
        f"it is {right}",
    ]
    samples = [
        new_sample(text, item["answer"], i=i, prompt="p0", row={"metadata": item["metadata"]})
        for i, text in enumerate(texts)
    ]
    judged = judge(samples, "reasoning_gym")
    assert [one.says[0].reason for one in judged] == [
        None,
        None,
        "wrong_answer",
        "wrong_answer",
        "no_answer",
        "wrong_answer",
    ]
    assert 0 < (judged[5].says[0].score or 0) < 1
    assert [one.kept for one in judge(samples, {"reasoning_gym": {"extract": "last_line"}})][3] is True
    assert [one.kept for one in judge(samples, {"reasoning_gym": {"min_score": 0.01}})][5] is True
    assert judge(samples, {"reasoning_gym": {"extract": "tag"}})[0].says[0].reason == "no_answer"
    assert judge(samples, {"reasoning_gym": {"extract": "last_number"}})[5].kept
    bare = [new_sample(right, item["answer"])]
    with pytest.raises(DataError, match="does not tell its reasoning-gym task"):
        judge(bare, "reasoning_gym")
    assert judge(bare, {"reasoning_gym": "chain_sum"})[0].kept
    with pytest.raises(DataError, match="no task `chain_sums`"):
        judge(bare, {"reasoning_gym": "chain_sums"})


def test_language(judge: Judge) -> None:
    pytest.importorskip("py3langid")
    texts = [
        "The quick brown fox jumps over the lazy dog near the river bank.",
        "Der schnelle braune Fuchs springt über den faulen Hund am Ufer.",
        "Le renard brun saute par-dessus le chien paresseux au bord de la rivière.",
        "42",
    ]
    samples = [new_sample(text, i=i) for i, text in enumerate(texts)]
    judged = judge(samples, {"language": "en"})
    assert [one.says[0].reason for one in judged] == [None, "other_language", "other_language", None]
    assert judged[1].says[0].extra["language"] == "de"
    assert [one.kept for one in judge(samples, {"language": {"languages": ["de", "fr"]}})] == [False, True, True, True]
    for wrong in ("english", {"languages": "en", "min_confidence": 2.0}):
        with pytest.raises(ConfigError):
            judge([], {"language": wrong})


def test_gold_and_output_are_read_alike(judge: Judge) -> None:
    pytest.importorskip("math_verify")
    answers = [r"\boxed{72}", "72", 72, "#### 72", r"$72$"]
    samples = [new_sample("72", answer, i=i, prompt=f"p{i}") for i, answer in enumerate(answers)]
    judged = judge(samples, {"use": "math_verify", "workers": 1})
    assert [one.kept for one in judged] == [True] * 5


def test_long_form_keys_act_on_math_verify(judge: Judge) -> Any:
    pytest.importorskip("math_verify")
    with pytest.raises(DataError):
        judge([new_sample("5", "")], {"use": "math_verify", "on_error": "fail", "workers": 1})
