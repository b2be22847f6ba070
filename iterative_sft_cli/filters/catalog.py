"""What `isft filters` shows: the filters there are, what one of them does, and what it says of stored samples.

Plug-ins are looked into by a worker, never imported here; texts come back as they are, escaping is the screen's.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iterative_sft_cli.errors import ConfigError, DataError, IsftError
from iterative_sft_cli.filters.builtin import NAMES, load_builtin
from iterative_sft_cli.filters.contract import Outcome, Shape, inspect_filter
from iterative_sft_cli.filters.plugins import describe_plugin
from iterative_sft_cli.filters.resolve import distribution_of, entry_points, locate, resolve_filters
from iterative_sft_cli.filters.resolved import ResolvedFilter
from iterative_sft_cli.filters.runtime import Runtime
from iterative_sft_cli.types import EOS, Sample

if TYPE_CHECKING:
    from iterative_sft_cli.config import FilterEntry

MAX_LINE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Listed:
    """A line of `isft filters list`. `source` is "built-in" or the distribution with its version; `kind` is None for
    a plug-in, which is not imported to be listed; `summary` is the first sentence of a built-in's documentation."""

    name: str
    kind: str | None
    role: str | None
    source: str
    place: str
    summary: str

    def to_row(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "name": self.name,
            "kind": self.kind,
            "role": self.role,
            "source": self.source,
            "place": self.place,
            "summary": self.summary,
        }


def list_filters() -> list[Listed]:
    """Built-in and installed filters by name; a name that clashes appears once for each owner."""
    rows = []
    for name in NAMES:
        target, spec = load_builtin(name)
        summary = (inspect.getdoc(target) or "").split("\n\n")[0].replace("\n", " ")
        rows.append(Listed(name, inspect_filter(target).kind, spec.role, "built-in", target.__module__, summary))
    for point in entry_points():
        rows.append(Listed(point.name, None, None, distribution_of(point) or "installed", point.value, ""))
    return sorted(rows, key=lambda row: (row.name, row.source))


def show_filter(use: str, *, base_dir: Path) -> str:
    """Kind, arguments, documentation and cost of a filter. Raises ConfigError when it is not found, PluginError when it
    cannot be imported."""
    place = locate(use, base_dir=base_dir, installed=entry_points())
    if place is None:
        target, spec = load_builtin(use)
        shape = inspect_filter(target)
        lines = [f"{use}: built-in, {spec.role}, looks at {_looks_at(shape)}"]
        lines += ["", *(inspect.getdoc(target) or "").splitlines(), "", *_arguments(shape)]
        lines.append(f"cost: {spec.cost}")
        if spec.requires:
            lines.append("needs: " + ", ".join(f"iterative-sft-cli[{extra}]" for _, extra in spec.requires))
        if spec.honours:
            lines.append(f"long form: {', '.join(spec.honours)}")
        return "\n".join(lines)
    location, distribution = place
    told = describe_plugin(location, [{"args": {}, "bare": None}], env=(), timeout_s=60.0, distribution=distribution)
    shape = Shape.from_row(told["shape"])
    where = distribution or ("a file" if location.path else "an importable module")
    lines = [f"{use}: {location} ({where}), looks at {_looks_at(shape)}"]
    lines += ["", *inspect.cleandoc(told["doc"] or "It has no documentation.").splitlines(), "", *_arguments(shape)]
    runs = "in the main process (it declares in_process)" if told["declares"]["in_process"] else "in worker processes"
    lines.append(f"runs: {runs}")
    return "\n".join(lines)


def builtin_reference() -> Iterator[str]:
    """The built-ins as a page of the documentation shows them: what each keeps, its arguments with defaults, its cost."""
    for name in NAMES:
        target, spec = load_builtin(name)
        shape = inspect_filter(target)
        yield f"### `{name}`"
        yield ""
        yield f"A {spec.role}; looks at {_looks_at(shape)}. Cost: {spec.cost}."
        yield ""
        for block in (inspect.getdoc(target) or "").split("\n\n"):
            yield " ".join(block.split())
            yield ""
        for line in _arguments(shape)[1:]:
            yield f"- `{line.strip()}`"
        yield ""


def _looks_at(shape: Shape) -> str:
    return {
        "sample": "one sample at a time",
        "group": "all samples of a prompt",
        "samples": "all samples of the round",
    }[shape.kind]


def _arguments(shape: Shape) -> list[str]:
    if not shape.parameters:
        return ["arguments: none"]
    lines = ["arguments:"]
    for parameter in shape.parameters:
        kind = f": {parameter.annotation}" if parameter.annotation else ""
        default = "required" if parameter.default is None else f"[{parameter.default}]"
        lines.append(f"  {parameter.name}{kind} {default}")
    return lines


@dataclass(frozen=True, slots=True)
class Tested:
    """A line of `isft filters test`: what the filter said of one sample, or the error it gave; `seconds` for the call, which is not
    `timed` when it waited for the filter to start."""

    sample_id: str
    prompt_id: str
    keep: bool | None
    score: float | None
    reason: str | None
    extra: Mapping[str, Any]
    error: str | None
    seconds: float
    completion: str
    timed: bool = True

    def to_row(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "sample_id": self.sample_id,
            "prompt_id": self.prompt_id,
            "keep": self.keep,
            "score": self.score,
            "reason": self.reason,
            "extra": dict(self.extra),
            "error": self.error,
            "seconds": round(self.seconds, 6),
        }


@dataclass(frozen=True, slots=True)
class FilterTest:
    """The result of `test_filter`. `start_s` is the time until the first sample could be judged (import and set-up)."""

    filter: ResolvedFilter
    rows: list[Tested]
    start_s: float
    total_s: float

    @property
    def failed(self) -> bool:
        """Whether any call gave an error."""
        return any(row.error is not None for row in self.rows)


def test_filter(entry: FilterEntry, samples: Sequence[Sample], *, base_dir: Path, seed: int = 0) -> FilterTest:
    """Run one filter over samples, call by call, with the time of each; an error is a row, not the end.

    Groups are the samples of equal `prompt_id`. Raises ConfigError when the filter or its arguments are wrong.
    """
    [one] = resolve_filters([entry], base_dir=base_dir)
    one = replace(one.at_round(1), workers=1, on_error="fail")
    rows: list[Tested] = []
    with Runtime() as runtime:
        began = time.perf_counter()
        runner = runtime.runner(one, seed=seed, round_index=1, cache_dir=None, accepted_earlier=())
        start_s = time.perf_counter() - began
        for members in _calls(one, samples):
            start = time.perf_counter()
            error: str | None = None
            outcomes: list[Outcome] = []
            try:
                outcomes = _judge(runner, one, members)
            except IsftError as failure:
                error = failure.what
            seconds = time.perf_counter() - start
            timed = bool(rows) or not one.isolated
            if not timed:
                # the first call waits for the worker to start
                start_s, seconds = start_s + seconds, 0.0
            for index, sample in enumerate(members):
                rows.append(
                    _row(sample, outcomes[index] if error is None else None, error, seconds / len(members), timed)
                )
        total_s = time.perf_counter() - began
    return FilterTest(one, rows, start_s, total_s)


test_filter.__test__ = False  # type: ignore[attr-defined]


def _calls(one: ResolvedFilter, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    if one.kind == "sample":
        yield from ([sample] for sample in samples)
    elif one.kind == "group":
        groups: dict[str, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(sample.prompt_id, []).append(sample)
        yield from groups.values()
    elif samples:
        yield list(samples)


def _judge(runner: Any, one: ResolvedFilter, members: list[Sample]) -> list[Outcome]:
    if one.kind != "sample":
        result = runner.judge_many(members)
    elif runner.batched:
        result = runner.judge_batch(members)
    else:
        result = runner.judge(members[0])
    found = result.result() if isinstance(result, Future) else result
    return found if isinstance(found, list) else [found]


def _row(sample: Sample, outcome: Outcome | None, error: str | None, seconds: float, timed: bool) -> Tested:
    verdict = outcome.verdict if outcome is not None else None
    return Tested(
        sample_id=sample.sample_id,
        prompt_id=sample.prompt_id,
        keep=verdict.keep if verdict else None,
        score=verdict.score if verdict else None,
        reason=verdict.reason if verdict else None,
        extra=verdict.extra if verdict else {},
        error=error,
        seconds=seconds,
        completion=sample.completion,
        timed=timed,
    )


def read_samples(path: Path) -> list[Sample]:
    """The samples of a JSONL file: rows with at least `completion`, such as those of a generated shard or hand-written
    ones; `prompt`, `answer`, `prompt_id`, `row` and the other fields of a sample are taken where they stand, further
    columns go into `row`. Raises DataError with file and line."""
    samples: list[Sample] = []
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the samples: {error.strerror}", where=str(path)) from error
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"the line has {len(line)} bytes", where=where, expected=f"at most {MAX_LINE_BYTES}")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"this is not JSON ({error})", where=where) from error
        if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
            raise DataError("the row has no text `completion`", where=where, expected='{"completion": "..."}')
        samples.append(_sample_of(row, len(samples)))
    if not samples:
        raise DataError("there is no sample in the file", where=str(path))
    return samples


def _sample_of(row: dict[str, Any], index: int) -> Sample:
    known = {
        *("prompt_id", "sample_id", "round_index", "prompt", "completion", "answer", "row", "prompt_ids"),
        *("completion_ids", "finish_reason", "logprob", "reasoning", "final", "scores", "sample_index"),
    }
    columns = dict(row["row"]) if isinstance(row.get("row"), dict) else {}
    columns |= {key: value for key, value in row.items() if key not in known}
    prompt_id = str(row.get("prompt_id", row.get("id", "p0")))
    prompt = row.get("prompt", row.get("question", ""))
    words = len(row["completion"].split())
    return Sample(
        prompt_id=prompt_id,
        sample_id=str(row.get("sample_id", f"{prompt_id}-{index}")),
        round_index=int(row.get("round_index", 1)),
        prompt=prompt if isinstance(prompt, str | list) else str(prompt),
        completion=row["completion"],
        answer=row.get("answer"),
        row=columns,
        prompt_ids=tuple(row.get("prompt_ids") or ()),
        # a hand-written row has no token ids: words stand in for them
        completion_ids=tuple(row.get("completion_ids") or range(words)),
        finish_reason=str(row.get("finish_reason", EOS)),
        logprob=row.get("logprob"),
        reasoning=row.get("reasoning"),
        final=row["final"] if isinstance(row.get("final"), str) else row["completion"],
        scores=row["scores"] if isinstance(row.get("scores"), dict) else {},
        sample_index=int(row.get("sample_index", index)),
    )


def entry_for(use: str, arguments: Sequence[str]) -> FilterEntry:
    """The config entry of `isft filters test NAME key=value ...`; values are read as in a config. Raises ConfigError."""
    from pydantic import ValidationError

    from iterative_sft_cli.config import FilterEntry
    from iterative_sft_cli.config.overrides import read_value

    args: dict[str, Any] = {}
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"`{text}` is not an argument", where="command line", expected="name=value")
        args[key], problem = read_value(value, ("args", key))
        if problem is not None:
            raise ConfigError(f"{key}: {problem.what}", where="command line", expected=problem.expected)
    try:
        entry = FilterEntry.model_validate({"use": use, "args": args})
    except ValidationError as error:
        what = "; ".join(str(one["msg"]) for one in error.errors()[:3])
        raise ConfigError(f"`{use}` is no filter ({what})", where="command line") from error
    entry._key = "command line"
    return entry
