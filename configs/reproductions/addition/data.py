"""Additions with worked steps, digit by digit from the least significant one: short ones to learn, and longer ones to label."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

STAR = Path(__file__).resolve().parent.parent / "star" / "data.py"
DEV = (5, 12, 50)


def star() -> ModuleType:
    """The study of STaR: the same additions, and the same examples to start from."""
    spec = importlib.util.spec_from_file_location("star_data", STAR)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(out: Path) -> None:
    star().prepare(out)
    rows = prompts(*DEV, seed=1)
    (out / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prompts(first: int, last: int, per_level: int, seed: int = 0) -> list[dict]:
    """Additions of `first` to `last` digits; `level` is that number, `answer` all steps and the sum."""
    import random

    made = star()
    rows = []
    for digits in range(first, last + 1):
        rows += made.draw(random.Random(f"{seed}-{digits}"), digits, per_level)
    return [{"question": row["question"], "answer": row["steps"], "level": row["level"]} for row in rows]
