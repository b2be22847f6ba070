"""A child process that ends, or is refused an operation, at a chosen point: `crash_driver.py SPEC COMMAND…`.

SPEC is `kill:N` (SIGKILL before the N-th operation of the file layer), `fail:N:ENOSPC`, or `count:FILE` (write the number
of operations). COMMAND is `toy RUN` or the arguments of `isft`, such as `train config.yaml`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

from crash_base import CountOps, FailAt

from iterative_sft_cli.rundir import fs


class KillNow:
    """SIGKILL to this very process before operation `at`."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, op: fs.Op) -> None:
        if op.kind != "ack":
            self.left -= 1
            if self.left == -1:
                os.kill(os.getpid(), signal.SIGKILL)


def run_command(words: list[str]) -> int:
    if words[0] == "toy":
        import toy_loop

        sys.argv = words
        return toy_loop.main()
    from iterative_sft_cli.__main__ import main

    sys.argv = ["isft", *words]
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    return code or 0


def main() -> int:
    kind, _, rest = sys.argv[1].partition(":")
    words = sys.argv[2:]
    if kind == "kill":
        fs.hook = KillNow(int(rest))
    elif kind == "fail":
        at, _, name = rest.partition(":")
        fs.hook = FailAt(int(at), getattr(errno, name))
    elif kind == "count":
        counter = fs.hook = CountOps()
        code = run_command(words)
        Path(rest).write_text(str(len(counter.kinds)))
        return code
    return run_command(words)


if __name__ == "__main__":
    sys.exit(main())
