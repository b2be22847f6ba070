"""`isft` and `python -m iterative_sft_cli`: the one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import sys

SPIN_COUNT = "3000"
"""Turns for which a thread of a matrix product waits for the others before it sleeps. libgomp's own 300,000 (some ms) take two to four
times as long where other programs want the cores too, and are hardly faster where none does."""


def main() -> None:
    """Run the command line; never returns."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is loaded
    from iterative_sft_cli.signals import ignore_from_the_end_on, obey_before_the_start

    obey_before_the_start(sys.argv[1:])
    from iterative_sft_cli.cli import run

    code = run(sys.argv[1:])
    ignore_from_the_end_on()
    sys.exit(code)


if __name__ == "__main__":
    main()
