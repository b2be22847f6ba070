"""Warnings: configs that can run, and that published results say will probably disappoint."""

from __future__ import annotations

from collections.abc import Iterator

from iterative_sft_cli.config.rules import values_over
from iterative_sft_cli.config.schema import Config

PARTIAL_CREDIT = frozenset({"reasoning_gym"})
"""Built-ins whose score can lie between 0 and 1 for a wrong answer."""


def warnings(config: Config) -> Iterator[str]:
    """One sentence for each thing to think about again."""
    if not config.filters:
        yield "filters: there are none, so every sample is trained on (simple self-distillation)"
    starts, pools = values_over(config, config.train.start_from), values_over(config, config.train.data)
    if (
        config.rounds > 2
        and set(starts) == {"previous"}
        and set(map(str, pools)) == {"replace"}
        and config.train.mix is None
    ):
        yield (
            f"train.data: replace with start_from: previous over {config.rounds} rounds often collapses, because each round learns "
            "only from the last one; accumulate, mix or start_from: base keep older data in"
        )
    if not any(values_over(config, config.generate.do_sample)):
        for name, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            if getattr(config.generate, name) != neutral:
                yield f"generate.{name} has no effect on greedy decoding (do_sample: false)"
    if config.generate.from_ != "current" and set(starts) == {"previous"}:
        yield "generate.from: samples do not come from the weights that are trained on"
    for entry in config.filters:
        by, low = entry.args.get("by", entry.bare), entry.args.get("min")
        if entry.use == "threshold" and by in PARTIAL_CREDIT and isinstance(low, int | float) and low < 1:
            yield f"{entry.key}: {by} gives part of the score to wrong answers; min: 1 keeps right ones only"
