"""`isft` and `python -m iterative_sft_cli`: the one place where errors become messages and exit codes."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; never returns."""
    from iterative_sft_cli.signals import ignore_from_the_end_on, obey_before_the_start

    obey_before_the_start(sys.argv[1:])
    from iterative_sft_cli.cli import run

    code = run(sys.argv[1:])
    ignore_from_the_end_on()
    sys.exit(code)


if __name__ == "__main__":
    main()
