"""Names as data, and the loss of every checkpoint on names that were never trained on."""

import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROMPT = "name:"


def prepare(out: Path) -> None:
    from iterative_sft_cli.recipes.tiny_tokenizer import tokenizer_files

    names = (HERE / "names.txt").read_text().split()
    random.Random(0).shuffle(names)
    write(out / "real.jsonl", [{"prompt": PROMPT, "completion": name} for name in names[:2000]])
    write(out / "held-out.jsonl", [{"prompt": PROMPT, "completion": name} for name in names[2000:]])
    write(out / "prompts.jsonl", [{"prompt": PROMPT}] * 2000)
    (out / "char-tokenizer").mkdir(exist_ok=True)
    for name, text in tokenizer_files().items():
        (out / "char-tokenizer" / name).write_text(text)


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(run_dir: Path, data: Path) -> dict[int, dict[str, float]]:
    """For each round: mean loss a token on held-out names, and the share of distinct names among its samples."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data / "char-tokenizer")
    rows = [json.loads(line) for line in (data / "held-out.jsonl").read_text().splitlines()]
    start = tokenizer(PROMPT)["input_ids"]
    texts = [tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in rows]
    width = max(map(len, texts))
    ids = torch.tensor([start + text + [tokenizer.pad_token_id] * (width - len(text)) for text in texts])
    labels = torch.tensor([[-100] * len(start) + text + [-100] * (width - len(text)) for text in texts])
    found: dict[int, dict[str, float]] = {}
    for folder in sorted((run_dir / "checkpoints").iterdir()):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            loss = model(ids, labels=labels).loss
        found[int(folder.name)] = {"real_loss": float(loss)}
    for round_index in found:
        shards = sorted((run_dir / "rounds" / f"{round_index:04d}").glob("generated-*.jsonl"))
        names = [json.loads(line)["completion"] for shard in shards for line in shard.read_text().splitlines()]
        if names:
            found[round_index]["distinct"] = len(set(names[:2000])) / min(2000, len(names))
    return found
