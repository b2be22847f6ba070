"""dedup: keeps one of each set of samples that say the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from iterative_sft_cli.filters.builtin.keys import DUPLICATE, KEYS, Level, Scope, normalized
from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn
from iterative_sft_cli.types import Sample, Verdict

Tie = Literal["first", "shortest", "farthest"]


def _check(arguments: Mapping[str, Any]) -> None:
    scope, tie, level = arguments.get("scope", "prompt"), arguments.get("tie", "first"), arguments.get("level", "exact")
    similarity = arguments.get("similarity")
    if similarity is not None and level != "near":
        raise ValueError("`similarity` needs `level: near`")
    if similarity is not None and not 0.5 <= similarity <= 1.0:
        raise ValueError(f"argument `similarity` is {similarity}, expected 0.5 to 1.0")
    if tie != "first" and (scope != "prompt" or level == "near"):
        raise ValueError(f"`tie: {tie}` needs `scope: prompt` and a level other than `near`")
    if arguments.get("across_prompts") and scope == "prompt":
        raise ValueError("`across_prompts: true` needs `scope: round` or `scope: run`")


def _requires(arguments: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    near, farthest = arguments.get("level") == "near", arguments.get("tie") == "farthest"
    needed = (("rapidfuzz", "dedup"),) if near or farthest else ()
    return (*needed, ("datasketch", "dedup")) if near and arguments.get("scope", "prompt") != "prompt" else needed


def _variant(arguments: Mapping[str, Any]) -> Callable[..., Any] | None:
    if arguments.get("scope", "prompt") == "prompt":
        return None
    from iterative_sft_cli.filters.builtin.dedup_round import dedup_round

    return dedup_round


SPEC = BuiltIn(
    role="selector",
    cost="one hash a sample; near: one comparison with each kept sample of the prompt",
    requires_if=_requires,
    prefix_stable=lambda arguments: (
        arguments.get("scope", "prompt") == "prompt" and arguments.get("tie", "first") == "first"
    ),
    check=_check,
    variant=_variant,
)


def dedup(
    group: Sequence[Sample],
    level: Level = "exact",
    scope: Scope = "prompt",
    similarity: float | None = None,
    tie: Tie = "first",
    across_prompts: bool = False,
) -> list[Verdict]:
    """Keep one of each set of completions of a prompt that say the same; the others are dropped as `duplicate`.

    level: exact (outer space aside), normalized (case, space, punctuation), near (`similarity` [0.9] of the normalized
    texts: rapidfuzz inside a prompt, MinHash beyond), equation_list (the calculation steps, as in RFT; texts without
    any by their normalized form), ast (Python code by its syntax tree).
    scope: prompt, round, or run (also against what earlier rounds accepted). The wider two run once a round and compare
    only samples of the same prompt text unless `across_prompts` is true.
    tie: which one stays: the first, the shortest, or the one farthest from the other kept ones (RFT).
    """
    if level == "near":
        return _near(group, 0.9 if similarity is None else similarity)
    make_key = KEYS[level]
    kept: dict[str, int] = {}
    verdicts = [DUPLICATE] * len(group)
    for index, sample in enumerate(group):
        key = make_key(sample.completion)
        if key not in kept:
            kept[key] = index
        elif tie == "shortest" and len(sample.completion) < len(group[kept[key]].completion):
            kept[key] = index
        elif tie == "farthest" and _is_farther(group, index, kept[key], kept.values()):
            kept[key] = index
    for index in kept.values():
        verdicts[index] = KEPT
    return verdicts


def _is_farther(group: Sequence[Sample], new: int, old: int, kept: Any) -> bool:
    from rapidfuzz.distance import Levenshtein

    others = [group[index].completion for index in kept if index != old]
    spread_new = sum(Levenshtein.distance(group[new].completion, other) for other in others)
    spread_old = sum(Levenshtein.distance(group[old].completion, other) for other in others)
    return spread_new > spread_old


def _near(group: Sequence[Sample], similarity: float) -> list[Verdict]:
    from rapidfuzz import fuzz, process

    kept: list[str] = []
    verdicts: list[Verdict] = []
    for sample in group:
        text = normalized(sample.completion)
        if kept and process.extractOne(text, kept, scorer=fuzz.ratio, score_cutoff=similarity * 100) is not None:
            verdicts.append(DUPLICATE)
        else:
            kept.append(text)
            verdicts.append(KEPT)
    return verdicts
