"""Imports torch once and forks ranks on request: `isft` commands under torchrun's environment, for the price of a fork each.

Requests are lines of JSON on stdin, {"argv", "size", "ranks", "env", "folder"}; the answer names the pids. {"wait": [pids]} answers
their exit statuses.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))


def import_once() -> None:
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import iterative_sft_cli.__main__
    import iterative_sft_cli.build
    import iterative_sft_cli.cli
    import iterative_sft_cli.commands.run_commands
    import iterative_sft_cli.generate.embedded
    import iterative_sft_cli.loop
    import iterative_sft_cli.model
    import iterative_sft_cli.ranks.lead
    import iterative_sft_cli.ranks.worker
    import iterative_sft_cli.train.torch_learner  # noqa: F401


def fork_rank(request: dict, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        out = os.open(f"{request['folder']}/rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if request["size"] > 1:
            place |= {"RANK": str(rank), "WORLD_SIZE": str(request["size"]), "LOCAL_RANK": str(rank)}
        os.environ.update(place | request["env"])
        if "before" in request:
            exec(compile(Path(request["before"]).read_text(), request["before"], "exec"), {"RANK": rank})
        from iterative_sft_cli.cli import run

        status = run(request["argv"])
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    import_once()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in request["wait"]]
        else:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            answer = [fork_rank(request, rank, port) for rank in request["ranks"]]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
