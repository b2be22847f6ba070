"""`isft ask`: one question to the starting model and to a checkpoint, in the run's own template and decoding, side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from iterative_sft_cli.console import safe_text
from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.report.export_model import choose_checkpoint
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.report.workbench import open_bench


def ask(run: Run, text: str, *, checkpoint: str | None, num_samples: int, greedy: bool) -> dict[str, Any]:
    """Both models' answers. Raises ConfigError for an empty question, DataError when there is no checkpoint."""
    if not text.strip():
        raise ConfigError("there is nothing to ask", expected="a text")
    if num_samples < 1:
        raise ConfigError(f"--samples {num_samples}: expected at least 1")
    chosen = choose_checkpoint(run, checkpoint)
    config = run.settings
    bench = open_bench(config, run.base_dir)
    encoder = bench.eval_encoder
    ids = encoder.eos_token_ids
    if config.eval is not None:
        decoding = config.eval_decoding(eos_token_ids=ids)
    else:
        decoding = config.at_round(1).generate.decoding(eos_token_ids=ids)
    if greedy:
        decoding, num_samples = replace(decoding, do_sample=False), 1
    answers = {}
    for name, weights in (("base", None), (chosen.key, chosen.path)):
        [made] = bench.complete(
            [text], decoding, weights=weights, num_samples=num_samples, purpose="ask", encoder=encoder
        )
        answers[name] = [
            {"text": bench.text(one), "finish_reason": one.finish_reason, "num_tokens": len(one.token_ids)}
            for one in made
        ]
    return {
        "prompt": text,
        "model": run.model_name,
        "checkpoint": chosen.key,
        "decoding": {"temperature": decoding.temperature, "do_sample": decoding.do_sample, "top_p": decoding.top_p},
        "base": answers["base"],
        "trained": answers[chosen.key],
    }


def print_answers(rich: Any, found: dict[str, Any]) -> None:
    """The answers in two columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, show_lines=True)
    for name in (f"base: {found['model']}", f"checkpoint {found['checkpoint']}"):
        made.add_column(Text(safe_text(name)), overflow="fold", ratio=1)
    for before, after in zip(found["base"], found["trained"], strict=True):
        made.add_row(*(Text(safe_text(shown(one))) for one in (before, after)))
    rich.print(made)


def shown(one: dict[str, Any]) -> str:
    """An answer, and that it was cut off where it was."""
    text = one["text"] or "(empty)"
    return text if one["finish_reason"] != "length" else f"{text} [cut off after {one['num_tokens']} tokens]"
