"""Which process of how many this is, as torchrun, accelerate or srun say it in environment variables.

Guarantee: a process that nothing started as one of several is alone, whatever else is in its environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from iterative_sft_cli.errors import ConfigError

FIRST_PORT, NUM_PORTS = 20_000, 20_000
"""Under srun the port is a function of job and step, so that every task knows it and two jobs on a node differ."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A process among `size`: `rank` of all, `local_rank` on its host; the store is at `address`:`port`.

    `launcher` says who started it: torchrun (and accelerate), srun, or isft itself.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    launcher: str


def find_placement(environ: Mapping[str, str] = os.environ) -> Placement | None:
    """The placement of this process; None when it is alone. Raises ConfigError for an environment that is not whole."""
    if int(_number(environ, "WORLD_SIZE", "1")) > 1 and "RANK" in environ:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if missing:
            raise ConfigError(
                f"RANK and WORLD_SIZE are set but {missing[0]} is not",
                where="environment",
                expected="what torchrun or accelerate launch set",
                hint="unset RANK and WORLD_SIZE to run one process",
            )
        return _checked(
            Placement(
                rank=_number(environ, "RANK"),
                size=_number(environ, "WORLD_SIZE"),
                local_rank=_number(environ, "LOCAL_RANK", "0"),
                address=environ["MASTER_ADDR"],
                port=_number(environ, "MASTER_PORT"),
                launcher=environ.get("ISFT_LAUNCHER", "torchrun"),
            )
        )
    # SLURM_NTASKS is there in a batch script too, where nothing else was started: only srun counts its step's tasks
    if _number(environ, "SLURM_STEP_NUM_TASKS", "1") > 1 and "SLURM_PROCID" in environ:
        hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        address = environ.get("MASTER_ADDR") or first_host(hosts)
        number = _number(environ, "SLURM_JOB_ID", "0") * 31 + _number(environ, "SLURM_STEP_ID", "0")
        return _checked(
            Placement(
                rank=_number(environ, "SLURM_PROCID"),
                size=_number(environ, "SLURM_STEP_NUM_TASKS"),
                local_rank=_number(environ, "SLURM_LOCALID", "0"),
                address=address,
                port=_number(environ, "MASTER_PORT", str(FIRST_PORT + number % NUM_PORTS)),
                launcher="srun",
            )
        )
    return None


def check_launcher(parallel: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError when accelerate was told another strategy than `parallel`, which is what `train.parallel` says."""
    said = [
        name for name in ("FSDP", "DEEPSPEED") if environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1")
    ]
    if "DEEPSPEED" in said:
        raise ConfigError(
            "accelerate was told to use DeepSpeed, whose checkpoints are pickles",
            where="environment",
            expected="accelerate's MULTI_GPU or FSDP",
            hint="train.parallel: fsdp2 cuts what its ZeRO-3 cuts; launch with --use_fsdp or --multi_gpu",
        )
    if "FSDP" in said and parallel != "fsdp2":
        raise ConfigError(
            f"accelerate was told to use FSDP, and train.parallel is {parallel}, a whole copy on each process",
            where="environment",
            hint="set train.parallel: fsdp2, or launch with --multi_gpu",
        )


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name) or default
    if text is None or re.fullmatch(r"[0-9]{1,12}", text) is None:
        raise ConfigError(f"{name}={text or ''} is not a number", where="environment", expected="a whole number")
    return int(text)


def _checked(placement: Placement) -> Placement:
    if placement.rank >= placement.size:
        raise ConfigError(
            f"rank {placement.rank} of {placement.size}", where="environment", expected="a rank below the size"
        )
    return placement


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list such as `gpu[03-05,9],login1`. Raises ConfigError for what is none."""
    match = re.match(r"([A-Za-z0-9._-]+)(?:\[([0-9]+)[^\]]*\]([A-Za-z0-9._-]*))?", nodes)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r} names no host", where="environment", expected="host[01-04]")
    return match[1] + (match[2] or "") + (match[3] or "")


def interface_towards(address: str, routes: str) -> str | None:
    """The network interface that packets to the IPv4 `address` leave by; `routes` is the text of /proc/net/route."""
    parts = [int(part) for part in address.split(".")] if re.fullmatch(r"[0-9]+(\.[0-9]+){3}", address) else []
    if len(parts) != 4:
        return None
    if parts[0] == 127:
        return "lo"
    wanted = int.from_bytes(bytes(parts), "little")
    best: tuple[int, str] | None = None
    for line in routes.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8:
            continue
        destination, mask = int(fields[1], 16), int(fields[7], 16)
        if wanted & mask == destination and (best is None or mask.bit_count() > best[0]):
            best = (mask.bit_count(), fields[0])
    return best[1] if best else None
