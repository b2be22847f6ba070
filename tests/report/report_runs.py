"""Runs for the readers' tests: the toy experiment trained once a session, and a large run written without training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from toy_config import write_toy

from iterative_sft_cli.cli import run as cli
from iterative_sft_cli.config import load_config
from iterative_sft_cli.console import Console
from iterative_sft_cli.experiment import run_experiment
from iterative_sft_cli.rundir import RunDir
from iterative_sft_cli.rundir.integrity import render_document, stamp_bytes
from iterative_sft_cli.rundir.jsonl import encode_rows


def write_config(folder: Path, **changes: Any) -> Path:
    """The toy experiment's config and data in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_toy(folder, changes)


def train(folder: Path, **changes: Any) -> Path:
    """A finished toy run; returns its directory."""
    outcome = run_experiment(write_config(folder, **changes), view=Console(io.StringIO()))
    assert outcome.code == 0
    return outcome.run_dir


def call(capsys: Any, *argv: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command line."""
    capsys.readouterr()
    code = cli([str(one) for one in argv])
    out, err = capsys.readouterr()
    return code, out, err


def call_json(capsys: Any, *argv: object) -> Any:
    """The document that a command prints with --json."""
    code, out, err = call(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def write_shard(run: Path, round_index: int, name: str, rows: list[dict[str, Any]], meta: dict[str, Any]) -> None:
    """A sealed shard without the fsyncs of the real thing."""
    folder = run / "rounds" / f"{round_index:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    data = encode_rows(rows)
    stamp = stamp_bytes(data)
    (folder / f"{name}.jsonl").write_bytes(data)
    seal = {
        "file": f"{name}.jsonl",
        "round_index": round_index,
        "count": len(rows),
        "bytes": stamp.size,
        "sha256": stamp.sha256,
        "meta": meta,
    }
    (folder / f"{name}.seal.json").write_bytes(render_document(seal))


def write_large(
    path: Path, num_samples: int, *, per_prompt: int = 8, per_shard: int = 512, num_tokens: int = 40
) -> Path:
    """A run with one judged round of `num_samples`: every fourth sample accepted, the last prompt's all `rare`."""
    written = write_config(path.parent, generate={"samples_per_prompt": per_prompt}, output_dir=str(path))
    config = load_config(written, []).merged
    RunDir.create(path, config_source=written.read_bytes(), resolved=config, environment={}).close()
    num_prompts = num_samples // per_prompt
    prompts = [
        {"prompt_id": f"p{i}", "prompt": f"What is {i} + 1?", "answer": str(i + 1), "level": None, "row": {"n": i}}
        for i in range(num_prompts)
    ]
    write_shard(path, 1, "prompts", prompts, {})
    ids = list(range(100, 100 + num_tokens))
    for start in range(0, num_samples, per_shard):
        made, said = [], []
        for n in range(start, min(start + per_shard, num_samples)):
            prompt, index = divmod(n, per_prompt)
            sample_id = f"1-p{prompt}-{index}"
            kept = n % 4 == 0
            reason = "rare" if prompt == num_prompts - 1 else "wrong_answer"
            made.append(
                {
                    "sample_id": sample_id,
                    "prompt_id": f"p{prompt}",
                    "sample_index": index,
                    "round_index": 1,
                    "completion": f"It is {prompt + 1 if kept else prompt}." + " word" * (num_tokens - 4),
                    "completion_ids": ids,
                    "prompt_ids": [1, 2, 3],
                    "finish_reason": "eos",
                    "seed": n,
                    "logprob": -1.5,
                }
            )
            says: list[dict[str, Any]] = [{"filter": "finished", "keep": True}]
            says.append({"filter": "numeric_answer", "keep": kept, "score": float(kept)})
            if not kept:
                says[-1]["reason"] = reason
            said.append({"sample_id": sample_id, "kept": kept, "says": says})
        shard = start // per_shard
        write_shard(path, 1, f"generated-{shard:05d}", made, {"weights": "w", "plan": {"max_rows": 8}})
        write_shard(path, 1, f"verdicts-{shard:05d}", said, {})
    return path
