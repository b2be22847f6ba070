"""majority: keeps samples that agree with most others of their prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from iterative_sft_cli.filters.builtin.last_number import SeveralAnswers, last_number
from iterative_sft_cli.filters.builtin.spec import BuiltIn
from iterative_sft_cli.types import Sample, Verdict


def _check(arguments: Mapping[str, Any]) -> None:
    if not 0 <= arguments.get("min_agree", 0.0) <= 1:
        raise ValueError(f"argument `min_agree` is {arguments['min_agree']}, expected 0 to 1")
    if arguments.get("min_votes", 3) < 1:
        raise ValueError(f"argument `min_votes` is {arguments['min_votes']}, expected at least 1")
    if arguments.get("answer") == "regex":
        from iterative_sft_cli.filters.builtin.regex import compile_pattern

        if not arguments.get("pattern"):
            raise ValueError("`answer: regex` needs `pattern`, with one group")
        compile_pattern(arguments["pattern"], False)
    elif arguments.get("pattern"):
        raise ValueError("`pattern` needs `answer: regex`")


SPEC = BuiltIn(role="selector", cost="reading one answer a sample", check=_check)


def majority(
    group: Sequence[Sample],
    min_agree: float = 0.0,
    min_votes: int = 3,
    answer: Literal["number", "text", "last_line", "regex"] = "number",
    pattern: str | None = None,
    drop: bool = True,
) -> list[Verdict]:
    """Keep samples whose answer is the most frequent one of their prompt; no reference answer is needed (LMSI, TTRL).

    min_agree: share of all the prompt's samples that must give that answer. min_votes: samples with an answer that are
    needed at all. answer: number (as numeric_answer reads it), text (the whole final part, case and space aside),
    last_line, or regex with `pattern` (first group of the last match). The score is the share that gives the sample's
    answer; extras `answer` and `majority`. Dropped as `minority`, `no_answer`, `tie`, `too_few_votes`, `low_agreement`.
    """
    answers = [_read(sample.final, answer, pattern) for sample in group]
    counts = Counter(one for one in answers if one is not None)
    ranked = counts.most_common(2)
    reason = None
    if sum(counts.values()) < min_votes:
        reason = "too_few_votes"
    elif len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
        reason = "tie"
    elif ranked[0][1] < min_agree * len(group):
        reason = "low_agreement"
    verdicts = []
    for said in answers:
        share = counts[said] / len(group) if said is not None else 0.0
        why = reason or ("no_answer" if said is None else None if said == ranked[0][0] else "minority")
        extra = {"answer": said, "majority": ranked[0][0] if ranked and reason is None else None}
        verdicts.append(Verdict(why is None or not drop, share, why, extra))
    return verdicts


def _read(text: str, how: str, pattern: str | None) -> str | None:
    if how == "number":
        try:
            found = last_number(text)
        except SeveralAnswers:
            return None
        return str(found.value) if found is not None else None
    if how == "regex":
        from iterative_sft_cli.filters.builtin.regex import last_match

        return last_match(str(pattern), text)
    said = text.strip().rsplit("\n", 1)[-1] if how == "last_line" else text
    return " ".join(said.casefold().split()).rstrip(".") or None
