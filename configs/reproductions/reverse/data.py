"""Strings to reverse: the data of the study of copying, with another task."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("copy_data", Path(__file__).resolve().parent.parent / "copy" / "data.py")
_copying = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_copying)
prompts = _copying.prompts


def prepare(out: Path) -> None:
    _copying.prepare(out, kind="reverse")
