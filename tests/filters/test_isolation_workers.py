"""What a call changes is undone, what it leaves behind ends, and workers are replaced: the run is not changed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plugin_runs import HERE, plugin, run

from iterative_sft_cli.errors import PluginError
from iterative_sft_cli.filters import Runtime
from iterative_sft_cli.filters.resolved import Location
from iterative_sft_cli.types import Sample

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="process groups and limits are POSIX"),
    pytest.mark.usefixtures("misbehaving_importable"),
]


def three(make_sample: Callable[..., Sample]) -> list[Sample]:
    return [make_sample("same", i=i, row={"question": "q"}) for i in range(3)]


def test_what_a_call_changes_is_undone_before_the_next(make_sample: Callable[..., Sample], monkeypatch: Any) -> None:
    group = three(make_sample)
    assert [one.keep for one in run(plugin("mutates_row"), group)] == [True] * 3
    assert group[0].row == {"question": "q"}
    assert len({one.extra["cwd"] for one in run(plugin("changes_folder"), group)}) == 1
    assert len({one.extra["locale"] for one in run(plugin("changes_locale"), group)}) == 1
    assert {one.extra["before"] for one in run(plugin("changes_environment"), group)} == {""}
    assert [one.keep for one in run(plugin("changes_streams"), group)] == [True] * 3
    assert [one.keep for one in run(plugin("breaks_json"), group)] == [True] * 3
    assert {one.extra["read"] for one in run(plugin("reads_stdin"), group)} == {""}
    assert [one.keep for one in run(plugin("prints_a_little"), group)] == [True] * 3
    assert [one.keep for one in run(plugin("leaves_thread"), group)] == [True] * 3
    monkeypatch.chdir(HERE)
    folders = {one.extra["folder"] for one in run(plugin("writes_file"), group)}
    assert not any(Path(folder).exists() for folder in folders)
    assert not (HERE / "left_behind.txt").exists()


def test_randomness_and_hash_order_are_functions_of_the_sample(make_sample: Callable[..., Sample]) -> None:
    group = three(make_sample)
    first = [one.extra["draw"] for one in run(plugin("changes_seed"), group)]
    alone = [run(plugin("changes_seed"), [sample])[0].extra["draw"] for sample in reversed(group)]
    assert first == alone[::-1]
    assert len(set(first)) == 3
    assert len({run(plugin("depends_on_hash_order"), group[:1])[0].extra["first"] for _ in range(3)}) == 1


def test_an_alarm_does_not_reach_the_next_call(make_sample: Callable[..., Sample]) -> None:
    with Runtime() as runtime:
        for i in range(3):
            assert run(plugin("sets_alarm"), [make_sample(i=i)], runtime=runtime)[0].keep is True
            [pool] = runtime._pools.values()
            time.sleep(0.3)
            assert pool._workers[0]._link.process.poll() is None


def test_a_worker_that_ends_between_calls_is_replaced(make_sample: Callable[..., Sample]) -> None:
    with Runtime() as runtime:
        for i in range(3):
            assert run(plugin("ends_later"), [make_sample(i=i)], runtime=runtime)[0].keep is True
            time.sleep(0.4)


@pytest.mark.parametrize("name", ["leaves_process", "leaves_fork"])
def test_processes_left_behind_end_with_the_worker(name: str, make_sample: Callable[..., Sample]) -> None:
    pid = run(plugin(name), [make_sample()])[0].extra["pid"]
    for _ in range(250):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} is still there")


def test_only_listed_environment_variables_reach_a_worker(
    make_sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GRADER_API_KEY"):
        monkeypatch.setenv(name, "hf_" + "x" * 30)
    names = run(plugin("reads_environment"), [make_sample()])[0].extra["names"]
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GRADER_API_KEY"} & set(names)
    names = run(plugin("reads_environment", env=("GRADER_API_KEY",)), [make_sample()])[0].extra["names"]
    assert "GRADER_API_KEY" in names and "HF_TOKEN" not in names


@pytest.mark.parametrize("name", ["leaks_in_extra", "leaks_in_error", "leaks_in_output", "LeaksInSetup"])
def test_a_key_that_a_filter_gives_away_comes_back_hidden(
    name: str, make_sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = 'sk-"quoted\\secret\u00e9'
    monkeypatch.setenv("GRADER_KEY", secret)
    one = plugin(name, env=("GRADER_KEY",))
    try:
        said = repr(run(one, [make_sample()], cache_dir=tmp_path)[0])
    except PluginError as error:
        said = str(error)
    assert "secret" not in said and "[hidden]" in said
    assert not any(b"secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_a_failure_does_not_wait_for_hung_calls(make_sample: Callable[..., Sample]) -> None:
    many = [make_sample("BAD", i=i, prompt=f"p{i}") for i in range(100)]
    start = time.monotonic()
    with pytest.raises(PluginError, match="took longer than 0.3 s"):
        run(plugin("hangs_asleep", timeout_s=0.3, workers=2), many)
    assert time.monotonic() - start < 5


def test_after_a_failure_a_shared_runtime_is_free_again(make_sample: Callable[..., Sample]) -> None:
    many = [make_sample("BAD", i=i, prompt=f"p{i}") for i in range(100)]
    with Runtime() as runtime:
        with pytest.raises(PluginError, match="took longer than 0.3 s"):
            run(plugin("hangs_asleep", timeout_s=0.3, workers=2), many, runtime=runtime)
        start = time.monotonic()
        good = [make_sample("good", i=i) for i in range(4)]
        assert all(one.keep for one in run(plugin("hangs_asleep", timeout_s=0.3, workers=2), good, runtime=runtime))
        assert time.monotonic() - start < 3


def test_a_machine_without_room_for_workers_is_told(
    make_sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    from iterative_sft_cli.errors import StorageError
    from iterative_sft_cli.filters import processes

    def no_process(*args: Any, **options: Any) -> Any:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(processes, "start", no_process)
    with pytest.raises(StorageError, match="no worker process can be started for the filter `raises`: Resource"):
        run(plugin("raises"), [make_sample()])


def test_a_worker_runs_this_copy_of_the_package(make_sample: Callable[..., Sample], tmp_path: Path) -> None:
    import iterative_sft_cli

    (tmp_path / "where.py").write_text(
        "import sys, iterative_sft_cli\nfrom iterative_sft_cli.types import Verdict\n"
        "def where(sample):\n    return Verdict(True, extra={'file': iterative_sft_cli.__file__, 'path': sys.path})\n"
    )
    (tmp_path / "iterative_sft_cli").mkdir()
    (tmp_path / "iterative_sft_cli" / "__init__.py").write_text("raise RuntimeError('another copy')")
    extra = run(plugin("raises", location=Location("where", path=str(tmp_path / "where.py"))), [make_sample()])[0].extra
    assert extra["file"] == iterative_sft_cli.__file__


def test_a_round_of_many_verdicts_comes_in_parts(make_sample: Callable[..., Sample]) -> None:
    many = [make_sample("x", i=i) for i in range(12_001)]
    says = run(plugin("returns_wide_reply"), many)
    assert [one.score for one in says] == [float(i) for i in range(12_001)]


def test_workers_end_when_the_main_process_is_killed(tmp_path: Path) -> None:
    import signal
    import subprocess
    import sys

    script = tmp_path / "main.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parents[1])!r}]\n"
        "import threading, time\n"
        "from test_isolation import plugin\n"
        "from filter_samples import new_sample as make_sample\n"
        "from iterative_sft_cli.filters import FilterChain\n"
        "chain = FilterChain([plugin('hangs_asleep')], seed=0, round_index=1)\n"
        "shard = chain.open_shard(); shard.submit(make_sample('BAD'))\n"
        "print('ready', flush=True); time.sleep(100)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    time.sleep(0.4)
    children = Path(f"/proc/{parent.pid}/task")
    workers = [int(pid) for task in children.iterdir() for pid in (task / "children").read_text().split()]
    assert workers
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    time.sleep(0.3)
    assert not [
        pid
        for pid in workers
        if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    ]
