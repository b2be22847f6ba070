"""Prompts of growing length for self-improving transformers: additions, reversed additions, strings to copy or to reverse.

As prompts:    prompts: {use: data/self_improve.py:make, args: {first: 11, last: 20, per_level: 1000, kind: add}}
As seed data:  python data/self_improve.py --kind add --digits 10 --rows 100000 > data/self_improve_seed.jsonl
"""

import argparse
import json
import random
from typing import Any

KINDS = ("add", "reverse_add", "copy", "reverse")


def task(kind: str, digits: int, rng: random.Random) -> tuple[str, str]:
    """A question whose numbers have `digits` digits, and its answer."""
    first = "".join(rng.choice("0123456789") for _ in range(digits))
    second = "".join(rng.choice("0123456789") for _ in range(digits))
    if kind == "copy":
        return f"{first}=", first
    if kind == "reverse":
        return f"{first}>", first[::-1]
    total = str(int(first) + int(second)).zfill(digits + 1)
    if kind == "reverse_add":
        return f"{first[::-1]}+{second[::-1]}=", total[::-1]
    return f"{first}+{second}=", total


def make(first: int, last: int, per_level: int, kind: str = "add", seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of `per_level` tasks for each number of digits from `first` to `last`; `level` is that number."""
    rows = []
    for digits in range(first, last + 1):
        rng = random.Random(f"{seed}-{kind}-{digits}")
        seen: dict[str, str] = {}
        for _ in range(per_level * 20):
            if len(seen) == per_level:
                break
            question, answer = task(kind, digits, rng)
            seen[question] = answer
        rows += [{"question": q, "answer": a, "level": digits} for q, a in seen.items()]
    return rows


def examples(digits: int, rows: int, kind: str = "add", seed: int = 0) -> list[dict[str, Any]]:
    """Worked examples of 1 to `digits` digits, equally often."""
    rng = random.Random(f"examples-{seed}-{kind}")
    tasks = [task(kind, 1 + i % digits, rng) for i in range(rows)]
    return [{"prompt": question, "completion": answer} for question, answer in tasks]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", default="add", choices=KINDS)
    parser.add_argument("--digits", type=int, default=10)
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    for row in examples(**{k: v for k, v in vars(parser.parse_args()).items()}):
        print(json.dumps(row))
