"""Which number a text gives as its answer, and when two are equal."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
from filter_samples import new_sample
from hypothesis import given
from hypothesis import strategies as st

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.filters import Judged
from iterative_sft_cli.filters.builtin.last_number import SeveralAnswers, last_number
from iterative_sft_cli.filters.builtin.numeric_answer import numeric_answer

READ = {
    "5": "5",
    "-5.": "-5",
    "−7": "-7",
    " 12 apples": "12",
    "The answer is 5.": "5",
    "**Answer:** 42": "42",
    "Answer: **42**": "42",
    r"\boxed{1,234}": "1234",
    r"\boxed{5} because 2 + 3": "5",
    r"answer is \(\boxed{42}\)": "42",
    r"\boxed{\frac{3}{4}}": "3/4",
    r"-\frac{1}{2}": "-1/2",
    r"$\frac12$": "1/2",
    "so 5-3=2": "2",
    "x = -3": "-3",
    "5 - 3": "3",
    "#### 72": "72",
    "<<16-3=13>>13 eggs\n#### 18": "18",
    "$1,200.50": "2401/2",
    r"\$3": "3",
    "-$5": "-5",
    "$-5": "-5",
    "(5)": "5",
    ".5": "1/2",
    "0.50": "1/2",
    "3/4": "3/4",
    "1 1/2": "3/2",
    "1e3": "1000",
    "2 x 10^3": "2000",
    r"3 \times 10^{4}": "30000",
    "1,000,000": "1000000",
    "1{,}000": "1000",
    "12,34": "34",
    "answer: 2 + 3 = 5 apples": "5",
    "Total = 5*60 + 20 = 320 minutes.": "320",
    "The answer is 12 apples (3 each).": "12",
    "The answer is 4. The answer is 6.": "6",
    "The answer is 4. No: 7.": "4",
    "Is my answer: right? It is 9": "9",
    "It's 5, not 6": "6",
    r"\boxed{5} and \boxed{6}": "6",
    "3^2 = 9": "9",
    "H2O": None,
    "file v2": None,
    "no": None,
    "": None,
    "7/0": None,
    "five": None,
    "١٢": None,
    "9" * 5000: None,
    "1e999999": None,
    "1e-999999": None,
}


@pytest.mark.parametrize("text", READ)
def test_the_number_that_a_text_gives(text: str) -> None:
    found = last_number(text)
    wanted = READ[text]
    assert (found.value if found else None) == (Fraction(wanted) if wanted else None)


@pytest.mark.parametrize(
    "text",
    [
        "5 or 6",
        "The answer is 5 or 6",
        "answer: 5, 6, 7",
        "answer is 5?6?7?",
        "answer is 10-15",
        "answer is 2 + 3",
        "#### 5 6",
        r"\boxed{5 \text{ or } 6}",
    ],
)
def test_alternatives_are_no_answer(text: str) -> None:
    with pytest.raises(SeveralAnswers):
        last_number(text)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("4", 4, True),
        ("4.0", "4", True),
        ("4", "#### 4", True),
        ("4", "2 + 2 = <<2+2=4>>4\n#### 4", True),
        ("0.333333", "1/3", True),
        ("0.3333", "1/3", False),
        ("50%", "50", True),
        ("50%", "0.5", True),
        ("50", "50%", True),
        ("0.5", "50%", True),
        ("5", "50%", False),
        ("1234568", "1234567", False),
        ("100000000000000000001", "100000000000000000000", False),
        ("1,234", 1234, True),
        ("-4", "4", False),
        ("4 dollars", "$4.00", True),
    ],
)
def test_equality(said: str, answer: object, right: bool) -> None:
    verdict = numeric_answer(new_sample(said, answer))
    assert (verdict.keep, verdict.score) == (right, float(right))


def test_reasons_and_extra(judge: Callable[..., list[Judged]]) -> None:
    texts = ["is 5", "5 or 6", "none", "4.50"]
    judged = judge([new_sample(text, "4.5", i=i) for i, text in enumerate(texts)], "numeric_answer")
    assert [one.says[0].reason for one in judged] == ["wrong_answer", "several_answers", "no_number", None]
    assert [one.says[0].extra.get("answer") for one in judged] == ["5", None, None, "9/2"]


def test_tolerance_is_for_numbers_that_are_not_whole() -> None:
    assert numeric_answer(new_sample("3.1", "3.14"), tolerance=0.05).keep
    assert not numeric_answer(new_sample("3.1", "3.14")).keep
    assert not numeric_answer(new_sample("31", "30"), tolerance=0.05).keep


@pytest.mark.parametrize("answer", [None, "", "no digits", "5 or 6"])
def test_an_answer_without_a_number_is_a_data_error(answer: object) -> None:
    with pytest.raises(DataError, match="in which numeric_answer finds no number"):
        numeric_answer(new_sample("4", answer))


@given(st.text(max_size=300))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        last_number(text)
    except SeveralAnswers:
        pass


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "The answer is {}.", "#### {}", "\\boxed{{{}}}", "so it is {} km", "= {}"]),
)
def test_integers_come_back(number: int, form: str) -> None:
    found = last_number(form.format(number))
    assert found is not None and found.value == number
    found = last_number(form.format(f"{number:,}"))
    assert found is not None and found.value == number


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**6), max_value=10**6))
def test_decimals_come_back(number: object) -> None:
    found = last_number(f"The answer is ${number} in total")
    assert found is not None and found.value == Fraction(str(number))


def test_long_and_hostile_texts_are_fast() -> None:
    import time

    start = time.perf_counter()
    for text in (
        "1," * 50_000,
        "1" * 100_000,
        "\\frac{" * 20_000,
        "answer is " * 20_000,
        "\\boxed{" * 20_000,
        "- " * 50_000 + "x",
        "1 " * 50_000,
        "(" * 100_000,
    ):
        try:
            last_number(text)
        except SeveralAnswers:
            pass
    assert time.perf_counter() - start < 3
