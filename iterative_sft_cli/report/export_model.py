"""A checkpoint as a folder that other tools load: weights (an adapter merged in), tokenizer, template, stop tokens, model card.

A folder appears by one rename, whole or not at all. A full checkpoint's weights are copied byte for byte, verified against its manifest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.report.card import model_card
from iterative_sft_cli.report.reader import Run
from iterative_sft_cli.rounds.weights import round_key
from iterative_sft_cli.rundir import Checkpoint, layout

ADAPTER = "adapter_config.json"
OURS = (layout.STATE, layout.MANIFEST, layout.COPIES)


def choose_checkpoint(run: Run, wanted: str | None) -> Checkpoint:
    """The checkpoint `best`, `last` or a key names; by default the best, or the last without evaluations. Verified. Raises DataError."""
    keys = [key for key in run.view.keys if not layout.is_partial(key)]
    if not keys:
        raise DataError(
            "there is no checkpoint yet", where=str(run.path), hint=f"isft show {run.path} says how far it is"
        )
    best = run.best_round
    if wanted in (None, "best") and best is not None:
        key = round_key(best)
        if key not in keys:
            what = (
                "the starting model is the best"
                if best == 0
                else f"checkpoint {key}, the best by {run.metric}, was not kept"
            )
            raise DataError(what, where=str(run.path), hint=f"--checkpoint {keys[-1]} exports another one")
    elif wanted == "best":
        raise ConfigError("--checkpoint best: nothing was evaluated", expected=f"one of {', '.join(keys)}")
    else:
        key = keys[-1] if wanted in (None, "last") else str(wanted)
    if key not in run.view.keys:
        raise ConfigError(
            f"--checkpoint {key}: there is no such checkpoint", expected=f"best, last, or one of {', '.join(keys)}"
        )
    return run.view.checkpoint(key, verify=True)


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds an adapter alone."""
    return ADAPTER in checkpoint.manifest["files"]


def publish(out: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `out` from what `fill` writes into a temporary one. Raises ConfigError when something is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: something is there already", expected="a folder that does not exist yet")
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        temp.mkdir()
        fill(temp)
        if out.exists():
            out.rmdir()
        os.rename(temp, out)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


def copy_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """The checkpoint's own files, without what only a run needs."""
    for name in checkpoint.manifest["files"]:
        if name not in OURS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.path / name, folder / name)


def write_model(run: Run, checkpoint: Checkpoint, folder: Path) -> None:
    """A whole model: the checkpoint copied, or its adapter merged into the base model."""
    if is_adapter(checkpoint):
        merge_adapter(run, checkpoint, folder)
    else:
        copy_checkpoint(checkpoint, folder)
        check_model(folder)
    write_for_older_readers(folder)
    (folder / "README.md").write_text(model_card(run, checkpoint.key, adapter=False), encoding="utf-8")


def write_for_older_readers(folder: Path) -> None:
    """Say in the words of transformers 4 too what transformers 5 says otherwise: Ollama, llama.cpp and older vLLM read those, and take
    a default, silently, for a rope base that they do not find."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    rope = config.get("rope_parameters")
    known = dict(config)
    if isinstance(rope, dict) and "rope_theta" in rope:
        known.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            known.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    if isinstance(config.get("dtype"), str):
        known.setdefault("torch_dtype", config["dtype"])
    if known != config:
        path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        tokenizer = json.loads(path.read_text("utf-8"))
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            left_out = ("is_local", "local_files_only", "backend")
            plain = {key: value for key, value in tokenizer.items() if key not in left_out}
            if isinstance(plain.get("extra_special_tokens"), list):
                plain["additional_special_tokens"] = plain.pop("extra_special_tokens")
            text = json.dumps({**plain, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, sort_keys=True)
            path.write_text(text + "\n", encoding="utf-8")


def write_adapter(run: Run, checkpoint: Checkpoint, folder: Path) -> None:
    """The adapter as it is. Raises ConfigError for a checkpoint that holds whole weights."""
    if not is_adapter(checkpoint):
        raise ConfigError(
            "this run trained all weights, it has no adapter",
            where="model.adapter",
            hint="--to hf exports the whole model",
        )
    copy_checkpoint(checkpoint, folder)
    (folder / "README.md").write_text(model_card(run, checkpoint.key, adapter=True), encoding="utf-8")


def check_model(folder: Path) -> None:
    """Raises DataError for a folder that is no Hugging Face model, such as a plug-in backend's."""
    if not (folder / "config.json").is_file():
        raise DataError(
            "this checkpoint is not a Hugging Face model: its backend writes a format of its own", where="model.use"
        )


def merge_adapter(run: Run, checkpoint: Checkpoint, folder: Path) -> None:
    """Base weights plus the adapter's update, computed in float32 and written in the base model's dtype."""
    from iterative_sft_cli.model import load_model, load_weights_into
    from iterative_sft_cli.model_load import quiet
    from iterative_sft_cli.model_weights import write_full

    settings = run.settings
    section = settings.model.model_copy(update={"dtype": "float32", "quantization": "none", "device": "cpu"})
    loaded = load_model(section, seed=settings.seed, base_dir=run.base_dir)
    recorded = run.view.environment.get("model")
    if recorded and recorded != loaded.base_hash:
        raise DataError(
            "the base model is not the one that the adapter was trained on: its files changed",
            where=run.model_name,
            hint="put the model back as it was; environment.json has its content hash",
        )
    load_weights_into(loaded, checkpoint.path)
    with quiet():
        merged = loaded.model.merge_and_unload()
        eos_ids = stop_token_ids(run, loaded)
        write_full(merged, folder, loaded.base_dtype, loaded.tensor_dtypes, eos_ids)
        loaded.tokenizer.save_pretrained(folder)


def stop_token_ids(run: Run, loaded: Any) -> tuple[int, ...]:
    """The tokens that training taught as the end of an answer; the template of the config goes into the tokenizer."""
    from iterative_sft_cli.encoding import TokenizerEncoder

    return TokenizerEncoder.of(loaded, run.settings.prompts, run.base_dir).eos_token_ids


def facts_of(folder: Path) -> dict[str, Any]:
    """Architecture, dtype, stop tokens and size of an exported model."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    generation = folder / "generation_config.json"
    stops = json.loads(generation.read_text("utf-8")).get("eos_token_id") if generation.is_file() else None
    return {
        "architecture": (config.get("architectures") or [None])[0],
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "eos_token_id": stops,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }
