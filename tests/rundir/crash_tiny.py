"""The whole of `isft train` on a tiny Llama: real tensors, optimizer and engine, in forked children that are really killed.

torch is imported once, in the parent, which never computes with it; each child inherits the import and costs a fork.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
import sys
from pathlib import Path

from crash_base import Subject
from crash_fork import in_child
from crash_process import real_contents

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CONFIG = """\
model: {{path: {model}, device: cpu{adapter}}}
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


LORA = ", adapter: {type: lora, r: 4, alpha: 8, dropout: 0.1}"


def tiny_subject(
    folder: Path, run: Path, *, adapter: str = "", hidden_size: int | None = None, try_run: bool = True
) -> Subject:
    """A three-round experiment on a tiny model; model, data and config are made in `folder` by a child.

    `try_run`: run it once and throw that away, to learn what it imports.
    """

    def make() -> None:
        from tiny import save_tiny, tiny_llama

        folder.mkdir(parents=True, exist_ok=True)
        for name, start, number in (("prompts", 0, 6), ("dev", 50, 3)):
            lines = [f'{{"question": "{n} + 1", "answer": "{n + 1}"}}\n' for n in range(start, start + number)]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        wide = None if hidden_size is None else tiny_llama(hidden_size=hidden_size, intermediate_size=2 * hidden_size)
        save_tiny(folder / "model", model=wide)
        (folder / "tiny.yaml").write_text(CONFIG.format(model=folder / "model", run=run, adapter=adapter))

    def train(path: Path) -> object:
        """What `isft train tiny.yaml` does after its imports, up to the exit code."""
        from iterative_sft_cli.__main__ import main

        assert path == run
        sys.argv = ["isft", "train", str(folder / "tiny.yaml")]
        return main()

    import_once()
    code, _, told = in_child(make)
    if code != 0:
        raise AssertionError(f"the tiny model could not be made:\n{told}")
    subject = Subject(train, real_contents)
    if try_run:
        import_what_a_run_imports(subject, folder, run)
    return subject


def import_what_a_run_imports(subject: Subject, folder: Path, run: Path) -> None:
    """Learn from a first run in a child which modules it takes, and import them here: later children find them there."""
    note = folder / "modules"

    def work() -> None:
        before = set(sys.modules)
        try:
            subject.train(run)
        finally:
            note.write_text("\n".join(name for name in list(sys.modules) if name not in before))

    shutil.rmtree(run, ignore_errors=True)
    code, _, told = in_child(work)
    if code != 0:
        raise AssertionError(f"the uninterrupted run ended with {code}:\n{told}")
    shutil.rmtree(run)
    for name in note.read_text().split():
        # modules that are made, not found, cannot be imported by name
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def import_once() -> None:
    """Import what every child needs; the parent must not compute, or its threads would be missing in the children."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    import tiny  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import iterative_sft_cli.__main__
    import iterative_sft_cli.build
    import iterative_sft_cli.cli
    import iterative_sft_cli.commands.run_commands
    import iterative_sft_cli.console
    import iterative_sft_cli.loop
    import iterative_sft_cli.model  # noqa: F401

    iterative_sft_cli.console.Console(io.StringIO())
    torch.set_num_threads(1)
