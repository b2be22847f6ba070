"""What a filter's verdicts depend on besides its arguments: the hash of its code."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from iterative_sft_cli.plugin_import import FILE_MODULE


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
        if beside or (module.startswith(FILE_MODULE) and str(Path(source).parent) == folder):
            try:
                code = Path(source).read_bytes()
            except OSError:
                continue
            digest.update(f"{Path(source).name}\x00".encode() + code + b"\x00")
            mentions_scores = mentions_scores or b"scores" in code
    return digest.hexdigest(), mentions_scores
