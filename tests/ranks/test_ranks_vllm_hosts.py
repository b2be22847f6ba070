"""vLLM servers (stand-ins) on two hosts: network namespaces with a cable between them, which only root can make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rank_helpers import rows, write_tiny
from test_ranks_vllm import check_samples, events, journal, model, write_python  # noqa: F401

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
HOSTS = {"isft-s-a": "10.231.11.1", "isft-s-b": "10.231.11.2"}


def ip(*arguments: str) -> bool:
    try:
        return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture
def two_hosts():
    for name in HOSTS:
        ip("netns", "del", name)
    if not all(ip("netns", "add", name) for name in HOSTS):
        pytest.skip("network namespaces cannot be made here (needs root and iproute2)")
    first, second = HOSTS
    ip("link", "add", "isft-sa", "netns", first, "type", "veth", "peer", "name", "isft-sb", "netns", second)
    for name, device in zip(HOSTS, ("isft-sa", "isft-sb"), strict=True):
        assert ip("-n", name, "addr", "add", f"{HOSTS[name]}/24", "dev", device)
        for one in (device, "lo"):
            assert ip("-n", name, "link", "set", one, "up")
    yield
    for name in HOSTS:
        ip("netns", "del", name)


def test_each_host_serves_in_the_jobs_network(two_hosts, tmp_path, model, said):  # noqa: F811
    """Three ranks, two of them on the second host: one tends its servers, bound to its address, and rank 0 asks all four."""
    generate = {"engine": "vllm", "samples_per_prompt": 20, "vllm": {"python": write_python(tmp_path), "servers": 2}}
    config = write_tiny(tmp_path, "run", model, generate=generate)
    started = []
    for rank, name in enumerate(("isft-s-a", "isft-s-b", "isft-s-b")):
        place = {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(max(0, rank - 1)), "MASTER_PORT": "29893"}
        more = {
            "MASTER_ADDR": HOSTS["isft-s-a"],
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(tmp_path),
        }
        more |= {"FAKE_VLLM_JOURNAL": str(tmp_path / "journal"), "FAKE_VLLM_PAUSE_S": "0.05"}
        out = open(tmp_path / f"rank{rank}.txt", "ab")
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "iterative_sft_cli", "train", str(config)]
        started.append(subprocess.Popen(command, env={**os.environ, **place, **more}, stdout=out, stderr=out))
    assert [one.wait(300) for one in started] == [0, 0, 0], said(0) + said(1) + said(2)
    check_samples(tmp_path / "run", 7 * 20)
    hosts = [row["host"] for row in events(journal(tmp_path), "start")]
    assert sorted(hosts) == ["10.231.11.2"] * 2 + ["127.0.0.1"] * 2
    (first, *_) = [row["nats"] for row in rows(tmp_path / "run" / "telemetry.jsonl") if row["event"] == "probe"]
    assert sum(url.startswith("http://10.231.11.2:") for url in first) == 2
