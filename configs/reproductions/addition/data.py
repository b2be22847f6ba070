"""Additions with reversed digits: short ones with their sums, and longer ones to test."""

import json
from pathlib import Path

KIND = "reverse_add"
SEED_DIGITS, SEED_ROWS = 4, 60000
DEV = (3, 9, 48)


def prepare(out: Path) -> None:
    from iterative_sft_cli.recipes.files.self_improve import examples, make
    from iterative_sft_cli.recipes.tiny_tokenizer import tokenizer_files

    write(out / "seed.jsonl", examples(SEED_DIGITS, SEED_ROWS, kind=KIND))
    write(out / "dev.jsonl", make(*DEV, kind=KIND, seed=1))
    (out / "char-tokenizer").mkdir(exist_ok=True)
    for name, text in tokenizer_files().items():
        (out / "char-tokenizer" / name).write_text(text)


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
