"""`isft report`: one HTML file that needs nothing else, not even a network, and that no text of a run can change.

jinja2 escapes every value, control characters are made visible first, and the page's policy allows its own style and scripts
by their hashes and nothing more. Charts are drawn in the page, by uPlot.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from iterative_sft_cli import __version__
from iterative_sft_cli.alarms import alarms
from iterative_sft_cli.console import duration, round_cells, safe_text
from iterative_sft_cli.report.lineage import describe
from iterative_sft_cli.report.page_data import cost_rows, figures, funnels, panels, phase_seconds, sample_cards
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.report.runs import short_model
from iterative_sft_cli.report.screen import number
from iterative_sft_cli.report.show import summary

PAGE = Path(__file__).parent / "page"
MAX_BYTES = 950_000
"""The page stays below this: texts of samples are cut shorter until it does."""
TEXT_LIMITS = (900, 400, 160, 60)
MAX_CONFIG = 60_000
ROUND_HEADS = ("prompts", "samples", "accepted", "rate", "unique", "tokens", "loss")


def render(run: Run) -> str:
    """The page. Its samples are cut as far as the size asks for."""
    page = ""
    for limit in TEXT_LIMITS:
        page = _template().render(**content(run, limit))
        if len(page.encode("utf-8")) <= MAX_BYTES:
            break
    return page


def write_report(run: Run, out: Path) -> int:
    """Write the page to `out`, whole or not at all; returns its size in bytes."""
    data = render(run).encode("utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = out.with_name(f".{out.name}.part")
    temp.write_bytes(data)
    temp.replace(out)
    return len(data)


def content(run: Run, limit: int) -> dict[str, Any]:
    """The values of the template; `limit` cuts the texts of samples."""
    found = summary(run)
    style, scripts = sources()
    samples = sample_cards(run, limit)
    stats = run.stats
    source = run.view.config_source.decode("utf-8", "replace")
    return {
        "name": run.path.name if run.path.name != "run" else f"{run.path.parent.name}/run",
        "policy": policy(style, scripts),
        "style": Markup(style),
        "scripts": [Markup(script) for script in scripts],
        "status": found["status"],
        "model": short_model(found["model"]),
        "seed": run.settings.seed,
        "facts": facts(run, found),
        "warnings": [f"round {stats[-1]['round']}: {text}" for text in alarms(stats)] if stats else [],
        "rounds_head": [*ROUND_HEADS, found["metric"].removeprefix("eval/") + " (95 %)"],
        "rounds": [round_cells(row, found["metric"]) for row in stats],
        "lineage": [describe(row) for row in found["lineage"]],
        "panels": panels(run),
        "funnels": funnels(run),
        "samples": samples,
        "sample_rounds": sorted({one["round"] for one in samples}),
        "cost": cost_rows(run),
        "figures": figures(run),
        "stats_rounds": [row["round"] for row in stats],
        "config": source[:MAX_CONFIG],
        "resolved": json.dumps(run.config, indent=1)[:MAX_CONFIG],
        "environment": json.dumps(
            {key: value for key, value in run.view.environment.items() if key != "config_dir"}, indent=1, sort_keys=True
        )[:MAX_CONFIG],
        "version": __version__,
    }


def facts(run: Run, found: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers at the head of the page."""
    stats, metric = run.stats, found["metric"]
    name = metric.removeprefix("eval/")
    made = []
    known = [row for row in stats if row.get(metric) is not None]
    best = next((row for row in known if row["round"] == found["best_round"]), None)
    if best is not None:
        where = "starting model" if best["round"] == 0 else f"round {best['round']}"
        made.append((number(best[metric]), f"best {name} ({where})"))
        made.append((number(known[0][metric]), f"{name} at the start"))
    made.append((number(sum(int(row.get("filters/num_accepted", 0)) for row in stats)), "accepted samples"))
    made.append((number(sum(int(row.get("generate/num_tokens", 0)) for row in stats)), "generated tokens"))
    made.append((number(sum(int(row.get("train/num_steps", 0)) for row in stats)), "optimizer steps"))
    seconds = sum(sum(counts.values()) for counts in phase_seconds(run).values())
    made.append((duration(seconds), "of work"))
    return made


def sources() -> tuple[str, list[str]]:
    """The page's style and its scripts: uPlot with its licence, then what draws with it and what searches."""
    library = PAGE / "uplot"
    licence = (library / "LICENSE").read_text("utf-8").strip()
    scripts = [f"/*! {licence} */\n" + (library / "uPlot.iife.min.js").read_text("utf-8")]
    scripts += [(PAGE / name).read_text("utf-8") for name in ("charts.js", "page.js")]
    return (library / "uPlot.min.css").read_text("utf-8") + "\n" + (PAGE / "page.css").read_text("utf-8"), scripts


def policy(style: str, scripts: Sequence[str]) -> str:
    """The content-security policy: this style, these scripts, nothing else from anywhere."""
    allowed = " ".join(f"'{_hash(script)}'" for script in scripts)
    return f"default-src 'none'; style-src '{_hash(style)}'; script-src {allowed}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _visible(value: Any) -> Any:
    """Every value on its way into the page: characters that could mislead a reader are written out."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else safe_text(value)


def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, finalize=_visible, trim_blocks=False
    )
    return environment.get_template("page.html.j2")
