"""The value of an expression over a sample's scores, for the built-ins that take `by`.

Scores of earlier filters go by name; `logprob`, `logprob_per_token` and `num_tokens` are the sample's own.
"""

from __future__ import annotations

from functools import lru_cache

from iterative_sft_cli.config.expression import Expression, ExpressionError
from iterative_sft_cli.errors import PluginError
from iterative_sft_cli.types import Sample

SAMPLE_FIELDS = ("logprob", "logprob_per_token", "num_tokens")


@lru_cache(maxsize=256)
def expression(text: str) -> Expression:
    """The parsed text. Raises ExpressionError."""
    return Expression(text)


def check_by(text: str) -> Expression:
    """The parsed argument `by`. Raises ValueError when it is not arithmetic over names."""
    try:
        return expression(text)
    except ExpressionError as error:
        raise ValueError(f"argument `by` is {text!r}: {error}") from error


def names_in(text: str) -> tuple[str, ...]:
    """The names that the expression reads; empty when it does not parse."""
    try:
        return tuple(expression(text).names)
    except ExpressionError:
        return ()


def value_of(text: str, sample: Sample) -> float | None:
    """The value for one sample; None when one of its scores is missing. Raises PluginError for one that is not finite."""
    parsed = expression(text)
    values: dict[str, float | None] = {}
    for name in parsed.names:
        score = sample.scores.get(name)
        if score is None and name in SAMPLE_FIELDS:
            score = _own(sample, name)
        if score is None:
            return None
        values[name] = score
    try:
        return parsed(values)
    except ExpressionError as error:
        raise PluginError(f"sample {sample.sample_id}: {error}") from error


def _own(sample: Sample, name: str) -> float | None:
    if name == "num_tokens":
        return float(len(sample.completion_ids))
    if name == "logprob" or sample.logprob is None:
        return sample.logprob
    return sample.logprob / max(1, len(sample.completion_ids))
