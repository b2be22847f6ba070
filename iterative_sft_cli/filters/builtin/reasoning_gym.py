"""reasoning_gym: keeps completions that the task's own verifier accepts."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.filters.builtin.last_number import SeveralAnswers, last_number
from iterative_sft_cli.filters.builtin.spec import BuiltIn
from iterative_sft_cli.types import Sample, Verdict

SPEC = BuiltIn(
    role="verifier",
    cost="the task's verifier, mostly under 1 ms; 0.6 s once to import the library",
    requires=(("reasoning_gym", "gym"),),
)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


@lru_cache(maxsize=256)
def _scorer(task: str) -> Any:
    import reasoning_gym as library

    return library.get_score_answer_fn(task)


def _said(text: str, extract: str) -> str:
    if extract in ("auto", "tag"):
        tags: list[str] = _TAG.findall(text)
        if tags:
            return tags[-1].strip()
        if extract == "tag":
            return ""
    if extract == "last_number":
        try:
            found = last_number(text)
        except SeveralAnswers:
            return ""
        return "" if found is None else str(found.value) if found.value.denominator == 1 else found.text
    if extract == "last_line":
        return text.strip().rsplit("\n", 1)[-1].strip()
    return text.strip()


def reasoning_gym(
    sample: Sample,
    task: str | None = None,
    min_score: float = 1.0,
    extract: Literal["auto", "tag", "text", "last_line", "last_number"] = "auto",
    drop: bool = True,
) -> Verdict:
    """Keep a completion to which reasoning-gym's verifier of the task gives at least `min_score` (1.0: fully right).

    task: the task's name [the prompt's own, `metadata.source_dataset` of its row]. extract: what is handed to the
    verifier: auto = the last <answer>...</answer>, without one the final part; tag, text, last_line and last_number (as
    numeric_answer reads it) are what they say. The score is the verifier's, 0 to 1
    (partial credit is below 1). Dropped as `wrong_answer` or `no_answer`; extra `answer` is what was handed over.
    """
    metadata = sample.row.get("metadata") or {}
    name = task or (metadata.get("source_dataset") if isinstance(metadata, dict) else None)
    if not name:
        raise DataError(
            f"prompt {sample.prompt_id} does not tell its reasoning-gym task",
            hint="use `prompts: {reasoning_gym: ...}`, or give the filter `task`",
        )
    try:
        scorer = _scorer(name)
    except ValueError as error:
        raise DataError(
            f"reasoning-gym has no task `{name}`", hint="`task` must be one of its dataset names"
        ) from error
    said = _said(sample.final, extract)
    if not said:
        return Verdict(not drop, 0.0, "no_answer")
    entry = {"question": sample.row.get("question", sample.prompt), "answer": sample.answer, "metadata": metadata}
    score = float(scorer(answer=said, entry=entry))
    extra = {"answer": said} if len(said) <= 100 else {}
    if score >= min_score:
        return Verdict(True, score, None, extra)
    return Verdict(not drop, score, "wrong_answer", extra)
