"""Additions with worked steps as rationales: short ones to start from, and longer ones with nothing but their sums."""

import json
import random
from pathlib import Path

KNOWN_DIGITS, SHOWN_DIGITS, LARGEST_DIGITS = 3, 6, 10
SEED_ROWS, POOL_PER_LEVEL, DEV_PER_LEVEL = 12000, 1200, 50
START = "$"
"""Before every question, as language models have it: without positional encoding it is what positions can be counted from."""
SHOWN, SHOWN_ROWS = 200, 1600
"""Longer additions that are shown as a few-shot prompt shows them: so many different ones a number of digits, and how often in all."""


def prepare(out: Path) -> None:
    from iterative_sft_cli.recipes.tiny_tokenizer import tokenizer_files

    rng = random.Random(0)
    dev = [
        row for digits in range(1, SHOWN_DIGITS + 1) for row in draw(rng, digits, DEV_PER_LEVEL if digits > 1 else 20)
    ]
    taken = {row["question"] for row in dev}
    pool = [
        row
        for digits in range(1, SHOWN_DIGITS + 1)
        for row in draw(rng, digits, POOL_PER_LEVEL if digits > 1 else 60, taken)
    ]
    taken |= {row["question"] for row in pool if row["level"] > KNOWN_DIGITS}
    short = [
        row
        for digits in range(1, KNOWN_DIGITS + 1)
        for row in repeated(draw(rng, digits, known(digits), taken), SEED_ROWS)
    ]
    for digits in range(KNOWN_DIGITS + 1, SHOWN_DIGITS + 1):
        short += repeated(draw(rng, digits, SHOWN, taken), SHOWN_ROWS)
    for digits in range(SHOWN_DIGITS + 1, LARGEST_DIGITS + 1):
        longer = draw(rng, digits, DEV_PER_LEVEL + POOL_PER_LEVEL)
        dev, pool = dev + longer[:DEV_PER_LEVEL], pool + longer[DEV_PER_LEVEL:]
    pool = [row for row in pool if row["level"] > KNOWN_DIGITS]
    write(out / "pool.jsonl", pool)
    write(out / "dev.jsonl", dev)
    plain = [{"prompt": row["question"], "completion": row["steps"]} for row in short]
    # what a hint looks like is known from the start, in every arm: a fresh model has no pretraining to take it from
    hinted = [{"prompt": f"{row['question']}({row['answer']})", "completion": row["steps"]} for row in short]
    write(out / "seed.jsonl", mixed([*plain, *hinted]))
    write(out / "direct-pool.jsonl", mixed([{"prompt": r["question"], "completion": f"#{r['answer']}"} for r in pool]))
    (out / "char-tokenizer").mkdir(exist_ok=True)
    for name, text in tokenizer_files().items():
        (out / "char-tokenizer" / name).write_text(text)


def known(digits: int) -> int:
    """Different additions to learn from, of the 100, 10,000 or 1,000,000 that there are."""
    return min(SEED_ROWS, 6 * 10 ** (2 * digits - 1))


def repeated(rows: list[dict], total: int) -> list[dict]:
    """The rows in turn, `total` in all."""
    return [rows[i % len(rows)] for i in range(total)]


def draw(rng: random.Random, digits: int, rows: int, taken: frozenset[str] | set[str] = frozenset()) -> list[dict]:
    """Different additions of two numbers of `digits` digits, least significant digit first."""
    found: dict[str, dict] = {}
    while len(found) < rows:
        a, b = (rng.randrange(10**digits) for _ in range(2))
        row = addition(a, b, digits)
        if row["question"] not in taken:
            found[row["question"]] = row
    return list(found.values())


def addition(a: int, b: int, digits: int) -> dict:
    """A question, its sum with the least significant digit first, and the steps: one a digit, with what is carried."""
    first, second = str(a).zfill(digits)[::-1], str(b).zfill(digits)[::-1]
    steps, carry = [], 0
    for x, y in zip(first, second, strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total % 10}")
        carry = total // 10
    answer = str(a + b).zfill(digits + 1)[::-1]
    return {
        "question": f"{START}{first}+{second}=",
        "answer": answer,
        "level": digits,
        "steps": ",".join(steps) + f"#{answer}",
    }


def mixed(rows: list[dict]) -> list[dict]:
    random.Random(1).shuffle(rows)
    return rows


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def right(sample) -> bool:
    """What stands behind the last # is the sum, digit by digit."""
    return sample.final.rpartition("#")[2].strip() == sample.answer
