"""Strings to copy: short ones with their copies, and longer ones to test."""

import json
from pathlib import Path

SEED_DIGITS, SEED_ROWS = 10, 150000
DEV = (9, 22, 50)
START = "$"
"""Before every question, as language models have it: without positional encoding it is what positions can be counted from."""


def prepare(out: Path, kind: str = "copy") -> None:
    """The data of the study; that of reversing is the same with another `kind`."""
    from iterative_sft_cli.recipes.files.self_improve import examples
    from iterative_sft_cli.recipes.tiny_tokenizer import tokenizer_files

    rows = examples(SEED_DIGITS, SEED_ROWS, kind=kind)
    write(out / "seed.jsonl", [{**row, "prompt": START + row["prompt"]} for row in rows])
    write(out / "dev.jsonl", prompts(*DEV, kind=kind, seed=1))
    (out / "char-tokenizer").mkdir(exist_ok=True)
    for name, text in tokenizer_files().items():
        (out / "char-tokenizer" / name).write_text(text)


def prompts(first: int, last: int, per_level: int, kind: str, seed: int = 0) -> list[dict]:
    """Tasks of `first` to `last` digits; `level` is that number."""
    from iterative_sft_cli.recipes.files.self_improve import make

    return [{**row, "question": START + row["question"]} for row in make(first, last, per_level, kind, seed)]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
