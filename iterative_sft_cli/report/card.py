"""The model card of an exported model: what it was made from, how, and how it was evaluated; everything from the run directory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from iterative_sft_cli import __version__
from iterative_sft_cli.console import one_line, safe_text
from iterative_sft_cli.report.lineage import describe, lineage
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.report.screen import number


def model_card(run: Run, key: str, *, adapter: bool) -> str:
    """README.md for checkpoint `key`."""
    index = int(key.partition("-")[0])
    stats = [row for row in run.stats if row["round"] <= index]
    settings, environment = run.settings, run.view.environment
    metric = run.metric
    hub_id = base_on_hub(run)
    base = cell(hub_id or Path(run.model_name).name)
    filters = ", ".join(f"`{cell(entry.name)}`" for entry in settings.filters) or "none"
    lines = [
        "---",
        *([f"base_model: {json.dumps(hub_id)}"] if hub_id else []),
        f"library_name: {'peft' if adapter else 'transformers'}",
        "tags: [isft, iterative-sft]",
        "---",
        "",
        f"# {cell(run.path.parent.name if run.path.name == 'run' else run.path.name)}",
        "",
        f"{base}, trained in {index} rounds of generate, filter, train by isft {__version__}"
        f"{' (an adapter)' if adapter else ''}. Checkpoint {key}.",
        "",
        "## Evaluation",
        "",
        *evaluation(stats, metric),
        "",
        "## How it was made",
        "",
        *(f"- {cell(describe(row))}" for row in lineage(run.view, settings) if row["round"] <= index),
        "",
        f"A sample was trained on when these filters kept it, in this order: {filters}.",
        "",
        "| what | content hash (sha256) |",
        "|---|---|",
        *(
            f"| {name} | `{cell(environment.get(name))}` |"
            for name in ("model", "prompts", "eval")
            if environment.get(name)
        ),
        "",
        "## Decoding",
        "",
        f"Completions were drawn with {decoding(settings)}."
        + (f" Stop strings: {cell(settings.generate.stop)}." if settings.generate.stop else ""),
        "",
    ]
    return "\n".join(lines)


def base_on_hub(run: Run) -> str | None:
    """The hub id of the base model; None for a local folder, whose path is nobody's business."""
    name = run.settings.model.path or ""
    local = any((root / name).exists() for root in (run.base_dir, Path()))
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not local else None


def evaluation(stats: list[dict[str, Any]], metric: str) -> list[str]:
    """The table of rounds."""
    known = [row for row in stats if row.get(metric) is not None]
    if not known:
        return ["Not evaluated."]
    name = metric.removeprefix("eval/")
    lines = [f"| round | {name} (95 % interval) | accepted samples |", "|---|---|---|"]
    for row in known:
        low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
        interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        accepted = number(row.get("filters/num_accepted"))
        lines.append(f"| {row['round']} | {row[metric]:.3f}{interval} | {accepted} |")
    return [*lines, "", f"{known[0].get('eval/num_prompts')} held-out prompts, never trained on."]


def decoding(settings: Any) -> str:
    """How the samples were drawn, in round 1."""
    at = settings.at_round(1).generate
    return (
        f"temperature {at.temperature:g}, top_p {at.top_p:g}, top_k {at.top_k}, at most {at.max_new_tokens} new tokens"
    )


def cell(value: object) -> str:
    """A text that cannot break out of its line, cell or code span."""
    text = safe_text(one_line(value, 400))
    return text.replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
