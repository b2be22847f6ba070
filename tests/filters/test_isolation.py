"""What plug-ins do wrong is a named error with the prompt, or undone; never a score, a hang or a changed run."""

from __future__ import annotations

import locale
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iterative_sft_cli.errors import EXIT_PLUGIN, PluginError
from iterative_sft_cli.filters import FilterChain, ResolvedFilter, Runtime
from iterative_sft_cli.filters.contract import inspect_filter
from iterative_sft_cli.filters.resolved import Location
from iterative_sft_cli.types import Sample

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups and limits are POSIX")

HERE = Path(__file__).parent


def plugin(attribute: str, **options: Any) -> ResolvedFilter:
    """A filter of misbehaving.py without the resolving worker."""
    import misbehaving

    shape = inspect_filter(getattr(misbehaving, attribute))
    fields = {
        "name": attribute,
        "use": f"misbehaving.py:{attribute}",
        "key": "filters[3]",
        "kind": shape.kind,
        "role": "verifier",
        "arguments": {},
        "shape": shape,
        "spec": None,
        "location": Location(attribute, path=str(HERE / "misbehaving.py")),
        "target": None,
        "isolated": True,
        "prefix_stable": False,
        "reads": frozenset(),
        "source_hash": "0",
        "timeout_s": 20.0,
        "startup_timeout_s": 20.0,
        "workers": 1,
    }
    return ResolvedFilter(**{**fields, **options})


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def samples(make_sample: Callable[..., Sample]) -> list[Sample]:
    texts = ["good", "BAD", "good"]
    return [make_sample(text, i=i, prompt=f"p{i}", row={"question": "q"}) for i, text in enumerate(texts)]


def run(one: ResolvedFilter, samples: list[Sample], **options: Any) -> list[Any]:
    with FilterChain([one], seed=0, round_index=1, **options) as chain:
        judged = chain.open_shard().finish(samples)
        later = chain.finish_round(judged)
    return [(j.says or tuple(later[j.sample.sample_id]))[0] for j in judged]


ERRORS: dict[str, tuple[str, dict[str, Any]]] = {
    "raises": ("it raised ValueError: seven is not eight (", {}),
    "raises_unprintable": ("it raised Unprintable: (its message cannot be read)", {}),
    "raises_system_exit": ("it raised SystemExit: 0", {}),
    "calls_sys_exit": ("it raised SystemExit: enough", {}),
    "raises_keyboard_interrupt": ("it raised KeyboardInterrupt", {}),
    "raises_base_exception": ("it raised BaseException: base", {}),
    "exits_zero": ("it ended its process with exit code 0", {}),
    "exits_three": ("it ended its process with exit code 3", {}),
    "kills_itself": ("its process was ended by SIGKILL", {}),
    "kills_its_group": ("its process was ended by SIGTERM", {}),
    "crashes_in_c": ("its process was ended by SIGSEGV (a crash in native code)", {}),
    "aborts": ("its process was ended by SIGABRT (a crash in native code)", {}),
    "stops_itself": ("it took longer than 0.3 s (timeout_s)", {"timeout_s": 0.3}),
    "hangs_in_python": ("it took longer than 0.3 s (timeout_s)", {"timeout_s": 0.3}),
    "hangs_asleep": ("it took longer than 0.3 s (timeout_s)", {"timeout_s": 0.3}),
    "hangs_in_c": ("it took longer than 0.3 s (timeout_s)", {"timeout_s": 0.3}),
    "hangs_without_signals": ("it took longer than 0.3 s (timeout_s)", {"timeout_s": 0.3}),
    "deadlocks": ("it took longer than 0.3 s (timeout_s)", {"timeout_s": 0.3}),
    "swallows_everything": ("it took longer than 0.3 s (timeout_s)", {"timeout_s": 0.3}),
    "fork_bomb": ("one call started more than 64 processes", {}),
    "process_bomb": ("more than 128", {}),
    "allocates_10_gb": ("it raised MemoryError", {"memory_gb": 1.0}),
    "grows_slowly": ("more than 0.3 (memory_gb)", {"memory_gb": 0.3, "device": "cuda"}),
    "recurses": ("it raised RecursionError", {}),
    "returns_none": ("it returned None (is a `return` missing?)", {}),
    "returns_nan": ("it returned nan, expected a finite score", {}),
    "returns_inf": ("it returned inf, expected a finite score", {}),
    "returns_int": ("it returned the int 1", {}),
    "returns_text": ("it returned a str", {}),
    "returns_numpy": ("it returned a numpy.float64", {}),
    "returns_tensor": (".Tensor, expected a bool, a float or a Verdict", {}),
    "returns_dict": ("it returned a dict", {}),
    "returns_tuple": ("it returned a tuple", {}),
    "returns_generator": ("it returned a generator", {}),
    "returns_coroutine": ("it returned a coroutine", {}),
    "returns_function": ("it returned a function", {}),
    "verdict_nan": ("Verdict.score must be finite", {}),
    "verdict_int_keep": ("Verdict.keep must be a bool", {}),
    "verdict_forged": ("Verdict.keep is a str, expected a bool", {}),
    "verdict_forged_score": ("Verdict.score is a str", {}),
    "extra_object": ("Verdict.extra cannot be stored as JSON", {}),
    "extra_nan": ("Verdict.extra cannot be stored as JSON", {}),
    "extra_huge": ("Verdict.extra takes 1000009 bytes", {}),
    "extra_cycle": ("Verdict.extra cannot be stored as JSON", {}),
    "reason_essay": ("Verdict.reason has 800 characters", {}),
    "reason_escape": ("Verdict.reason has 8 characters or unprintable ones", {}),
    "reason_number": ("Verdict.reason is a int", {}),
    "mutates_field": ("it raised FrozenInstanceError", {}),
    "closes_all_descriptors": ("it ended its process with exit code", {}),
    "prints_one_gb": ("it printed more than 64 MB in one call", {}),
    "writes_everywhere": ("it wrote into the connection to isft", {}),
}


def test_there_are_at_least_forty() -> None:
    assert len(ERRORS) >= 40


@pytest.mark.parametrize("name", ERRORS)
def test_a_misbehaving_filter_is_a_named_error(name: str, samples: list[Sample]) -> None:
    cause, options = ERRORS[name]
    before = (os.getcwd(), random.getstate(), locale.setlocale(locale.LC_ALL), dict(os.environ))
    start = time.monotonic()
    with pytest.raises(PluginError) as caught:
        run(plugin(name, **options), samples)
    assert cause in caught.value.what
    assert f"the filter `{name}` failed on prompt p1 (sample 1-p1-1)" in caught.value.what
    assert caught.value.where == f"filters[3]: misbehaving.py:{name}"
    assert caught.value.exit_code == EXIT_PLUGIN
    assert time.monotonic() - start < 15
    assert before == (os.getcwd(), random.getstate(), locale.setlocale(locale.LC_ALL), dict(os.environ))


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("group_short", "it returned 2 verdicts for 3 samples"),
        ("group_long", "it returned 4 verdicts for 3 samples"),
        ("group_empty", "it returned 0 verdicts for 3 samples"),
        ("group_none", "verdict 0 of 3: it returned None"),
        ("group_one_bool", "it returned a bool, expected a list of verdicts"),
        ("group_generator", "it returned a generator, expected a list of verdicts"),
        ("group_ids_twice", "it returned a dict, expected a list of verdicts"),
        ("group_exits", "it ended its process with exit code 0"),
        ("group_hangs", "it took longer than 0.3 s"),
    ],
)
def test_a_misbehaving_group_filter_names_the_prompt(name: str, cause: str, make_sample: Callable[..., Sample]) -> None:
    group = [make_sample("x", i=i, prompt="p7") for i in range(3)]
    with pytest.raises(PluginError) as caught:
        run(plugin(name, timeout_s=0.3 if "hangs" in name else 20.0), group)
    assert f"the filter `{name}` failed on prompt p7: {cause}" in caught.value.what


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("samples_short", "it returned 1 verdicts for 3 samples"),
        ("samples_hangs", "it took longer than 0.3 s"),
        ("samples_raises", "it raised IndexError"),
    ],
)
def test_a_misbehaving_round_filter_is_a_named_error(name: str, cause: str, samples: list[Sample]) -> None:
    with pytest.raises(PluginError) as caught:
        run(plugin(name, timeout_s=0.3 if "hangs" in name else 20.0), samples)
    assert f"the filter `{name}` failed on the round: {cause}" in caught.value.what


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("SetupRaises", "cannot be used: its set-up raised OSError: no such model"),
        ("SetupExits", "did not start: it ended its process with exit code 7"),
        ("SetupHangs", "did not start: it took longer than 0.5 s (startup_timeout_s)"),
    ],
)
def test_a_filter_that_cannot_be_set_up_ends_the_run(name: str, cause: str, samples: list[Sample]) -> None:
    with pytest.raises(PluginError) as caught:
        run(plugin(name, startup_timeout_s=0.5 if "Hangs" in name else 20.0, on_error="drop"), samples)
    assert cause in caught.value.what


def test_the_last_output_stands_in_the_error(samples: list[Sample]) -> None:
    with pytest.raises(PluginError) as caught:
        run(plugin("exits_three"), samples)
    assert caught.value.what.endswith("its last output:\nlast words")
    with pytest.raises(PluginError) as caught:
        run(plugin("raises"), samples)
    assert "its last output:\nabout to fail on 1-p1-1" in caught.value.what


@pytest.mark.parametrize("name", ["hangs_in_python", "hangs_asleep", "hangs_in_c", "deadlocks"])
def test_a_hung_filter_is_tried_twice_and_its_stacks_are_shown(name: str, samples: list[Sample]) -> None:
    with pytest.raises(PluginError) as caught:
        run(plugin(name, timeout_s=0.3), samples)
    assert "it took longer than 0.3 s (timeout_s), twice\nits last output:\n" in caught.value.what
    assert f"in {name}" in caught.value.what and "misbehaving.py" in caught.value.what


def test_a_filter_that_hangs_once_changes_nothing(tmp_path: Path, make_sample: Callable[..., Sample]) -> None:
    marker = tmp_path / "hung"
    code = tmp_path / "sleepy.py"
    code.write_text(
        "import pathlib, time\n"
        "def sleepy(sample):\n"
        f"    marker = pathlib.Path({str(marker)!r})\n"
        "    if not marker.exists():\n"
        "        marker.write_text('')\n"
        "        time.sleep(60)\n"
        "    return True\n"
    )
    namespace: dict[str, Any] = {}
    exec(code.read_text(), namespace)
    shape = inspect_filter(namespace["sleepy"])
    one = plugin("raises", location=Location("sleepy", path=str(code)), shape=shape, name="sleepy", timeout_s=0.3)
    assert run(one, [make_sample()])[0].keep is True and marker.exists()


def test_on_error_drop_keeps_the_others_and_gives_no_score(samples: list[Sample]) -> None:
    says = run(plugin("raises", on_error="drop"), samples)
    assert [one.keep for one in says] == [True, False, True]
    assert (says[1].reason, says[1].score) == ("plugin_error", None)
    assert "seven is not eight" in says[1].extra["error"]
    says = run(plugin("hangs_asleep", on_error="drop", timeout_s=0.3), samples)
    assert [(one.keep, one.reason, one.score) for one in says] == [
        (True, None, None),
        (False, "timeout", None),
        (True, None, None),
    ]


def test_on_error_retry_asks_a_fresh_worker_once(tmp_path: Path, make_sample: Callable[..., Sample]) -> None:
    marker = tmp_path / "marker"
    code = tmp_path / "flaky.py"
    code.write_text(
        "import os\n"
        "def flaky(sample, always: bool = False):\n"
        f"    with open({str(marker)!r}, 'a') as file: file.write(f'{{os.getpid()}}\\n')\n"
        f"    if always or len(open({str(marker)!r}).readlines()) == 1: os._exit(1)\n"
        "    return True\n"
    )
    location = Location("flaky", path=str(code))
    namespace: dict[str, Any] = {}
    exec(code.read_text(), namespace)
    shape = inspect_filter(namespace["flaky"])
    one = plugin("raises", location=location, on_error="retry", shape=shape, name="flaky")
    assert run(one, [make_sample()])[0].keep is True
    assert len(set(marker.read_text().split())) == 2
    marker.unlink()
    with pytest.raises(PluginError, match="exit code 1"):
        run(
            plugin("raises", location=location, on_error="retry", shape=shape, arguments={"always": True}),
            [make_sample()],
        )
    assert len(set(marker.read_text().split())) == 2


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
