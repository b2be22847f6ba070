"""numeric_answer: keeps completions whose number equals the answer."""

from __future__ import annotations

from functools import lru_cache

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.filters.builtin.last_number import Found, SeveralAnswers, equal_numbers, last_number
from iterative_sft_cli.filters.builtin.spec import BuiltIn, at_least, decide
from iterative_sft_cli.types import Sample, Verdict

SPEC = BuiltIn(role="verifier", cost="10 to 50 us", check=at_least("tolerance", 0))


@lru_cache(maxsize=4096)
def _gold(answer: str) -> Found | None:
    try:
        return last_number(answer)
    except SeveralAnswers:
        return None


def numeric_answer(sample: Sample, tolerance: float = 1e-6, drop: bool = True) -> Verdict:
    r"""Keep a completion whose final number equals the number in `answer`.

    Which number counts: where the final part marks its answer (`####`, `\boxed{}`, "answer is", "answer:"), the number
    of the last mark that has one, carried on over `=` ("answer is 2 + 3 = 5" says 5); without a mark, the last number.
    So of several answers the last one is judged; alternatives in one place ("5 or 6", "5, 6", "10-15") are wrong
    (`several_answers`). Understood: 1,234 · -5 · 3.50 · .5 · 1e3 · 2 x 10^3 · 3/4 · 1 1/2 · \frac{3}{4} · $5 · 50%
    (equals 50 and 0.5). Number words are not.

    tolerance: relative to max(1, |answer|), for numbers that are not whole; whole numbers must be equal. `answer` is
    read the same way. Dropped as `wrong_answer`, `several_answers` or `no_number`; extra `answer` is the number as read.
    """
    gold = _gold(str(sample.answer)) if sample.answer is not None else None
    if gold is None:
        raise DataError(
            f"prompt {sample.prompt_id} has the answer {sample.answer!r}, in which numeric_answer finds no number",
            hint="set `prompts.answer` to the column with the number, or give it a pattern: {column: answer, pattern: '#### (.+)'}",
        )
    try:
        said = last_number(sample.final)
    except SeveralAnswers:
        return decide(False, "several_answers", drop=drop)
    if said is None:
        return decide(False, "no_number", drop=drop)
    return decide(equal_numbers(said, gold, tolerance), "wrong_answer", drop=drop, extra={"answer": str(said.value)})
