"""Which process of how many: the environments of torchrun, accelerate and srun, and those that only look like them."""

import pytest

from iterative_sft_cli.errors import ConfigError
from iterative_sft_cli.ranks.lead import choose_placement
from iterative_sft_cli.ranks.placement import check_launcher, find_placement, first_host, interface_towards

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],big1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
}


def test_torchrun_and_accelerate():
    found = find_placement(TORCHRUN)
    assert (found.rank, found.size, found.local_rank, found.address, found.port) == (3, 4, 1, "node1", 29500)


def test_srun_agrees_on_host_and_port_on_every_task():
    found = [find_placement({**SRUN, "SLURM_PROCID": str(n)}) for n in range(8)]
    assert [one.rank for one in found] == list(range(8))
    assert {(one.size, one.address, one.port) for one in found} == {(8, "gpu07", found[0].port)}
    assert 20_000 <= found[0].port < 40_000 and found[0].launcher == "srun"
    other = find_placement({**SRUN, "SLURM_STEP_ID": "3"})
    assert other.port != found[0].port
    assert find_placement({**SRUN, "MASTER_PORT": "4711", "MASTER_ADDR": "x"}).port == 4711


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "4"},
        # a batch script, or `srun --pty` for one shell
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[1-2]"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_a_process_that_nobody_started_as_one_of_several_is_alone(environ):
    assert find_placement(environ) is None


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({**TORCHRUN, "RANK": "4"}, "rank 4 of 4"),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, "WORLD_SIZE=four"),
        ({**TORCHRUN, "MASTER_PORT": "$(id)"}, "not a number"),
        ({**SRUN, "SLURM_STEP_NODELIST": "[1-2]"}, "no host"),
    ],
)
def test_an_environment_that_is_not_whole_is_said(environ, word):
    with pytest.raises(ConfigError, match=word.replace("(", r"\(").replace("$", r"\$")):
        find_placement(environ)


def test_accelerate_and_the_config_name_one_strategy():
    check_launcher("auto", {})
    check_launcher("fsdp2", {"ACCELERATE_USE_FSDP": "true"})
    check_launcher("ddp", {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "false"})
    for parallel in ("auto", "ddp"):
        with pytest.raises(ConfigError, match=f"train.parallel is {parallel}"):
            check_launcher(parallel, {"ACCELERATE_USE_FSDP": "true"})
    with pytest.raises(ConfigError, match="DeepSpeed"):
        check_launcher("fsdp2", {"ACCELERATE_USE_DEEPSPEED": "true"})


def test_first_host():
    for nodes, first in [("a", "a"), ("a,b", "a"), ("n[3,5-7]", "n3"), ("n[03-05].hpc.org,x", "n03.hpc.org")]:
        assert first_host(nodes) == first


def test_interface_towards_rank_0():
    routes = (
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t0102000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "ib0\t0000640A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
    )
    assert interface_towards("10.100.3.4", routes) == "ib0"
    assert interface_towards("8.8.8.8", routes) == "eth0"
    assert interface_towards("127.0.0.1", routes) == "lo"
    assert interface_towards("fe80::1", routes) is None


def test_gpus_and_a_launcher_are_one_too_many(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="torchrun started 4 processes"):
        choose_placement("2")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_gpus_is_a_number_or_all(text):
    with pytest.raises(ConfigError, match="--gpus"):
        choose_placement(text)


def test_gpus_starts_here(monkeypatch):
    import torch

    assert choose_placement("1") is None and choose_placement(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_placement("all").size == 2
    with pytest.raises(ConfigError, match="there are 2 here"):
        choose_placement("3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_placement("3").size == 3 and choose_placement("all") is None
