"""Four filters, one of each shape."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Sequence
from typing import Any

from iterative_sft_cli import Sample, Verdict

POLITE = ("please", "thank", "welcome", "sorry")


def politeness(sample: Sample, words: list[str] | None = None) -> float:
    """Score a completion by the share of polite words in it. Follow it with `threshold`."""
    wanted = words or POLITE
    said = sample.final.casefold().split()
    return sum(any(word in one for word in wanted) for one in said) / max(1, len(said))


politeness.role = "scorer"  # type: ignore[attr-defined]


def first_is_longest(group: Sequence[Sample], slack: int = 0) -> list[Verdict]:
    """Keep a prompt's samples that are at most `slack` characters longer than its first one."""
    limit = len(group[0].completion) + slack
    return [Verdict(len(one.completion) <= limit, reason="longer_than_first") for one in group]


first_is_longest.prefix_stable = True  # type: ignore[attr-defined]


class Quota:
    """Keep a random `n` samples of the round, drawn from the round's own generator."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, samples: Sequence[Sample], context: Any) -> list[Verdict]:
        drawn = set(context.rng.sample(range(len(samples)), min(self.n, len(samples))))
        return [Verdict(index in drawn, reason="over_quota") for index in range(len(samples))]


class ApiGrader:
    """Score a completion with a grader behind HTTP, whose key stands in the environment variable GRADER_KEY.

    Use it in the long form, `{use: api_grader, args: {url: ...}, env: [GRADER_KEY], timeout_s: 10, on_error: retry}`.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def setup(self) -> None:
        """The key is read once a worker; a missing one is an error before the first sample."""
        self.key = os.environ["GRADER_KEY"]

    def __call__(self, sample: Sample) -> Verdict:
        body = json.dumps({"text": sample.final}).encode()
        request = urllib.request.Request(self.url, body, {"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=5) as response:
            answer = json.load(response)
        return Verdict(answer["score"] >= 0.5, float(answer["score"]), "graded_low")
