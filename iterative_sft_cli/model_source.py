"""Finds the files of a model: a local folder, a .gguf file, or a hub id in the cache or on the hub. Imports no torch.

The guarantee: whatever is wrong with a name, a licence, a token or a file is said before any weight is loaded, and weights
come from safetensors or GGUF only, never from a pickle.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iterative_sft_cli.errors import ConfigError, DataError
from iterative_sft_cli.tensor_files import TensorHeader, read_headers, weight_files

_ROOT_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_FULL_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the files are. Exactly one of `folder`, `gguf` and `init` is set; `tokenizer` is a folder, or None for the GGUF's own.

    `revision` is the commit of a hub model, None for local files.
    """

    name: str
    folder: Path | None = None
    gguf: Path | None = None
    init: dict[str, Any] | None = None
    tokenizer: Path | None = None
    revision: str | None = None

    def files(self) -> list[Path]:
        """The files that decide what the model is: weights, config, tokenizer, its own code; sorted by name."""
        found: list[Path] = [self.gguf] if self.gguf else []
        if self.folder:
            found += weight_files(self.folder)
            found += [
                path for path in self.folder.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt", ".py")
            ]
        if self.tokenizer and self.tokenizer != self.folder:
            found += [path for path in self.tokenizer.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt")]
        ignored = ("README", "LICENSE", "state.json", "MANIFEST.json")
        return sorted({path for path in found if not path.name.startswith(ignored)}, key=lambda path: path.name)


def find_model(section: Any, base_dir: Path) -> ModelSource:
    """The source of `config.model`. Raises ConfigError for settings that exclude each other and DataError for missing files."""
    if section.init is not None:
        if not section.tokenizer:
            raise ConfigError(
                "`init` makes a model without a tokenizer", where="model.tokenizer", expected="a folder or hub id"
            )
        folder, revision = find_folder(section.tokenizer, base_dir, where="model.tokenizer")
        return ModelSource("init", init=dict(section.init), tokenizer=folder, revision=revision)
    if not section.path:
        raise ConfigError("no model is named", where="model", expected="a hub id, a local folder, or a .gguf file")
    name = str(section.path)
    tokenizer = None
    if section.tokenizer:
        tokenizer, _ = find_folder(section.tokenizer, base_dir, where="model.tokenizer")
    if name.endswith(".gguf"):
        return ModelSource(name, gguf=_find_gguf(name, base_dir), tokenizer=tokenizer)
    folder, revision = find_folder(
        name, base_dir, revision=section.revision, with_code=section.trust_remote_code, where="model.path"
    )
    if section.trust_remote_code and revision is not None and not _FULL_COMMIT.fullmatch(section.revision or ""):
        raise ConfigError(
            "code of a model on the hub runs only from a pinned commit",
            where="model.trust_remote_code",
            expected="`revision` with a full commit hash",
            hint=f"revision: {revision}",
        )
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise DataError(
                "the folder holds an adapter, not a model",
                where=str(folder),
                hint="merge it first: isft export RUN --to hf",
            )
        raise DataError(
            "no config.json in the model's folder", where=str(folder), expected="a Hugging Face model folder"
        )
    read_headers(weight_files(folder))
    return ModelSource(name, folder=folder, tokenizer=tokenizer or folder, revision=revision)


def _find_gguf(name: str, base_dir: Path) -> Path:
    path = Path(name).expanduser()
    for candidate in (base_dir / path, path):
        if candidate.is_file():
            return candidate.resolve()
    raise DataError("no such file", where=name, expected="a .gguf file", hint=_near(base_dir / path))


def find_folder(
    name: str, base_dir: Path, *, revision: str | None = None, with_code: bool = False, where: str = "model"
) -> tuple[Path, str | None]:
    """The local folder of `name` and, for a hub id, its commit. Raises DataError naming what is missing and the way to it."""
    path = Path(name).expanduser()
    for candidate in (base_dir / path, path):
        if candidate.is_dir():
            return candidate.resolve(), None
        if candidate.is_file():
            raise DataError(
                "this is a file", where=f"{where}: {name}", expected="a model folder, a .gguf file, or a hub id"
            )
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise DataError("no such folder", where=f"{where}: {name}", hint=_near(base_dir / path))
    return _from_hub(name, revision, with_code, where, _near(base_dir / path))


def _near(path: Path) -> str | None:
    """A hint with the sibling whose name is nearest."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else None


def is_offline() -> bool:
    """Whether the user asked for no network (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _from_hub(
    name: str, revision: str | None, with_code: bool, where: str, near: str | None
) -> tuple[Path, str | None]:
    from huggingface_hub import errors, get_token, snapshot_download

    label = f"{where}: {name}"
    patterns = [*_ROOT_FILES, "*.py"] if with_code else _ROOT_FILES
    fetch = "isft fetch CONFIG, on a machine with network, fills the cache"
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],
                local_files_only=is_offline(),
            )
        )
    except errors.HFValidationError as error:
        raise DataError(
            "neither a folder here nor a hub id", where=label, expected="ORG/NAME or a folder", hint=near
        ) from error
    except errors.GatedRepoError as error:
        raise _gated(name, label, error, get_token()) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"the model has no revision {revision!r}", where=label) from error
    except errors.RepositoryNotFoundError as error:
        hint = near or (
            "if it is private, the token must have the right to read it"
            if get_token()
            else "if it is private, set HF_TOKEN"
        )
        raise DataError("neither a folder here nor a model on the hub", where=label, hint=hint) from error
    except errors.LocalEntryNotFoundError as error:
        if is_offline():
            raise DataError(
                "neither a folder here nor in the hub's cache, and HF_HUB_OFFLINE is set",
                where=label,
                hint=near or fetch,
            ) from error
        raise DataError(
            "neither a folder here nor in the hub's cache, and the hub cannot be reached",
            where=label,
            hint=near or fetch,
        ) from error
    except errors.HfHubHTTPError as error:
        if _status(error) in (401, 403):
            raise DataError(
                f"the hub refuses the token ({_status(error)})", where=label, hint="make a new one and set HF_TOKEN"
            ) from error
        raise DataError(f"the hub answered: {_first_line(error)}", where=label) from error
    except OSError as error:
        raise DataError(f"cannot be fetched: {_first_line(error)}", where=label, hint=near or fetch) from error
    return folder, folder.name


def _status(error: Any) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _gated(name: str, where: str, error: Any, token: str | None) -> DataError:
    """Three different things can be missing; the hub tells them apart by its message."""
    address = f"https://huggingface.co/{name}"
    if not token:
        return DataError(
            "the model is gated and there is no token",
            where=where,
            hint=f"accept its licence at {address}, then run `hf auth login` or set HF_TOKEN",
        )
    text = f"{error} {getattr(error, 'server_message', '')}".lower()
    if "fine-grained" in text or _status(error) == 401:
        return DataError(
            "the model is gated and the token has no right to read gated models",
            where=where,
            hint="give the token that right in its settings (fine-grained tokens have it off), or use a read token",
        )
    return DataError(
        "the model is gated and its licence was not accepted with this account",
        where=where,
        hint=f"accept it at {address}",
    )


def main_dtype(headers: dict[str, TensorHeader]) -> str:
    """The floating dtype most elements have, in torch's words."""
    words = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    counts: Counter[str] = Counter()
    for header in headers.values():
        if header.dtype in words:
            counts[words[header.dtype]] += header.numel
    return counts.most_common(1)[0][0] if counts else "bfloat16"
