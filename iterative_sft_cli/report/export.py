"""`isft export`: one door for every form in which a run is handed over."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.report.compare import evaluated_rounds
from iterative_sft_cli.report.export_model import choose_checkpoint, facts_of, publish, write_adapter, write_model
from iterative_sft_cli.report.export_rows import choose_rounds, dpo_rows, sft_rows, with_rejected, write_rows
from iterative_sft_cli.report.ollama import modelfile
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.rundir import Checkpoint

FORMS = ("hf", "vllm", "adapter", "ollama", "gguf", "sft-jsonl", "dpo-jsonl", "inspect", "hub")
CONVERTER = "convert_hf_to_gguf.py"


def export(
    run: Run,
    to: str,
    *,
    out: Path | None,
    checkpoint: str | None = None,
    rounds: list[int] | None = None,
    repo: str | None = None,
    push: bool = False,
    chosen_column: str | None = None,
) -> dict[str, Any]:
    """Export a run; returns what was written and the command that uses it. Raises ConfigError and DataError."""
    if to not in FORMS:
        raise ConfigError(f"--to {to}: no such form", expected=f"one of {', '.join(FORMS)}")
    if chosen_column is not None and to != "dpo-jsonl":
        raise ConfigError(f"--chosen says nothing with --to {to}", expected="--to dpo-jsonl")
    if to in ("sft-jsonl", "dpo-jsonl"):
        if checkpoint is not None:
            raise ConfigError(f"--checkpoint says nothing with --to {to}", expected="--round, or neither")
        target = out or run.path / "export" / f"{to.removesuffix('-jsonl')}.jsonl"
        wanted = choose_rounds(run, rounds)
        if to == "dpo-jsonl":
            wanted = with_rejected(run, wanted)
        rows = sft_rows(run, wanted) if to == "sft-jsonl" else dpo_rows(run, wanted, chosen_column)
        return {"to": to, "out": str(target), "rows": write_rows(rows, target), "rounds": wanted, "next": None}
    if to == "inspect":
        if checkpoint is not None:
            raise ConfigError("--checkpoint says nothing with --to inspect", expected="--round, or neither")
        return to_inspect(run, rounds, out or run.path / "export" / to)
    if rounds:
        raise ConfigError(f"--round says nothing with --to {to}", expected="--checkpoint, or neither")
    chosen = choose_checkpoint(run, checkpoint)
    made = {"to": to, "checkpoint": chosen.key}
    if to == "hub":
        return {**made, **to_hub(run, chosen, repo, push=push)}
    target = out or run.path / "export" / to
    if to == "gguf":
        converter = find_converter()
        target = target if target.suffix == ".gguf" else target / "model.gguf"
        to_gguf(run, chosen, target, converter)
        return {**made, "out": str(target), "next": f"llama-cli -m {target}"}
    if to == "adapter":
        publish(target, lambda folder: write_adapter(run, chosen, folder))
        return {**made, "out": str(target), "next": None}
    publish(target, lambda folder: fill(run, chosen, folder, to))
    commands = {"vllm": f"vllm serve {target}", "ollama": f"ollama create NAME -f {target / 'Modelfile'}", "hf": None}
    return {**made, "out": str(target), **facts_of(target), "next": commands[to]}


def to_inspect(run: Run, rounds: list[int] | None, target: Path) -> dict[str, Any]:
    """The evaluations as logs for Inspect's viewer. Raises ConfigError for a round without one."""
    from iterative_sft_cli.report.export_inspect import write_inspect

    there = evaluated_rounds(run)
    missing = [index for index in rounds or () if index not in there]
    if missing:
        raise ConfigError(f"--round {missing[0]}: not evaluated", expected=f"one of {there}")
    names = write_inspect(run, sorted(rounds) if rounds else there, target)
    return {"to": "inspect", "out": str(target), "logs": names, "next": f"inspect view --log-dir {target}"}


def fill(run: Run, chosen: Checkpoint, folder: Path, to: str) -> None:
    """A model folder; with a Modelfile for Ollama."""
    write_model(run, chosen, folder)
    if to == "ollama":
        settings = run.settings
        last = settings.at_round(max(1, int(chosen.key[:4]))).generate
        text = modelfile(
            folder,
            system=settings.prompts.system,
            raw=settings.prompts.template == "none",
            decoding=settings.eval_decoding() if settings.eval is not None else last,
        )
        (folder / "Modelfile").write_text(text, encoding="utf-8")


def find_converter() -> list[str]:
    """The command of llama.cpp's converter: on PATH, or in the folder that LLAMA_CPP names. Raises DataError without one."""
    found = shutil.which(CONVERTER)
    folder = os.environ.get("LLAMA_CPP")
    if found is None and folder and (Path(folder) / CONVERTER).is_file():
        found = str(Path(folder) / CONVERTER)
    if found is None:
        raise DataError(
            f"GGUF is written by llama.cpp's own {CONVERTER}, which is not here",
            hint=f"put {CONVERTER} on PATH, or set LLAMA_CPP to llama.cpp's folder; --to hf exports a folder that it takes",
        )
    return [sys.executable, found] if found.endswith(".py") else [found]


def to_gguf(run: Run, chosen: Checkpoint, target: Path, converter: list[str]) -> None:
    """Write the model to a temporary folder and have it converted. Raises DataError with the converter's last words when it fails."""
    if target.exists():
        raise ConfigError(f"{target}: something is there already", expected="a file that does not exist yet")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gguf-") as name:
        folder, temp = Path(name) / "model", Path(name) / "model.gguf"
        folder.mkdir()
        write_model(run, chosen, folder)
        command = [*converter, str(folder), "--outfile", str(temp), "--outtype", "auto"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not temp.is_file():
            words = (done.stderr or done.stdout).strip().splitlines()[-3:]
            raise DataError(f"{CONVERTER} ended with {done.returncode}: {' / '.join(words)}")
        os.replace(temp, target)


def to_hub(run: Run, chosen: Checkpoint, repo: str | None, *, push: bool) -> dict[str, Any]:
    """What would be uploaded to a private repository; with `push` it is. Raises ConfigError without a name, DataError when the hub refuses."""
    if not repo or repo.count("/") != 1 or not all(repo.split("/")):
        raise ConfigError("--to hub needs --repo", expected="--repo USER/NAME")
    with tempfile.TemporaryDirectory(prefix="isft-hub-") as name:
        folder = Path(name)
        write_model(run, chosen, folder)
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        found = {"repo": repo, "files": files, "bytes": sum(files.values()), "pushed": push, "card": _card(folder)}
        if push:
            upload(folder, repo, chosen.key)
    again = None if push else f"isft export {run.path} --to hub --repo {repo} --checkpoint {chosen.key} --push"
    return {**found, "out": f"https://huggingface.co/{repo}" if push else None, "next": again}


def upload(folder: Path, repo: str, key: str) -> None:
    """Upload a folder as a private model repository. Raises DataError in the hub's words."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"isft checkpoint {key}")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"the hub refused: {str(error).splitlines()[0]}",
            where=repo,
            hint="`hf auth login` or HF_TOKEN gives a token",
        ) from error


def _card(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")
