"""Imports the code that a filter's place names; each way to fail has a message of its own.

Runs in workers, and in the main process only for plug-ins that declare `in_process = True`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from iterative_sft_cli.filters.contract import did_you_mean

OURS = str(Path(__file__).resolve().parents[1])


class NotFound(Exception):
    """The module or the attribute does not exist: the name in the config is wrong."""


class ImportBroken(Exception):
    """The module exists and raised while it was imported."""


def load_target(module: str | None, path: str | None, attribute: str) -> Any:
    """The function or class. Raises NotFound or ImportBroken."""
    loaded = _from_file(path) if path is not None else _from_module(str(module))
    target: Any = loaded
    for part in attribute.split("."):
        try:
            target = getattr(target, part)
        except AttributeError:
            names = [name for name in dir(target) if not name.startswith("_")]
            raise NotFound(f"{path or module} has no attribute `{part}`.{did_you_mean(part, names)}") from None
    return target


def _from_file(path: str) -> ModuleType:
    name = f"isft_filter_{hashlib.sha256(path.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise NotFound(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # last, so that a helper beside the file is found and a file named like a library hides nothing
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise _broken(path, error) from error
    return module


def _from_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(missing + "."):
            raise NotFound(
                f"there is no module `{missing}`; is its package installed in {sys.prefix}? "
                "A file is named path/file.py:attr"
            ) from None
        raise _broken(name, error) from error
    except BaseException as error:
        raise _broken(name, error) from error


def _broken(name: str, error: BaseException) -> ImportBroken:
    return ImportBroken(f"an error inside the import of {name}: {explain(error)}")


def explain(error: BaseException) -> str:
    """`ValueError: text (file.py:12, in f)`: the innermost line of the plug-in's own code, bounded."""
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be read)"
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((OURS, "<frozen importlib"))
    ]
    place = f" ({own[-1].filename}:{own[-1].lineno}, in {own[-1].name})" if own else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({error.filename}:{error.lineno})"
    return f"{type(error).__name__}: {text[:1500]}{place}"


def source_hash(module: str, extra: str = "") -> tuple[str, bool]:
    """(hash of the code that a filter consists of, whether that code mentions scores).

    The code is the filter's module and those loaded from its own package or folder; `extra` is hashed too.
    """
    home = sys.modules[module]
    file = getattr(home, "__file__", None)
    digest = hashlib.sha256(extra.encode())
    if file is None:
        return digest.hexdigest(), True
    mentions_scores = False
    folder, package = str(Path(file).parent), module.partition(".")[0]
    for name in sorted(sys.modules):
        source = getattr(sys.modules[name], "__file__", None)
        if not isinstance(source, str) or not source.endswith(".py"):
            continue
        beside = name == module or name.partition(".")[0] == package
        if beside or (module.startswith("isft_filter_") and str(Path(source).parent) == folder):
            try:
                code = Path(source).read_bytes()
            except OSError:
                continue
            digest.update(f"{Path(source).name}\x00".encode() + code + b"\x00")
            mentions_scores = mentions_scores or b"scores" in code
    return digest.hexdigest(), mentions_scores
