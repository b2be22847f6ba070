"""What plug-ins do wrong is a named error with the prompt; never a score or a hang."""

from __future__ import annotations

import locale
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plugin_runs import plugin, run

from iterative_sft_cli.errors import EXIT_PLUGIN, PluginError
from iterative_sft_cli.filters.contract import inspect_filter
from iterative_sft_cli.filters.resolved import Location
from iterative_sft_cli.types import Sample

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="process groups and limits are POSIX"),
    pytest.mark.usefixtures("misbehaving_importable"),
]


@pytest.fixture
def samples(make_sample: Callable[..., Sample]) -> list[Sample]:
    texts = ["good", "BAD", "good"]
    return [make_sample(text, i=i, prompt=f"p{i}", row={"question": "q"}) for i, text in enumerate(texts)]


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
