"""The process in which a plug-in runs: loads one filter, answers length-framed JSON, keeps each call like the first.

Before every call the working folder, environment, locale and random generators are what they were at the start, so a
verdict depends on the sample alone. Nothing but the standard library is imported for our own part.
"""

from __future__ import annotations

import contextlib
import json
import locale
import mmap
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from iterative_sft_cli import system
from iterative_sft_cli.filters import processes
from iterative_sft_cli.filters.context import Context
from iterative_sft_cli.filters.contract import (
    ContractBreach,
    Outcome,
    Shape,
    bind_arguments,
    inspect_filter,
    make_callable,
    place_bare,
    to_outcome,
    to_outcomes,
)
from iterative_sft_cli.filters.source_hash import source_hash
from iterative_sft_cli.filters.wire import encode, read_frame, sample_from_wire
from iterative_sft_cli.plugin_import import ImportBroken, NotFound, explain, load_target
from iterative_sft_cli.types import Sample, derive_seed

MAX_FORKS = 64
"""Processes that one call may fork before the whole group ends itself."""
PART = 5000
"""Outcomes that one reply holds at most."""
MIN_SECRET = 4
"""Shorter values of passed environment variables are no secrets, and replacing them would garble other text."""
FORK_NOTE = "isft: one call started more than 64 processes"


class StoredSamples(Sequence[Sample]):
    """A round's samples in a file of frames, read when they are asked for."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._offsets: list[int] = []
        position, end = 0, os.path.getsize(path)
        while position < end:
            self._offsets.append(position)
            self._file.seek(position)
            position += 4 + int.from_bytes(self._file.read(4), "big")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        self._file.seek(self._offsets[index])
        fields = read_frame(self._file)
        assert fields is not None
        return sample_from_wire(fields)


class StoredHistory:
    """What earlier rounds accepted, in a file of JSON lines; may be iterated often."""

    def __init__(self, path: str | None) -> None:
        self._path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._path is None:
            return
        with open(self._path, "rb") as file:
            for line in file:
                yield json.loads(line)


class Surroundings:
    """The process state that a call may have changed and the next must not see."""

    def __init__(self, scratch: str) -> None:
        self._scratch = scratch
        self._environment = dict(os.environ)
        self._locale = locale.setlocale(locale.LC_ALL)
        self._streams = (sys.stdin, sys.stdout, sys.stderr)
        self._recursion = sys.getrecursionlimit()
        self.forks = mmap.mmap(-1, 8) if hasattr(os, "fork") else None

    def restore(self, seed: int) -> None:
        """Put everything back and seed the generators that are loaded."""
        os.chdir(self._scratch)
        if os.environ != self._environment:
            os.environ.clear()
            os.environ.update(self._environment)
        if locale.setlocale(locale.LC_ALL) != self._locale:
            locale.setlocale(locale.LC_ALL, self._locale)
        sys.stdin, sys.stdout, sys.stderr = self._streams
        sys.setrecursionlimit(self._recursion)
        self.disarm()
        if self.forks is not None:
            self.forks[:8] = bytes(8)
        random.seed(seed)
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        if numpy is not None:
            with contextlib.suppress(Exception):
                numpy.random.seed(seed & 0xFFFFFFFF)
        if torch is not None:
            with contextlib.suppress(Exception):
                torch.manual_seed(seed)

    def disarm(self) -> None:
        """No alarm of a call goes off after it."""
        if hasattr(signal, "alarm"):
            signal.alarm(0)

    def count_forks(self, private: Sequence[int]) -> None:
        """End the whole group at the 65th fork of a call; give forked children none of our own pipes."""
        counter = self.forks
        if counter is None:
            return

        def before() -> None:
            count = int.from_bytes(counter[:8], "big") + 1
            counter[:8] = count.to_bytes(8, "big")
            if count > MAX_FORKS:
                os.write(2, f"\n{FORK_NOTE}\n".encode())
                system.end_group(0)

        def after() -> None:
            for descriptor in private:
                with contextlib.suppress(OSError):
                    os.close(descriptor)

        os.register_at_fork(before=before, after_in_child=after)


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Our own copies of stdin and stdout; what the plug-in reads is empty, what it prints goes to stderr."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


def main() -> None:
    """Answer requests until the other side closes the pipe."""
    requests, replies = take_pipes()
    processes.tell_stacks_when_asked()
    start = read_frame(requests)
    if start is None:
        return
    surroundings = Surroundings(start["scratch"])
    surroundings.count_forks([requests.fileno(), replies.fileno()])

    secrets = [os.environ[name] for name in start["env"] if len(os.environ.get(name, "")) >= MIN_SECRET]

    def reply(message: dict[str, Any]) -> None:
        replies.write(encode(message, secrets))
        replies.flush()

    loaded = load(start, reply, surroundings)
    if loaded is None:
        return
    call, shape = loaded
    history = StoredHistory(None)
    while (request := read_frame(requests)) is not None:
        context = None
        if shape.takes_context:
            if request.get("history") is not None:
                history = StoredHistory(request["history"])
            context = Context(
                round_index=request["round_index"],
                seed=request["seed"],
                filter_name=request["filter"],
                subject=request["subject"],
                cache_dir=Path(request["cache_dir"]) if request.get("cache_dir") else None,
                accepted_earlier=history,
            )
        surroundings.restore(derive_seed(request["seed"], "worker", request["filter"], request["subject"]))
        message = answer(call, request, context)
        surroundings.disarm()
        for start_at in range(0, max(0, len(message.get("outcomes", ())) - PART), PART):
            reply({"id": message["id"], "part": message["outcomes"][start_at : start_at + PART]})
        if "outcomes" in message:
            rest = len(message["outcomes"]) % PART or PART
            message["outcomes"] = message["outcomes"][-rest:]
        reply(message)


def load(start: dict[str, Any], reply: Callable[[dict[str, Any]], None], surroundings: Surroundings) -> Any:
    """Import and set up the filter and say what it is; None when it cannot be used or was only asked about."""
    surroundings.restore(0)
    try:
        target = load_target(start["module"], start["path"], start["attribute"])
    except NotFound as error:
        reply({"failed": "not_found", "message": str(error)})
        return None
    except ImportBroken as error:
        reply({"failed": "import", "message": str(error)})
        return None
    try:
        shape = inspect_filter(target)
    except ContractBreach as error:
        reply({"failed": "shape", "message": str(error)})
        return None
    if start["describe"]:
        reply(describe(target, shape, start))
        return None
    try:
        call, _ = make_callable(target, shape, start["arguments"])
    except BaseException as error:
        reply({"failed": "setup", "message": f"its set-up raised {explain(error)}"})
        return None
    reply({"ready": True})
    return call, shape


def describe(target: Any, shape: Shape, start: dict[str, Any]) -> dict[str, Any]:
    """What resolving needs to know: shape, declarations, source, and what is wrong with the arguments."""
    problems: list[str] = []
    for args in start["candidates"]:
        given, wrong = place_bare(shape, args["args"], args["bare"])
        problems = wrong or bind_arguments(target, shape, given)[1]
        if problems:
            break
    digest, mentions_scores = source_hash(target.__module__, start.get("distribution") or "")
    return {
        "shape": shape.to_row(),
        "problems": problems,
        "doc": (target.__doc__ or "")[:20_000],
        "declares": {
            "in_process": bool(getattr(target, "in_process", False)),
            "prefix_stable": bool(getattr(target, "prefix_stable", False)),
            "role": str(getattr(target, "role", "")),
        },
        "source_hash": digest,
        "reads_scores": mentions_scores,
        "file": getattr(sys.modules[target.__module__], "__file__", None),
    }


def answer(call: Callable[[Any, Any], Any], request: dict[str, Any], context: Context | None) -> dict[str, Any]:
    """The reply to one request: checked outcomes, or what went wrong."""
    number = request["id"]
    try:
        if "sample" in request:
            outcomes = [to_outcome(call(sample_from_wire(request["sample"]), context))]
        elif "path" in request:
            samples = StoredSamples(request["path"])
            outcomes = to_outcomes(call(samples, context), len(samples))
        else:
            group = [sample_from_wire(fields) for fields in request["samples"]]
            count = len(group)
            outcomes = to_outcomes(call(group, context), count)
    except ContractBreach as error:
        return {"id": number, "error": str(error)}
    except BaseException as error:
        what = getattr(error, "what", None)
        if isinstance(what, str) and type(error).__module__ == "iterative_sft_cli.errors":
            hint = getattr(error, "hint", None)
            return {"id": number, "explained": [type(error).__name__, what, hint]}
        return {"id": number, "error": f"it raised {explain(error)}"}
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    return {"id": number, "outcomes": [outcome_to_row(one) for one in outcomes]}


def outcome_to_row(outcome: Outcome) -> list[Any]:
    """JSON form of an outcome."""
    verdict = outcome.verdict
    return [verdict.keep, verdict.score, verdict.reason, dict(verdict.extra), outcome.bare_float]


if __name__ == "__main__":
    main()
