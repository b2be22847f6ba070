"""The whole of `isft train` on a tiny Llama: real tensors, optimizer and engine, in forked children that are really killed.

torch is imported once, in the parent, which never computes with it; each child inherits the import and costs a fork.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from crash_base import Subject, Tally, empty
from crash_driver import KillNow
from crash_process import real_contents

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from iterative_sft_cli.rundir import fs  # noqa: E402

CONFIG = """\
model: {{path: {model}, device: cpu}}
output_dir: {run}
rounds: 3
seed: 3
deterministic: true
prompts: {{path: prompts.jsonl, prompt: question, answer: answer}}
generate: {{samples_per_prompt: 2, max_new_tokens: 6}}
filters: [nonempty, dedup]
train: {{start_from: previous, data: accumulate, epochs: 1, learning_rate: 1e-3, batch_size: 6}}
eval: {{path: dev.jsonl, samples_per_prompt: 1, correct: [nonempty]}}
checkpoints: {{every_steps: 2}}
"""


def tiny_subject(folder: Path, run: Path) -> Subject:
    """A three-round experiment on a tiny model; model, data and config are made in `folder` by a child."""

    def make() -> None:
        from tiny import save_tiny

        folder.mkdir(parents=True, exist_ok=True)
        for name, start, number in (("prompts", 0, 6), ("dev", 50, 3)):
            lines = [f'{{"question": "{n} + 1", "answer": "{n + 1}"}}\n' for n in range(start, start + number)]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        save_tiny(folder / "model")
        (folder / "tiny.yaml").write_text(CONFIG.format(model=folder / "model", run=run))

    def train(path: Path) -> object:
        from iterative_sft_cli.console import Console
        from iterative_sft_cli.experiment import run_experiment

        assert path == run
        return run_experiment(folder / "tiny.yaml", view=Console(io.StringIO()))

    import_once()
    code, _, told = in_child(make, None, None)
    if code != 0:
        raise AssertionError(f"the tiny model could not be made:\n{told}")
    return Subject(train, real_contents)


def import_once() -> None:
    """Import what every child needs; the parent must not compute, or its threads would be missing in the children."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    import tiny  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import iterative_sft_cli.build
    import iterative_sft_cli.console
    import iterative_sft_cli.loop
    import iterative_sft_cli.model  # noqa: F401

    iterative_sft_cli.console.Console(io.StringIO())
    torch.set_num_threads(1)


def in_child(
    work: Callable[[], object], delay_s: float | None, number: int | None, hook: fs.Hook | None = None
) -> tuple[int, float, str]:
    """(exit code, seconds, what it said) of `work` in a forked child, sent the signal `number` after `delay_s`."""
    reader, writer = os.pipe()
    begun = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            fs.hook = hook
            code = _call(work)
        finally:
            os._exit(code)
    os.close(writer)
    if delay_s is not None and number is not None:
        time.sleep(delay_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
    told = b""
    while piece := os.read(reader, 1 << 16):
        told = (told + piece)[-4000:]
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - begun, told.decode(errors="replace")


def _call(work: Callable[[], object]) -> int:
    from iterative_sft_cli.errors import IsftError

    try:
        work()
    except IsftError as error:
        print(error.render(), flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        # Ctrl-C before the run has begun to listen for it
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def kill_children(
    subject: Subject,
    root: Path,
    *,
    runs: int,
    kills: int = 1,
    signals: tuple[int, ...] = (signal.SIGKILL,),
    operations: int | None = None,
    seed: int = 0,
) -> Tally:
    """Signals at random instants (or, with `operations`, SIGKILL before random operations of so many), then a start that ends it."""
    rng = random.Random(seed)
    run = empty(root) / "run"
    code, seconds, told = in_child(lambda: subject.train(run), None, None)
    if code != 0:
        raise AssertionError(f"the uninterrupted run ended with {code}:\n{told}")
    gold = subject.contents(run)
    tally = Tally()
    for number in range(runs):
        shutil.rmtree(run)
        for _ in range(kills):
            sent = rng.choice(signals)
            if operations is None:
                code, _, told = in_child(lambda: subject.train(run), rng.random() * seconds, sent)
            else:
                code, _, told = in_child(lambda: subject.train(run), None, None, KillNow(rng.randrange(operations)))
            tally.count(f"exit {code}")
            if code not in (0, -sent, 130 if sent == signal.SIGINT else 75):
                tally.fail(f"run {number}: {signal.Signals(sent).name} ended it with {code}: {told[-400:]}")
        tally.trials += 1
        code, _, told = in_child(lambda: subject.train(run), None, None)
        got = subject.contents(run)
        if code != 0:
            tally.fail(f"run {number}: the next start ended with {code}: {told[-400:]}")
        elif got != gold:
            tally.fail(f"run {number}: other bytes in {sorted(n for n in got | gold if got.get(n) != gold.get(n))[:4]}")
    return tally
