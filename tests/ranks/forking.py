"""Ranks as forked processes of one parent that has torch imported (zygote.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Forks:
    """Starts ranks in a zygote and waits for them."""

    def __init__(self, *prefix: str) -> None:
        """`prefix`: the words of a command that runs another, such as `ip netns exec`."""
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        environ["PYTHONPATH"] = f"{HERE.parents[1]}{os.pathsep}{environ.get('PYTHONPATH', '')}"
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environ.pop(name, None)
        self._process = subprocess.Popen(
            [*prefix, sys.executable, str(HERE / "zygote.py")],
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

    def start(
        self,
        folder: Path,
        size: int,
        *argv: str,
        before: Path | None = None,
        ranks: list[int] | None = None,
        **env: str,
    ) -> list[int]:
        """The pids of `size` ranks, or of those of them in `ranks`, of one `isft` command.

        What rank r prints is appended to `folder/rank{r}.txt`. `before` is a file of Python to run first.
        """
        chosen = list(range(size)) if ranks is None else ranks
        request = {"argv": list(argv), "size": size, "ranks": chosen, "env": env, "folder": str(folder)}
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
