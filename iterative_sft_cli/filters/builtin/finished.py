"""finished: keeps completions that ended by themselves."""

from __future__ import annotations

from iterative_sft_cli.filters.builtin.spec import KEPT, BuiltIn
from iterative_sft_cli.types import EOS, LENGTH, STOP, Sample, Verdict

SPEC = BuiltIn(role="verifier", cost="nothing")
_CUT = Verdict(False, None, "truncated")


def finished(sample: Sample, allow_stop: bool = True) -> Verdict:
    """Keep a completion that ended with the model's end-of-sequence token (or a `stop` string), not one cut off.

    allow_stop: whether a completed stop string counts as an end. Dropped as `truncated` or `stop_string`.
    In `eval` an unfinished answer counts as wrong.
    """
    reason = sample.finish_reason
    if reason == EOS or (allow_stop and reason == STOP):
        return KEPT
    if reason == LENGTH:
        return _CUT
    return Verdict(False, None, "stop_string" if reason == STOP else "unfinished")
