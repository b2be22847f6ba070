"""Rows that are no file of ours: data sets of the hub, tasks of reasoning-gym, and plug-in factories (`isft.prompts`)."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError, DataError, PluginError
from iterative_sft_cli.plugin_import import find_plugin
from iterative_sft_cli.prompts.files import Located, plain
from iterative_sft_cli.types import Prompt

GROUP = "isft.prompts"
"""Entry-point group of factories that can be named without their module."""


# -- data sets ---------------------------------------------------------------------------------------------------------


def from_dataset(source: Any, base_dir: Path, limit: int | None, key: str) -> tuple[list[Located], str]:
    """The rows of a data set on the hub, in its cache, or in a folder that `datasets` wrote."""
    label = f"{source.id}" + (f"/{source.name}" if source.name else "") + f"[{source.split}]"
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # read at import: no call to the network for a counter
    import datasets

    folder = next((path for path in (base_dir / source.id, Path(source.id)) if path.is_dir()), None)
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if folder is not None and (folder / "state.json").is_file():
            data = datasets.load_from_disk(str(folder))
        elif folder is not None and (folder / "dataset_dict.json").is_file():
            data = _split(datasets.load_from_disk(str(folder)), source.split, f"{key}.dataset.split")
        else:
            data = datasets.load_dataset(
                str(folder or source.id), source.name, split=source.split, revision=source.revision
            )
    except DataError:
        raise
    except Exception as error:  # datasets raises its own kinds, ValueError, OSError, FileNotFoundError, httpx errors
        raise _explain(error, source, f"{key}.dataset") from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    count = len(data) if limit is None else min(limit, len(data))
    if not count:
        raise DataError("no rows", where=label)
    return [(f"{label}: row {index + 1}", plain(data[index])) for index in range(count)], label


def _split(data: Any, split: str, where: str) -> Any:
    if split not in data:
        raise DataError(f"no split {split!r}", where=where, expected=" or ".join(sorted(data)))
    return data[split]


def _explain(error: Exception, source: Any, where: str) -> DataError:
    from huggingface_hub import get_token

    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    address = f"https://huggingface.co/datasets/{source.id}"
    hint = None
    if "gated" in str(error).lower():
        hint = (
            f"accept its terms at {address}; a fine-grained token also needs the right to read gated repositories"
            if get_token()
            else f"accept its terms at {address}, then run `hf auth login` or set HF_TOKEN"
        )
    elif any(os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        hint = (
            "no network is allowed here (HF_HUB_OFFLINE): isft fetch CONFIG, on a machine with network, fills the cache"
        )
    elif isinstance(error, ConnectionError) or "connect" in text.lower() or "reach" in text.lower():
        hint = "the hub cannot be reached: isft fetch CONFIG, on a machine with network, fills the cache"
    return DataError(f"the data set {source.id!r} cannot be loaded: {text}", where=where, hint=hint)


# -- reasoning-gym -----------------------------------------------------------------------------------------------------


def from_gym(source: Any, limit: int | None, key: str) -> tuple[list[Located], str]:
    """The entries of a reasoning-gym task; a row is `question`, `answer` and `metadata`, which its verifier scores with."""
    where = f"{key}.reasoning_gym"
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the package reasoning-gym is not there ({error})",
            where=where,
            hint="pip install 'iterative-sft-cli[gym]'",
        ) from error
    if source.task not in DATASETS:
        close = difflib.get_close_matches(source.task, DATASETS, n=1)
        raise ConfigError(
            f"reasoning-gym has no task {source.task!r}",
            where=f"{where}.task",
            hint=f"did you mean {close[0]}?" if close else f"it has {len(DATASETS)}, such as chain_sum and countdown",
        )
    size = source.size if limit is None else min(limit, source.size)
    known = _gym_arguments(DATASETS[source.task])
    for name in source.args:
        if known and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"the task {source.task} has no argument {name!r}",
                where=f"{where}.args.{name}",
                hint=f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}",
            )
    try:
        data = reasoning_gym.create_dataset(source.task, size=size, seed=source.seed, **source.args)
        entries = [data[index] for index in range(size)]
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"the task {source.task} refuses its arguments: {error}", where=f"{where}.args") from error
    label = f"reasoning_gym {source.task}"
    return [(f"{label}: entry {index}", plain(entry)) for index, entry in enumerate(entries)], label


def _gym_arguments(registered: Any) -> list[str]:
    config = registered[1] if isinstance(registered, tuple) else None
    if config is None or not is_dataclass(config):
        return []
    return [one.name for one in fields(config) if one.name not in ("seed", "size")]


def check_gym_overlap(trained: Any, held_out: Any) -> None:
    """Raises DataError when both make entries of one task from the same random states (entry i is made from seed + i)."""
    if trained is None or held_out is None or trained.task != held_out.task:
        return
    if trained.seed < held_out.seed + held_out.size and held_out.seed < trained.seed + trained.size:
        raise DataError(
            f"prompts {trained.seed}..{trained.seed + trained.size - 1} and eval "
            f"{held_out.seed}..{held_out.seed + held_out.size - 1} share seeds of the task {trained.task}",
            where="eval.reasoning_gym.seed",
            expected="seeds further apart than the sizes, because entry i is made from seed + i",
            hint=f"seed: {trained.seed + max(trained.size, 10**6)}",
        )


# -- plug-ins ----------------------------------------------------------------------------------------------------------


def from_factory(
    use: str, args: Mapping[str, Any], base_dir: Path, limit: int | None, key: str
) -> tuple[list[Located], str]:
    """The rows that a plug-in's factory yields: mappings, texts, or `Prompt`s."""
    factory = find_plugin(use, kind="prompt source", base_dir=base_dir, where=f"{key}.use", group=GROUP)
    if not callable(factory):
        raise ConfigError(f"{use} is a {type(factory).__name__}", where=f"{key}.use", expected="something to call")
    rows: list[Located] = []
    try:
        produced: Iterable[Any] = factory(**args)
        for index, row in enumerate(produced):
            if limit is not None and index >= limit:
                break
            rows.append((f"{use}: row {index + 1}", _as_row(row, use)))
    except PluginError:
        raise
    except TypeError as error:
        raise PluginError(
            f"{use} raised TypeError: {error}", where=f"{key}.use", hint="are its `args` right?"
        ) from error
    except Exception as error:
        raise PluginError(f"{use} raised {type(error).__name__}: {error}", where=f"{key}.use") from error
    if not rows:
        raise DataError("no rows", where=use, expected="at least one")
    return rows, use


def _as_row(row: Any, use: str) -> dict[str, Any]:
    if isinstance(row, str):
        return {"prompt": row}
    if isinstance(row, Prompt):
        values = asdict(row)
        return {**plain(values.pop("row")), **plain(values), "id": row.prompt_id}
    if isinstance(row, Mapping):
        converted: dict[str, Any] = plain(row)
        return converted
    raise PluginError(f"{use} yielded a {type(row).__name__}", expected="mappings, texts or Prompts")
