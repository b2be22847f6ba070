"""Whole runs with vLLM servers that isft starts (stand-ins of their own process and port), on one rank and on several."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from rank_helpers import rows, steps, weights_of, write_tiny

FAKE = Path(__file__).resolve().parents[1] / "generate" / "fake_vllm.py"
QUICK = {"ISFT_RANK_PATIENCE_S": "0.3,20,60,60"}
JOURNAL = """
import json, os, tempfile, time
from iterative_sft_cli.train.torch_learner import TorchLearner

tempfile.tempdir = os.path.dirname(os.environ["FAKE_VLLM_JOURNAL"])

def note(event):
    line = {"at": time.time(), "pid": os.getpid(), "who": "trainer", "event": event, "rank": RANK}
    with open(os.environ["FAKE_VLLM_JOURNAL"], "a") as file:
        file.write(json.dumps(line) + "\\n")

leave, reload, made = TorchLearner.offload_weights, TorchLearner.reload, TorchLearner.__init__
def offload_weights(self):
    leave(self)
    held = sum(one.untyped_storage().nbytes() for one in self.loaded.model.parameters())
    note("away" if not held else "stays")
def back(self):
    note("back")
    reload(self)
def make(self, *args, **more):
    note("back")
    made(self, *args, **more)
TorchLearner.offload_weights, TorchLearner.reload, TorchLearner.__init__ = offload_weights, back, make
"""
HOSTS = "from iterative_sft_cli.ranks import servers\nservers.host_key = lambda: f'host {RANK}'\n"
"""Each rank is on a host of its own, as far as it can tell."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama in fp32, which the stand-in computes in numpy."""
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("model") / "fp32", dtype="float32")


def write_python(folder: Path, *faults: str) -> str:
    """An "interpreter" that runs the stand-in; the first servers that start get a fault each."""
    script = folder / "fake-python"
    lines = [f'mkdir "{folder}/fault{n}" 2>/dev/null && set -- "$@" --fault {one}' for n, one in enumerate(faults)]
    claims = "\n".join(f"{line} ||" for line in lines) + " true"
    script.write_text(f'#!/bin/sh\nshift 2\n{claims}\nexec {sys.executable} {FAKE} "$@"\n')
    script.chmod(0o755)
    return str(script)


def write_config(folder: Path, model: Path, *faults: str, vllm=None, **changes) -> Path:
    settings = {"python": write_python(folder, *faults), "servers": 2, **(vllm or {})}
    generate = {"engine": "vllm", "startup_timeout_s": 60, "vllm": settings, "samples_per_prompt": 12}
    changes["train"] = {"offload": "disk", **changes.get("train", {})}
    return write_tiny(folder, "run", model, **{"generate": generate, **changes})


def journal(folder: Path) -> list:
    return rows(folder / "journal") if (folder / "journal").exists() else []


def check_samples(run: Path, count: int = 7 * 12, rounds: int = 2) -> None:
    """Every sample of every round is there once."""
    for number in range(1, rounds + 1):
        ids = [row["sample_id"] for row in rows(run / f"rounds/{number:04d}/generated-00000.jsonl")]
        assert len(ids) == len(set(ids)) == count


def check_apart(found: list) -> None:
    """At no time a trainer and a server have weights in memory."""
    trainers, servers = set(), set()
    for row in sorted(found, key=lambda row: row["at"]):
        if row["who"] == "trainer":
            assert row["event"] in ("back", "away"), row
            (trainers.add if row["event"] == "back" else trainers.discard)(row["pid"])
        elif row["event"] in ("start", "wake"):
            servers.add(row["pid"])
        elif row["event"] in ("stop", "sleep"):
            servers.discard(row["pid"])
        else:
            assert row["pid"] in servers, f"told to load while it should not be there: {row}"
        assert not (trainers and servers), (row, trainers, servers)


def events(found: list, name: str) -> list:
    return [row for row in found if row["event"] == name]


def started(forks, folder, size, config, **more):
    (folder / "before.py").write_text(JOURNAL + more.pop("before", ""))
    env = {"FAKE_VLLM_JOURNAL": str(folder / "journal"), **QUICK, **more}
    return forks.start(folder, size, "train", str(config), before=folder / "before.py", **env)


def test_two_servers_that_end_before_training_and_never_meet_the_trainer(forks, tmp_path, model, said):
    stage = tmp_path / "stage"
    config = write_config(tmp_path, model, vllm={"while_training": "stop", "stage_to": str(stage)})
    assert forks.wait(started(forks, tmp_path, 1, config)) == [0], said(0)
    run, found = tmp_path / "run", journal(tmp_path)
    check_samples(run)
    check_apart(found)
    # round 1, round 2 and the evaluations between: one session each, of two servers
    assert len(events(found, "start")) >= 4 and len(events(found, "away")) == len(events(found, "start")) / 2
    folders = {row["folder"] for row in events(found, "start")}
    assert len(folders) == len(events(found, "away")) and all(str(stage) in one for one in folders)
    assert not list(stage.iterdir()) and not (run / "serving").exists()
    switches = [row for row in rows(run / "telemetry.jsonl") if row["event"] == "switch"]
    assert len(switches) == 2 * len(folders) and all(row["switch_s"] > 0 for row in switches)
    made = [(run / f"vllm-server-{number}.log").read_text() for number in range(2)]
    assert all(text.count("fake vllm") == len(folders) for text in made)


def test_without_stop_they_stay_and_take_new_weights_in_place(forks, tmp_path, model, said):
    config = write_config(tmp_path, model)
    assert forks.wait(started(forks, tmp_path, 1, config)) == [0], said(0)
    found = journal(tmp_path)
    assert len(events(found, "start")) == 2 and len(events(found, "load")) >= 2
    check_samples(tmp_path / "run")


def test_a_server_that_dies_in_mid_phase_is_started_again_apart_from_the_trainer(forks, tmp_path, model, said):
    config = write_config(tmp_path, model, "die_after=9", vllm={"while_training": "stop"}, rounds=1)
    assert forks.wait(started(forks, tmp_path, 1, config, FAKE_VLLM_PAUSE_S="0.02")) == [0], said(0)
    found = journal(tmp_path)
    check_samples(tmp_path / "run", rounds=1)
    check_apart(found)
    # it may still be starting when the other has made all samples
    assert len(events(found, "start")) - 2 * len(events(found, "away")) in (0, 1)
    assert [row["died"] for row in found if "died" in row] == [True]


def test_a_run_that_fails_in_mid_phase_goes_on_apart_too(forks, tmp_path, model, said):
    """Servers die again and again until the run ends, then it is resumed with sound ones."""
    config = write_config(tmp_path, model, *["dies=5"] * 8, vllm={"while_training": "stop"}, rounds=1)
    pids = started(forks, tmp_path, 1, config)
    assert forks.wait(pids) == [4]
    with open(tmp_path / "journal", "a") as file:
        gone = {"at": time.time(), "pid": pids[0], "who": "trainer", "event": "away", "rank": 0}
        file.write(json.dumps(gone) + "\n")
    assert "ended again and again in one shard" in said(0)
    write_python(tmp_path)
    assert forks.wait(started(forks, tmp_path, 1, config)) == [0], said(0)
    check_samples(tmp_path / "run", rounds=1)
    check_apart(journal(tmp_path))


def test_a_killed_run_goes_on_when_its_servers_are_gone(forks, tmp_path, model, said):
    config = write_config(tmp_path, model, vllm={"while_training": "stop"}, rounds=1)
    (pid,) = started(forks, tmp_path, 1, config, FAKE_VLLM_PAUSE_S="0.2", FAKE_VLLM_END_S="10")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("rounds/*/*.journal")):
        assert time.monotonic() < deadline, said(0)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    again = started(forks, tmp_path, 1, config)
    assert forks.wait([pid, *again]) == [-9, 0], said(0)
    check_samples(tmp_path / "run", rounds=1)
    check_apart(journal(tmp_path))  # the killed trainer had left the device and never comes back


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_ranks_of_one_host_have_one_set_of_servers(forks, tmp_path, model, said, parallel):
    """What leaves comes back: the same weights as when all stays where it is."""
    vllm, train = {"while_training": "stop"}, {"parallel": parallel, "optimizer_state": "keep"}
    config = write_config(tmp_path, model, vllm=vllm, train=train)
    assert forks.wait(started(forks, tmp_path, 2, config)) == [0, 0], said(0) + said(1)
    other = tmp_path / "other"
    other.mkdir()
    stays = write_config(other, model, train={**train, "offload": "none"})
    assert forks.run(other, 2, "train", str(stays), **QUICK) == [0, 0]
    for key in ("0001", "0002"):
        first, second = weights_of(tmp_path / "run", key), weights_of(other / "run", key)
        assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
    found = journal(tmp_path)
    check_samples(tmp_path / "run")
    check_apart(found)
    sessions = len([row for row in events(found, "away") if row["rank"] == 0])
    assert len(events(found, "start")) == 2 * sessions
    assert len(events(found, "away")) == 2 * sessions


def test_each_host_has_servers_of_its_own_and_copies_once(forks, tmp_path, model, said):
    """Two "hosts": the servers of the second are tended by its rank, one of them dies in mid-phase, all of them make samples."""
    stage = tmp_path / "stage"
    config = write_config(tmp_path, model, "die_after=5", vllm={"while_training": "stop", "stage_to": str(stage)})
    copies = "from iterative_sft_cli.generate import vllm_weights\ncopied = vllm_weights.shutil.copyfile\n"
    copies += "def copyfile(a, b):\n    note(f'copy {b.name}')\n    return copied(a, b)\n"
    copies += "vllm_weights.shutil.copyfile = copyfile\n"
    before = HOSTS + copies + "vllm_weights.Stage.take = by_host(vllm_weights.Stage.take)\n"
    by_host = (
        "def by_host(take):\n    def call(self, *args):\n        from pathlib import Path\n"
        "        if self.folder.name != f'host{RANK}':\n            self.folder = self.folder / f'host{RANK}'\n"
        "        return take(self, *args)\n    return call\n"
    )
    assert forks.wait(started(forks, tmp_path, 2, config, before=by_host + before, FAKE_VLLM_PAUSE_S="0.02")) == [
        0,
        0,
    ], said(0) + said(1)
    found = journal(tmp_path)
    check_samples(tmp_path / "run")
    check_apart([row for row in found if not row["event"].startswith("copy")])
    sessions = len([row for row in events(found, "away") if row["rank"] == 0])
    starts = events(found, "start")
    assert len(starts) - 4 * sessions in (0, 1) and any("died" in row for row in found)
    for rank in (0, 1):
        assert len([row for row in events(found, "copy model.safetensors") if row["rank"] == rank]) == sessions
        assert len({row["folder"] for row in starts if f"host{rank}" in row["folder"]}) == sessions
    probes = [row["nats"] for row in rows(tmp_path / "run" / "telemetry.jsonl") if row["event"] == "probe"]
    assert len(probes) == sessions and all(len(one) == 4 and max(one.values()) < 1e-3 for one in probes)
    assert steps(tmp_path / "run")


def test_a_host_that_sees_other_weights_than_rank_0_ends_the_run(forks, tmp_path, model, said):
    config = write_config(tmp_path, model, rounds=1)
    torn = (
        "from iterative_sft_cli.generate import vllm_weights\nvllm_weights.SEEN_S = 0.5\n"
        "announced = vllm_weights.Announced.from_json\n"
        "def cut(data):\n    path = announced(data).folder / 'model.safetensors'\n"
        "    path.write_bytes(path.read_bytes()[:-9])\n    return announced(data)\n"
        "vllm_weights.Announced.from_json = cut\n"
    )
    assert forks.wait(started(forks, tmp_path, 2, config, before=HOSTS + torn)) == [4, 4]
    assert "weights to be served are not whole" in said(0) and "were announced" in said(0)
    assert "do all hosts share this folder" in said(0)


def test_a_hosts_servers_end_with_its_rank(forks, tmp_path, model, said):
    config = write_config(tmp_path, model, rounds=1)
    pids = started(forks, tmp_path, 2, config, before=HOSTS, FAKE_VLLM_PAUSE_S="0.3")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("rounds/*/*.journal")):
        assert time.monotonic() < deadline, said(0)
        time.sleep(0.05)
    os.kill(pids[1], signal.SIGKILL)
    assert forks.wait(pids) == [4, -9]
    assert "rank 1" in said(0)
    for row in events(journal(tmp_path), "start"):
        while Path(f"/proc/{row['pid']}").exists():
            assert time.monotonic() < deadline, "a server outlived its rank"
            time.sleep(0.05)


def test_the_config_of_a_gpu_host_is_checked(tmp_path):
    from iterative_sft_cli.config import GenerateConfig
    from iterative_sft_cli.errors import ConfigError
    from iterative_sft_cli.generate.vllm_host import share_gpus

    def shared(gpus: int, **settings):
        section = GenerateConfig(engine="vllm", vllm=settings)
        return share_gpus(section.vllm, [str(n) for n in range(gpus)], on_gpu=True)

    assert shared(4) == [("0",), ("1",), ("2",), ("3",)]
    assert shared(4, tensor_parallel_size=2) == [("0", "1"), ("2", "3")]
    assert shared(4, servers=1, tensor_parallel_size=2) == [("0", "1")]
    for gpus, settings in ((4, {"tensor_parallel_size": 3}), (1, {"tensor_parallel_size": 2}), (2, {"servers": 3})):
        with pytest.raises(ConfigError, match=f"{gpus} visible GPU") as error:
            shared(gpus, **settings)
        assert error.value.exit_code == 2 and error.value.expected
