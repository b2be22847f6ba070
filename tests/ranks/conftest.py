"""Ranks as forked processes of one parent that has torch imported, and experiments for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


class Forks:
    """Starts ranks in a zygote and waits for them."""

    def __init__(self) -> None:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        environ["PYTHONPATH"] = f"{HERE.parents[1]}{os.pathsep}{environ.get('PYTHONPATH', '')}"
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environ.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, folder: Path, size: int, *argv: str, before: Path | None = None, **env: str) -> list[int]:
        """The pids of `size` ranks of one `isft` command; what rank r prints is appended to `folder/rank{r}.txt`."""
        request = {"argv": list(argv), "size": size, "env": env, "folder": str(folder)}
        return self._ask(request if before is None else {**request, "before": str(before)})

    def wait(self, pids: list[int]) -> list[int]:
        """Their exit codes, negative for a signal."""
        return self._ask({"wait": pids})

    def run(self, folder: Path, size: int, *argv: str, **options: Any) -> list[int]:
        """Start and wait."""
        return self.wait(self.start(folder, size, *argv, **options))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    found = Forks()
    yield found
    found.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    from tiny import save_tiny

    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture
def said(tmp_path: Path) -> Any:
    """What a rank printed."""
    return lambda rank: (tmp_path / f"rank{rank}.txt").read_text()
