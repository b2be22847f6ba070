"""An evaluation of a run as a log that Inspect's viewer opens. Needs the extra `inspect` (inspect-ai), whose own writer makes the file.

One log is one round's evaluation: a sample for each prompt and draw, what each filter said as its score, the run's metric as result.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iterative_sft_cli.console import safe_text
from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.report.export_model import publish
from iterative_sft_cli.report.export_rows import Conversation
from iterative_sft_cli.report.query import SampleQuery, find_samples
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.samples import StoredSample

STARTED = "1970-01-01T00:00:00+00:00"
"""Where the run's telemetry does not say when a round was evaluated."""
STOPS = {"eos": "stop", "stop": "stop", "length": "max_tokens"}


def write_inspect(run: Run, rounds: list[int], out: Path) -> list[str]:
    """Make the folder `out` with `round-0003.eval` for every evaluated round in `rounds`; returns the files' names. Raises ConfigError without
    inspect-ai, DataError without an evaluation."""
    try:
        from inspect_ai.log import write_eval_log
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--to inspect needs {error.name}, which is not installed", hint="pip install 'iterative-sft-cli[inspect]'"
        ) from error
    if not rounds:
        raise DataError("no round of this run is evaluated", where=str(run.path), expected="an `eval` section")
    names = {index: f"round-{index:04d}.eval" for index in rounds}

    def fill(folder: Path) -> None:
        for index, name in names.items():
            write_eval_log(log_of(run, index), str(folder / name), format="eval")

    publish(out, fill)
    return list(names.values())


def log_of(run: Run, index: int) -> Any:
    """One round's evaluation as Inspect's `EvalLog`."""
    from inspect_ai import log as inspect

    settings = run.settings
    section, decoding = settings.eval, settings.eval_decoding()
    row = next((row for row in run.stats if row["round"] == index), {"round": index})
    samples = list(samples_of(run, index))
    made = started(run, index)
    figures = {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    model = model_of(run, index)
    return inspect.EvalLog(
        status="success",
        eval=inspect.EvalSpec(
            created=made,
            task=f"isft {run.path.name}",
            task_id=run.view.run_id,
            run_id=f"{run.view.run_id}-{index}",
            eval_id=f"{run.view.run_id}-{index}",
            dataset=inspect.EvalDataset(
                name=str(section.path or section.dataset or "eval") if section is not None else "eval",
                samples=len({one.id for one in samples}),
                sample_ids=sorted({str(one.id) for one in samples}),
            ),
            model=model,
            model_generate_config=generate_config(decoding),
            config=inspect.EvalConfig(epochs=max((one.epoch for one in samples), default=1)),
            metadata={"round": index, "checkpoint": None if index == 0 else f"{index:04d}"},
        ),
        results=inspect.EvalResults(
            total_samples=len(samples),
            completed_samples=len(samples),
            scores=[
                inspect.EvalScore(
                    name="correct",
                    scorer="isft",
                    metrics={name: inspect.EvalMetric(name=name, value=value) for name, value in numbers.items()},
                )
            ],
        ),
        stats=inspect.EvalStats(started_at=made, completed_at=made),
        samples=samples,
    )


def samples_of(run: Run, index: int) -> Iterator[Any]:
    """The samples of a round's evaluation as Inspect's `EvalSample`; an epoch is a draw of the same prompt."""
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput
    from inspect_ai.scorer import CORRECT, INCORRECT, Score

    talk = Conversation(run)
    model = model_of(run, index)
    drawn: dict[str, int] = {}
    for stored in find_samples(run.view, SampleQuery((index,), evaluation=True)):
        sample = stored.sample
        completion = sound(sample.completion)
        drawn[sample.prompt_id] = drawn.get(sample.prompt_id, 0) + 1
        messages = sound(talk.text(sample.prompt)) if talk.raw else chat(talk.messages(sample.prompt))
        answer = ChatMessageAssistant(content=completion, source="generate")
        before = messages if isinstance(messages, list) else chat([{"role": "user", "content": messages}])
        said = next((one for one in stored.says if not one["keep"]), None)
        yield EvalSample(
            id=sound(sample.prompt_id),
            epoch=drawn[sample.prompt_id],
            input=messages,
            target="" if sample.answer is None else sound(str(sample.answer)),
            messages=[*before, answer],
            output=ModelOutput(
                model=model,
                choices=[ChatCompletionChoice(message=answer, stop_reason=STOPS.get(sample.finish_reason, "unknown"))],
            ),
            scores={
                "correct": Score(
                    value=CORRECT if stored.accepted else INCORRECT,
                    answer=voted(stored),
                    explanation=None
                    if said is None
                    else sound(f"{said['filter']}: {said.get('reason') or 'rejected'}"),
                )
            },
            metadata={
                "sample_id": sound(sample.sample_id),
                "seed": str(stored.seed),
                "logprob": sample.logprob,
                "num_tokens": len(sample.completion_ids),
                "says": sound([dict(one) for one in stored.says]),
            },
        )


def model_of(run: Run, index: int) -> str:
    """How the weights that answered are called in the log."""
    return f"isft/{Path(run.model_name).name}-round-{index}"


def voted(stored: StoredSample) -> str | None:
    """The answer that a verifier found in the completion."""
    found = [one["extra"]["answer"] for one in stored.says if (one.get("extra") or {}).get("answer") is not None]
    return sound(str(found[0])) if found else None


def sound(value: Any) -> Any:
    """The value with lone surrogates written out, which no UTF-8 file can hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {sound(key): sound(item) for key, item in value.items()}
    return [sound(item) for item in value] if isinstance(value, list) else value


def chat(messages: list[dict[str, Any]]) -> list[Any]:
    """Messages in Inspect's classes; a role that it does not know becomes the user's."""
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    kinds = {"system": ChatMessageSystem, "assistant": ChatMessageAssistant}
    return [
        kinds.get(str(one["role"]), ChatMessageUser)(content=sound(str(one.get("content", "")))) for one in messages
    ]


def generate_config(decoding: Any) -> Any:
    """The decoding in Inspect's words."""
    from inspect_ai.model import GenerateConfig

    return GenerateConfig(
        temperature=float(decoding.temperature) if decoding.do_sample else 0.0,
        top_p=float(decoding.top_p),
        top_k=int(decoding.top_k) or None,
        max_tokens=int(decoding.max_new_tokens),
        stop_seqs=list(decoding.stop) or None,
    )


def started(run: Run, index: int) -> str:
    """When the round's evaluation ended, by the telemetry."""
    times = [
        float(row["time"])
        for row in run.view.telemetry_rows()
        if row.get("event") == "eval" and row.get("round") == index and isinstance(row.get("time"), int | float)
    ]
    return safe_text(datetime.datetime.fromtimestamp(times[-1], datetime.UTC).isoformat()) if times else STARTED
