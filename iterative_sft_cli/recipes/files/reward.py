"""A reward to change: how near the last number of an answer is to the right one, from 0 to 1."""

import re
from typing import Any

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def closeness(sample: Any) -> float:
    """1 for the right number, less the further off it is, 0 without a number. A float keeps the sample and scores it."""
    found = NUMBER.findall(sample.final)
    if not found or sample.answer is None:
        return 0.0
    said, right = float(found[-1]), float(sample.answer)
    return max(0.0, 1.0 - abs(said - right) / max(1.0, abs(right)))


def test_closeness() -> None:
    class Sample:
        final, answer = "7+5=12. Answer: 12", "10"

    assert closeness(Sample()) == 0.8
