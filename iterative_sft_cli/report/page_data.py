"""What the report shows, as plain data: read from a run directory, without a model, in one pass over its small files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from iterative_sft_cli.console import duration
from iterative_sft_cli.report.charts import Chart, Line, funnel_chart, line_chart, stacked_bars
from iterative_sft_cli.report.paging import RoundReader
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.report.sample_text import says_text, whole_prompt
from iterative_sft_cli.report.screen import number
from iterative_sft_cli.report.show import funnel_of
from iterative_sft_cli.samples import StoredSample

SAMPLES_A_ROUND = 20
MAX_SAMPLES = 1000
MAX_STEPS_DRAWN = 400
SHARDS_LOOKED_AT = 4
DIFFICULTY = ("none", "up to 1/4", "up to 1/2", "up to 3/4", "over 3/4", "all")

RATES = (
    ("accepted", "filters/accept_rate"),
    ("prompts solved", "filters/solved_rate"),
    ("cut off", "generate/truncated_rate"),
)
DIVERSITY = (
    ("distinct-1", "filters/distinct_1"),
    ("distinct-2", "filters/distinct_2"),
    ("distinct-4", "filters/distinct_4"),
    ("unique", "filters/unique_rate"),
    ("compression ratio", "filters/compression_ratio"),
    ("known from earlier rounds", "filters/known_rate"),
)
LENGTHS = (
    ("generated", "generate/mean_tokens"),
    ("accepted", "filters/mean_accepted_tokens"),
    ("95th percentile", "generate/p95_tokens"),
)
STEP = "optimizer step"
PHASES = ("generate", "filters", "train", "eval", "save", "other")


def curves(stats: Sequence[dict[str, Any]], wanted: Sequence[tuple[str, str]]) -> list[Line]:
    """A curve over rounds for every named figure that exists."""
    lines = []
    for name, key in wanted:
        points = [(float(row["round"]), row.get(key)) for row in stats]
        if any(value is not None for _, value in points):
            band = [
                (float(row["round"]), float(row[f"{key}_low"]), float(row[f"{key}_high"]))
                for row in stats
                if row.get(f"{key}_low") is not None and row.get(f"{key}_high") is not None
            ]
            lines.append(Line(name, points, band))
    return lines


def eval_keys(stats: Sequence[dict[str, Any]], metric: str) -> list[tuple[str, str]]:
    """The figures of the evaluations, the one that defines `best` first."""
    found = dict.fromkeys(
        key
        for row in stats
        for key in row
        if key.startswith("eval/")
        and ("@" in key or key == "eval/greedy")
        and not key.endswith(("_low", "_high"))
        and not key.startswith("eval/level/")
    )
    ordered = [metric, *(key for key in found if key != metric)] if metric in found else list(found)
    return [(key.removeprefix("eval/"), key) for key in ordered[:8]]


def panels(run: Run) -> list[dict[str, Any]]:
    """The charts, each with a title and what it means."""
    stats = run.stats
    rounds = [row for row in stats if row["round"] > 0]
    made: list[dict[str, Any]] = []

    def add(title: str, chart: Chart | None, note: str = "") -> None:
        if chart:
            made.append({"title": title, "chart": chart, "note": note})

    held_out = curves(stats, eval_keys(stats, run.metric))
    add(
        "Held-out accuracy",
        line_chart(held_out, what="evaluation by round", y_name="share of answers that are right", share=True),
        "bands: 95 % over prompts",
    )
    add(
        "Accepted",
        line_chart(curves(rounds, RATES), what="shares by round", y_name="share", share=True),
        "shares of samples, and of prompts",
    )
    add("Why samples were dropped", reasons_chart(rounds), "samples a round, by filter and reason")
    add("Difficulty", difficulty_chart(rounds), "prompts by the share of their samples that was accepted")
    add(
        "Diversity of what was accepted",
        line_chart(curves(rounds, DIVERSITY), what="diversity by round", y_name="share", share=True),
        "all of them falling together is a sign of collapse",
    )
    entropy = curves(rounds, (("negative log-likelihood", "generate/token_nll"),))
    add(
        "Certainty",
        line_chart(entropy, what="entropy by round", y_name="nats a token"),
        "low: the model hardly varies any more",
    )
    add("Length", line_chart(curves(rounds, LENGTHS), what="tokens by round", y_name="tokens a completion"))
    loss, rate = step_curves(run)
    add(
        "Training loss",
        line_chart([loss], what="loss by step", y_name="nats a token", x_name=STEP),
        f"at most {MAX_STEPS_DRAWN} steps of all rounds",
    )
    add("Learning rate", line_chart([rate], what="learning rate by step", y_name="learning rate", x_name=STEP))
    seed_loss = curves(stats, (("loss on seed data", "train/seed_loss"),))
    add(
        "Forgetting",
        line_chart(seed_loss, what="seed loss by round", y_name="nats a token"),
        "loss on seed rows after the round",
    )
    add("Time", time_chart(run), "seconds of work by phase")
    return made


def reasons_chart(rounds: Sequence[dict[str, Any]]) -> Chart | None:
    """How many samples each reason dropped, a bar a round; rare reasons together."""
    totals: Counter[str] = Counter()
    by_round: list[tuple[float, Counter[str]]] = []
    for row in rounds:
        counts = Counter(
            {f"{one['filter']}: {reason}": n for one in funnel_of(row) for reason, n in one["reasons"].items()}
        )
        by_round.append((row["round"], counts))
        totals.update(counts)
    names = [name for name, _ in totals.most_common(7)]
    rest = len(totals) > len(names)
    columns = [
        (
            column,
            [counts[name] for name in names] + ([sum(counts.values()) - sum(counts[n] for n in names)] if rest else []),
        )
        for column, counts in by_round
    ]
    names += ["other reasons"] if rest else []
    return stacked_bars(columns, names, what="reasons by round", y_name="samples")


def difficulty_chart(rounds: Sequence[dict[str, Any]]) -> Chart | None:
    """The histogram of prompts by their share of accepted samples, a bar a round."""
    columns = [(row["round"], row["filters/difficulty"]) for row in rounds if row.get("filters/difficulty")]
    return stacked_bars(columns, DIFFICULTY, what="difficulty by round", y_name="prompts")


def step_curves(run: Run) -> tuple[Line, Line]:
    """Loss and learning rate of every optimizer step, thinned out where there are many."""
    steps = [row for row in run.view.ledger_rows() if row.get("event") == "step"]
    every = max(1, len(steps) // MAX_STEPS_DRAWN)
    numbered = [(float(i), row) for i, row in enumerate(steps, 1)][::every]
    loss = Line("loss", [(i, row.get("loss")) for i, row in numbered])
    return loss, Line("learning rate", [(i, row.get("learning_rate")) for i, row in numbered])


def phase_seconds(run: Run) -> dict[int, dict[str, float]]:
    """Seconds of work by round and phase, from telemetry."""
    found: dict[int, dict[str, float]] = {}
    for row in run.view.telemetry_rows():
        seconds = row.get("seconds")
        if not isinstance(seconds, int | float):
            continue
        key = str(row.get("key", ""))[:4]
        index = row.get("round", int(key) if key.isdigit() else None)
        if isinstance(index, int):
            phase = row["event"] if row.get("event") in PHASES else "other"
            found.setdefault(index, dict.fromkeys(PHASES, 0.0))[phase] += float(seconds)
    return dict(sorted(found.items()))


def time_chart(run: Run) -> Chart | None:
    """Seconds by phase, a bar a round."""
    columns = [(index, [counts[name] for name in PHASES]) for index, counts in phase_seconds(run).items()]
    return stacked_bars(columns, PHASES, what="seconds by round and phase", y_name="seconds")


def cost_rows(run: Run) -> list[tuple[str, ...]]:
    """The cost of every round: samples, tokens, steps, seconds, speed."""
    seconds = phase_seconds(run)
    rows: list[tuple[str, ...]] = []
    for row in run.stats:
        spent = seconds.get(row["round"], dict.fromkeys(PHASES, 0.0))
        made, trained = row.get("generate/num_tokens"), row.get("train/num_tokens")
        rows.append(
            (
                str(row["round"]),
                number(row.get("generate/num_samples")),
                number(made),
                speed(made, spent["generate"]),
                number(row.get("train/num_steps")),
                number(trained),
                speed(trained, spent["train"]),
                duration(sum(spent.values())),
            )
        )
    return rows


def speed(tokens: int | None, seconds: float) -> str:
    """Tokens a second."""
    return f"{tokens / seconds:,.0f}" if tokens and seconds > 0 else "-"


def funnels(run: Run) -> list[dict[str, Any]]:
    """The funnel of every round, the newest first."""
    made = []
    for row in reversed(run.stats):
        found = funnel_of(row)
        if found:
            bars = [(one["filter"], one["entered"], one["entered"] - one["dropped"]) for one in found]
            made.append(
                {
                    "round": row["round"],
                    "chart": funnel_chart(bars, f"funnel of round {row['round']}"),
                    "filters": found,
                }
            )
    return made


def pick_samples(run: Run, index: int, most: int) -> list[StoredSample]:
    """Some samples of a round: about two of five accepted, of the rejected every reason in turn; from shards spread over the round."""
    reader = RoundReader(run.view, index)
    names = reader.judged
    looked_at = [names[i * len(names) // SHARDS_LOOKED_AT] for i in range(SHARDS_LOOKED_AT)] if names else []
    accepted: list[tuple[str, int, list[dict[str, Any]]]] = []
    by_reason: dict[str, list[tuple[str, int, list[dict[str, Any]]]]] = {}
    for name in dict.fromkeys(looked_at):
        for position, _, says, kept in reader.says(name):
            if kept:
                accepted.append((name, position, says))
            else:
                dropped = next(one for one in says if not one["keep"])
                by_reason.setdefault(f"{dropped['filter']} {dropped.get('reason')}", []).append((name, position, says))
    rejected = [one for turn in _turns(list(by_reason.values())) for one in turn]
    wanted = max(most * 2 // 5, most - len(rejected))
    chosen = [(one, True) for one in _spread(accepted, wanted)]
    chosen += [(one, False) for one in rejected[: most - len(chosen)]]
    lines = {name: reader.generated(name) for name in {one[0] for one, _ in chosen}}
    return [reader.stored(lines[name], position, says, kept) for (name, position, says), kept in chosen]


def _turns(groups: list[list[Any]]) -> Iterator[list[Any]]:
    for place in range(max((len(group) for group in groups), default=0)):
        yield [group[place] for group in groups if place < len(group)]


def _spread(items: list[Any], most: int) -> list[Any]:
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)] if count else []


def sample_cards(run: Run, limit: int) -> list[dict[str, Any]]:
    """The samples of every round, newest round first; texts are cut to `limit` characters."""
    rounds = run.rounds
    each = min(SAMPLES_A_ROUND, max(4, MAX_SAMPLES // max(1, len(rounds))))
    cards = []
    for index in reversed(rounds):
        for stored in pick_samples(run, index, each):
            sample = stored.sample
            cards.append(
                {
                    "id": sample.sample_id,
                    "round": index,
                    "accepted": stored.accepted,
                    "hinted": stored.hinted,
                    "prompt": cut(whole_prompt(sample.prompt), limit),
                    "answer": None if sample.answer is None else cut(str(sample.answer), 200),
                    "completion": cut(sample.completion, limit),
                    "tokens": len(sample.completion_ids),
                    "finish": sample.finish_reason,
                    "says": [(one["filter"], cut(says_text(one), 300)) for one in stored.says],
                }
            )
    return cards


def cut(text: str, limit: int) -> str:
    """At most `limit` characters, saying how many are left out."""
    return text if len(text) <= limit else f"{text[:limit]} [... {len(text) - limit} more]"


def figures(run: Run) -> list[tuple[str, list[str]]]:
    """Every figure of the statistics, a row a figure and a column a round."""
    stats = run.stats
    keys = dict.fromkeys(key for row in stats for key in row if key != "round")
    return [(key, [figure(row.get(key)) for row in stats]) for key in keys]


def figure(value: Any) -> str:
    """One figure in the table of all of them."""
    return json.dumps(value) if isinstance(value, list | dict) else number(value, 4)
