"""`isft fetch`: every model, tokenizer, data set and filter model that a config names, brought here and named by its commit.

With a folder given, the hub's cache is made in it: with HF_HOME set to it and HF_HUB_OFFLINE=1 the config runs without a network.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.config import LoadedConfig
from iterative_sft_cli.errors import DataError
from iterative_sft_cli.filters import resolve_filters

LIVE = ("current", "base", "best", "warmup")


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that a config names: `where` the key, `kind` model, tokenizer, data or filter model; `commit` is None for what is local."""

    where: str
    kind: str
    name: str
    commit: str | None
    path: str
    bytes: int
    pinned: bool

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def use_home(folder: Path) -> None:
    """Make `folder` the home of the hub's caches for this process. Call it before the libraries are imported."""
    folder = folder.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HOME"] = str(folder)
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE"):
        os.environ.pop(name, None)
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import constants

        constants.HF_HOME, constants.HF_HUB_CACHE = str(folder), str(folder / "hub")
    if "datasets" in sys.modules:
        import datasets

        datasets.config.HF_DATASETS_CACHE = folder / "datasets"


def fetch(loaded: LoadedConfig) -> Iterator[Item]:
    """Bring everything here, item by item. Raises DataError, with the way to mend it, for the first that cannot be had."""
    config, base_dir = loaded.config, loaded.base_dir
    model = config.model
    if model.path is not None and model.path.endswith(".gguf"):
        yield local_file("model.path", "model", model.path, base_dir)
    elif model.path is not None:
        yield folder_item(
            "model.path", "model", model.path, base_dir, model.revision, with_code=model.trust_remote_code
        )
    if model.tokenizer is not None:
        yield folder_item("model.tokenizer", "tokenizer", model.tokenizer, base_dir, None)
    for name in other_models(config):
        yield folder_item("generate.from", "model", name, base_dir, None)
    sections = [
        ("prompts", config.prompts),
        ("eval", config.eval),
        ("train.mix", config.train.mix),
        ("warmup", config.warmup),
    ]
    for key, section in sections:
        if section is not None:
            yield from data_items(key, section, base_dir)
    for one in resolve_filters(config.filters, base_dir=base_dir):
        if one.spec is None or not one.spec.hub:
            continue
        for argument in one.spec.paths:
            if one.arguments.get(argument) is not None:
                where = f"{one.key}.{argument}"
                revision = one.arguments.get("revision")
                yield folder_item(where, "filter model", str(one.arguments[argument]), base_dir, revision)


def other_models(config: Any) -> list[str]:
    """The models beside the trained one that generate in some round."""
    if config.generate.engine != "transformers":
        return []
    named: dict[str, None] = {}
    for index in range(1, config.rounds + 1):
        source = config.at_round(index).generate.from_
        named |= dict.fromkeys([source] if isinstance(source, str) else [one.model for one in source])
    return [name for name in named if name not in LIVE]


def folder_item(
    where: str, kind: str, name: str, base_dir: Path, revision: str | None, *, with_code: bool = False
) -> Item:
    """A model folder: local as it is, or from the hub. A filter's model may be in any format, so all of the repository's root is taken."""
    from iterative_sft_cli.model_source import find_folder

    folder, commit = find_folder(name, base_dir, revision=revision, with_code=with_code, where=where)
    return Item(where, kind, name, commit, str(folder), size_of(folder), commit is None or revision == commit)


def data_items(key: str, section: Any, base_dir: Path) -> Iterator[Item]:
    """The data of a section; a data set is prepared, so that it loads offline."""
    if section.path is not None:
        yield local_file(f"{key}.path", "data", str(section.path), base_dir)
    elif section.dataset is not None:
        from iterative_sft_cli.prompts import read_source

        _, label = read_source(section, base_dir, key)
        source = section.dataset
        here = next((path for path in (base_dir / source.id, Path(source.id)) if path.is_dir()), None)
        commit = None if here is not None else commit_of(source.id, source.revision)
        place = here or cached_dataset(source.id)
        size = size_of(place) if place is not None else 0
        yield Item(
            f"{key}.dataset",
            "data",
            label,
            commit,
            str(place or ""),
            size,
            here is not None or source.revision == commit,
        )


def local_file(where: str, kind: str, name: str, base_dir: Path) -> Item:
    """A file that must be there already. Raises DataError."""
    for path in (base_dir / name, Path(name).expanduser()):
        if path.is_file():
            return Item(where, kind, name, None, str(path.resolve()), path.stat().st_size, True)
    raise DataError("no such file", where=f"{where}: {name}")


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit of a data set on the hub; None when the hub does not say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        found = HfApi().dataset_info(name, revision=revision).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return None
    return None if found is None else str(found)


def cached_dataset(name: str) -> Path | None:
    """Where `datasets` has prepared a data set."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    return folder if folder.is_dir() else None


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def pins(items: list[Item]) -> list[str]:
    """The lines that pin what the config leaves floating."""
    lines = []
    for one in items:
        if one.commit is None or one.pinned:
            continue
        if one.where == "model.path":
            lines.append(f"model.revision={one.commit}")
        elif one.where.endswith(".dataset"):
            lines.append(f"{one.where}.revision={one.commit}")
    return lines
