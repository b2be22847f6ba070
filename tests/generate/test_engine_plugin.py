"""Plug-in engines are found by three kinds of names and held to the contract."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import echo_engine
import pytest
from helpers_generate import requests_of

from iterative_sft_cli.config import GenerateConfig
from iterative_sft_cli.errors import ConfigError, PluginError
from iterative_sft_cli.generate import Engine, EngineOutOfMemory, open_engine, plugin
from iterative_sft_cli.types import Completion, Decoding

HERE = Path(__file__).parent
DECODING = Decoding(max_new_tokens=10, eos_token_ids=(2,))


def open_it(use: str, base_dir: Path = HERE, **args: Any) -> Any:
    section = GenerateConfig(engine=use, args=args)
    return open_engine(section, loaded=None, encoder=None, base_dir=base_dir, run_dir=None, seed=0)


def completions_of(engine: Any, **shape: Any) -> list[Completion]:
    requests = requests_of(shape.get("lengths", [3, 5]), samples=2)
    return list(engine.generate(requests, DECODING, engine.plan(requests, DECODING)))


@pytest.fixture
def entry_point(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    points = [EntryPoint("echo", "echo_engine:make", plugin.GROUP)]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)
    return points


def test_three_kinds_of_names(entry_point: list[EntryPoint]) -> None:
    for use in ("echo", "echo_engine:make", "echo_engine.py:make", "echo_engine:EchoEngine.__call__"):
        if "__call__" in use:
            continue
        engine = open_it(use, num_tokens=2)
        assert isinstance(engine, Engine) and engine.deterministic
        engine.begin(None)
        assert {(c.prompt_id, c.sample_index) for c in completions_of(engine)} == {
            (p, k) for p in ("p0", "p1") for k in (0, 1)
        }
        engine.end()


def test_the_engine_of_the_documentation(tmp_path: Path) -> None:
    page = (Path(plugin.__file__).parents[1] / "docs" / "engines.md").read_text("utf-8")
    (tmp_path / "mine.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    engine = open_it("mine.py:make", tmp_path, num_tokens=2)
    engine.heartbeat = lambda num_tokens: None
    engine.begin(None)
    assert [len(completion.token_ids) for completion in completions_of(engine)] == [3] * 4


def test_the_heartbeat_reaches_the_loop_and_its_stop_comes_back() -> None:
    class Stop(Exception):
        pass

    engine = open_it("echo_engine.py:make")
    beats: list[int] = []
    engine.heartbeat = beats.append
    completions = completions_of(engine)
    assert sum(beats) == sum(len(c.token_ids) for c in completions)

    def stop(num_tokens: int) -> None:
        raise Stop

    engine.heartbeat = stop
    with pytest.raises(Stop):
        completions_of(engine)


@pytest.mark.parametrize(
    ("use", "args", "message"),
    [
        ("ecko", {}, "there is no engine 'ecko'"),
        ("no_such_module:make", {}, "no module `no_such_module`"),
        ("echo_engine:mak", {}, "no attribute `mak`"),
        ("missing.py:make", {}, "missing.py: no such file"),
        ("echo_engine.py:make", {"num": 1}, "does not take these arguments"),
        ("echo_engine.py:EOS", {}, "not a function"),
    ],
)
def test_what_the_user_wrote_wrongly_is_a_config_error(use: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_it(use, **args)


def test_a_name_that_two_packages_offer(entry_point: list[EntryPoint]) -> None:
    entry_point.append(EntryPoint("echo", "other:make", plugin.GROUP))
    with pytest.raises(ConfigError, match="several packages: echo_engine:make, other:make"):
        open_it("echo")


def test_an_import_that_raises(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        open_it("broken.py:make", tmp_path)
    (tmp_path / "needs.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(PluginError, match="a_package_that_is_not_there"):
        open_it("needs.py:make", tmp_path)


class Misbehaving(echo_engine.EchoEngine):
    """Does what `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__(None, 3)
        self.how = how

    def plan(self, *args: Any) -> Any:
        return {"rows": 3} if self.how == "plan" else super().plan(*args)

    def generate(self, *args: Any) -> Iterator[Any]:
        whole = list(super().generate(*args))
        if self.how == "twice":
            whole.append(whole[0])
        if self.how == "forgets":
            whole.pop()
        if self.how == "foreign":
            whole[0] = Completion("other", 0, (1,), "eos")
        if self.how == "type":
            whole[0] = "text"
        if self.how == "reason":
            whole[0] = Completion("p0", 0, (1,), "done")
        if self.how == "empty":
            whole[0] = Completion("p0", 0, (), "eos")
        if self.how == "ids":
            whole[0] = Completion("p0", 0, (1.5,), "eos")  # type: ignore[arg-type]
        if self.how == "raises":
            yield whole[0]
            raise KeyError("oops")
        if self.how == "memory":
            raise EngineOutOfMemory("full")
        yield from whole


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("plan", "max_rows"),
        ("twice", "came twice"),
        ("forgets", "1 samples never came, first sample 1 of prompt 'p1'"),
        ("foreign", "not asked for"),
        ("type", "yielded str"),
        ("reason", "finish_reason 'done'"),
        ("empty", "neither token ids nor text"),
        ("ids", "non-negative ints"),
        ("raises", "generate raised KeyError"),
    ],
)
def test_a_broken_contract_is_named(how: str, message: str) -> None:
    engine = plugin.CheckedEngine("bad", Misbehaving(how))
    with pytest.raises(PluginError, match=f"(?s)engine bad: .*{message}") as error:
        completions_of(engine)
    assert error.value.exit_code == 5


def test_out_of_memory_is_the_loops_business() -> None:
    with pytest.raises(EngineOutOfMemory):
        completions_of(plugin.CheckedEngine("bad", Misbehaving("memory")))
