"""Prompts: where they come from (`load_prompts`), and which of them a round asks (`select_round`). Imports no torch."""

from __future__ import annotations

from iterative_sft_cli.prompts.files import read_rows
from iterative_sft_cli.prompts.load import PromptSet, content_key, load_prompts, read_source
from iterative_sft_cli.prompts.select import PromptHistory, needs_history, num_per_round, select_round

__all__ = [
    "PromptHistory",
    "PromptSet",
    "content_key",
    "load_prompts",
    "needs_history",
    "num_per_round",
    "read_rows",
    "read_source",
    "select_round",
]
