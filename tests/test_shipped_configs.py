"""Every config that is shipped loads, and those for large machines need what the documentation says."""

from pathlib import Path

import pytest
import yaml

from iterative_sft_cli.cli import run as isft
from iterative_sft_cli.config import load_config
from iterative_sft_cli.report.documents import page

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))


def test_there_are_configs():
    assert {"quickstart.yaml", "quickstart-small.yaml", "gsm8k.yaml", "reasoning-gym.yaml"} <= {p.name for p in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_config_loads(path):
    loaded = load_config(path)
    assert loaded.config.rounds >= 1


QWEN_1_5B = {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
QWEN_1_5B |= {"intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True}
QWEN_32B = {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8}
QWEN_32B |= {"intermediate_size": 27648, "vocab_size": 152064}


@pytest.mark.parametrize(
    ("name", "shape", "machine"),
    [
        ("lora-24gb", QWEN_1_5B, ("--gpus", "1", "--gpu-gb", "24")),
        ("fsdp2-32b", QWEN_32B, ("--gpus", "32", "--gpu-gb", "80")),
    ],
)
def test_the_memory_that_the_documentation_prints(tmp_path, capsys, name, shape, machine):
    """The model is replaced by its shape, which is all that a plan reads of it, and the prompts by one."""
    (config,) = (path for path in CONFIGS if path.stem == name)
    tree = yaml.safe_load(config.read_text())
    model = tree["model"] if isinstance(tree["model"], dict) else {}
    model.pop("path", None)
    tree["model"] = {**model, "init": {"model_type": "llama", **shape}, "tokenizer": "none"}
    tree["prompts"] = {"path": "prompts.jsonl", "prompt": "question", "answer": "answer"}
    tree["train"]["learning_rate"] = float(tree["train"]["learning_rate"])
    (tmp_path / "prompts.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    assert isft(["plan", str(tmp_path / "config.yaml"), *machine]) == 0
    lines = capsys.readouterr().out.splitlines()
    (start,) = (place for place, line in enumerate(lines) if line.startswith("memory of "))
    assert "\n".join(lines[start : start + 4]) in page("several-gpus")
