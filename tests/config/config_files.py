"""Configs that the tests of this folder start from."""

from __future__ import annotations

import textwrap
from pathlib import Path
from unittest import mock

from iterative_sft_cli.config import InvalidConfig, LoadedConfig, availability, load_config

SHORT = """\
model: HuggingFaceTB/SmolLM2-135M-Instruct   # hub id, local folder, or .gguf file
output_dir: runs/addition
rounds: 3
prompts: {path: prompts.jsonl, prompt: question, answer: answer}
generate: {samples_per_prompt: 8, temperature: 1.0, max_new_tokens: 64}
filters:
  - finished                 # ended with EOS, not cut off
  - numeric_answer           # the last number equals `answer`
  - dedup
  - max_per_prompt: 4
train: {start_from: previous, data: accumulate, epochs: 2, learning_rate: 2e-5}
eval: {path: dev.jsonl, samples_per_prompt: 4}
"""


def write(folder: Path, text: str | bytes = SHORT, name: str = "config.yaml") -> Path:
    """A config file with `text`."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
    return path


def read(path: Path, *overrides: str) -> LoadedConfig:
    """A config with the whole schema available, whatever is still refused."""
    with mock.patch.object(availability, "NOT_YET", {}):
        return load_config(path, overrides)


def load(folder: Path, *overrides: str, text: str | bytes = SHORT) -> LoadedConfig:
    """The short config, or `text`, with overrides."""
    return read(write(folder, text), *overrides)


def problems(folder: Path, *overrides: str, text: str | bytes = SHORT) -> list[str]:
    """What is wrong with it, without the folder's name; empty when nothing is."""
    try:
        load(folder, *overrides, text=text)
    except InvalidConfig as error:
        return [line.replace(f"{folder}/", "") for line in error.problems]
    return []
