"""The small data sets that recipes start with: additions with worked steps, drawn without overlap and always the same.

They stand in for a paper's data until yours are there; a tiny fresh model learns them in minutes on a CPU.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any

from iterative_sft_cli.recipes.files import self_improve
from iterative_sft_cli.recipes.tiny_tokenizer import tokenizer_files

NUM_TRAIN, NUM_DEV, NUM_SEED = 200, 64, 120
LARGEST = 20


def question(a: int, b: int) -> str:
    """What is asked."""
    return f"{a}+{b}=?"


def worked(a: int, b: int, *, tens_first: bool = False) -> str:
    """A solution in three steps, in one of two orders."""
    ones, tens = (a % 10, b % 10), (a - a % 10, b - b % 10)
    parts = [f"{ones[0]}+{ones[1]}={sum(ones)}", f"{tens[0]}+{tens[1]}={sum(tens)}"]
    totals = [sum(ones), sum(tens)]
    if tens_first:
        parts.reverse()
        totals.reverse()
    return f"{parts[0]}, {parts[1]}, {totals[0]}+{totals[1]}={a + b}. Answer: {a + b}"


def pairs() -> list[tuple[int, int]]:
    """All pairs below `LARGEST`, shuffled, always in the same order."""
    found = [(a, b) for a in range(LARGEST) for b in range(LARGEST)]
    random.Random(0).shuffle(found)
    return found


def train() -> list[dict[str, Any]]:
    """Prompts to train on, easy to hard in `level` (digits of both numbers)."""
    return [_asked(a, b) for a, b in pairs()[:NUM_TRAIN]]


def dev() -> list[dict[str, Any]]:
    """Prompts that are never trained on."""
    return [_asked(a, b) for a, b in pairs()[NUM_TRAIN : NUM_TRAIN + NUM_DEV]]


def seed() -> list[dict[str, Any]]:
    """Worked examples: what a pretrained or supervised model would know already."""
    rng = random.Random(1)
    rows = pairs()[NUM_TRAIN + NUM_DEV : NUM_TRAIN + NUM_DEV + NUM_SEED]
    return [{"prompt": question(a, b), "completion": worked(a, b, tens_first=rng.random() < 0.5)} for a, b in rows]


def few_shot() -> list[dict[str, Any]]:
    """Four worked examples that stand before every prompt."""
    return [{"prompt": question(a, b), "completion": worked(a, b)} for a, b in pairs()[-4:]]


def few_shot_direct() -> list[dict[str, Any]]:
    """The same four with nothing but the answer."""
    return [{"prompt": question(a, b), "completion": f"Answer: {a + b}"} for a, b in pairs()[-4:]]


def few_shot_hint() -> list[dict[str, Any]]:
    """The same four with the answer in the prompt, as rationalization shows it."""
    return [{"prompt": f"{question(a, b)} ({a + b})", "completion": worked(a, b)} for a, b in pairs()[-4:]]


def _asked(a: int, b: int) -> dict[str, Any]:
    return {"question": question(a, b), "answer": str(a + b), "level": len(str(a)) + len(str(b))}


def jsonl(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as the text of a .jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _own(name: str) -> str:
    """The text of a plug-in that is shipped with the recipes."""
    return (resources.files("iterative_sft_cli.recipes") / "files" / name).read_text(encoding="utf-8")


FILES: dict[str, Callable[[], str]] = {
    "data/train.jsonl": lambda: jsonl(train()),
    "data/dev.jsonl": lambda: jsonl(dev()),
    "data/seed.jsonl": lambda: jsonl(seed()),
    "data/few_shot.jsonl": lambda: jsonl(few_shot()),
    "data/few_shot_direct.jsonl": lambda: jsonl(few_shot_direct()),
    "data/few_shot_hint.jsonl": lambda: jsonl(few_shot_hint()),
    "data/self_improve_seed.jsonl": lambda: jsonl(self_improve.examples(10, 2000)),
    "data/self_improve_dev.jsonl": lambda: jsonl(self_improve.make(11, 14, 8, seed=1)),
    "data/copy_seed.jsonl": lambda: jsonl(self_improve.examples(5, 1500, kind="copy")),
    "data/copy_dev.jsonl": lambda: jsonl(self_improve.make(5, 11, 16, kind="copy", seed=1)),
    "data/reward.py": lambda: _own("reward.py"),
    "data/raft_pp.py": lambda: _own("raft_pp.py"),
    "data/token_distill.py": lambda: _own("token_distill.py"),
    "data/tree_search.py": lambda: _own("tree_search.py"),
    "data/self_improve.py": lambda: _own("self_improve.py"),
    **{f"data/char-tokenizer/{name}": (lambda text=text: text) for name, text in tokenizer_files().items()},  # type: ignore[misc]
}
"""Every file that a template may name, and what makes its text."""
