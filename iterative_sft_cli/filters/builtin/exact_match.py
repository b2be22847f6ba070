"""exact_match: keeps completions that equal the answer."""

from __future__ import annotations

from typing import Any

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.filters.builtin.spec import BuiltIn, decide
from iterative_sft_cli.types import Sample, Verdict

SPEC = BuiltIn(role="verifier", cost="one comparison")


def _normal(value: Any, ignore_case: bool, ignore_space: bool, ignore_punctuation: bool) -> str:
    text = value if isinstance(value, str) else str(value)
    text = " ".join(text.split()) if ignore_space else text
    if ignore_punctuation:
        text = text.strip(" \t\n\r.,;:!?\"'`")
    return text.casefold() if ignore_case else text


def exact_match(
    sample: Sample,
    ignore_case: bool = False,
    ignore_space: bool = True,
    ignore_punctuation: bool = False,
    drop: bool = True,
) -> Verdict:
    """Keep a completion whose final part equals `answer`; an answer that is a list accepts any of its members.

    ignore_case: capitals do not matter. ignore_space: outer white space is cut and inner runs count as one space. ignore_punctuation: .,;:!? and quotes at
    both ends are cut. Both sides are normalised alike. Dropped as `wrong_answer`; extra `answer` is a short text as it was compared.
    """
    if sample.answer is None:
        raise DataError(
            f"prompt {sample.prompt_id} has no answer, which exact_match compares with", hint="set `prompts.answer`"
        )
    said = _normal(sample.final, ignore_case, ignore_space, ignore_punctuation)
    accepted = sample.answer if isinstance(sample.answer, list | tuple) else [sample.answer]
    right = any(said == _normal(one, ignore_case, ignore_space, ignore_punctuation) for one in accepted)
    return decide(right, "wrong_answer", drop=drop, extra={"answer": said} if len(said) <= 100 else None)
