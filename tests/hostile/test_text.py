"""Untrusted text on every screen: nothing that a prompt, a completion, a plug-in or a name holds steers a terminal or a page."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iterative_sft_cli.cli import run as isft


def payloads_of(path: str) -> list[str]:
    """PAYLOADS of another test file."""
    place = Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(f"payloads_{place.stem}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place.parent))
        spec.loader.exec_module(module)
    return list(module.PAYLOADS)


TERMINAL = payloads_of("test_console.py")
PAGE = payloads_of("report/test_report_page.py")
CONTROL = "\u202e\u2066\u2069\u200b\u200c\u200d\ufeff\u2028\u2029\u061c\u00ad\u180e\u3164\U000e0041"


def steers(text: str) -> list[str]:
    """The characters of `text` that would do something to a terminal."""
    return [
        c
        for c in text
        if (ord(c) < 0x20 and c not in "\n\t") or 0x7F <= ord(c) <= 0x9F or 0xD800 <= ord(c) <= 0xDFFF or c in CONTROL
    ]


def test_there_are_fifty_of_each() -> None:
    assert len(TERMINAL) >= 50 and len(PAGE) >= 50
    assert any("]8;;" in one for one in TERMINAL) and any("\x9b" in one for one in TERMINAL)
    assert any("\u202e" in one for one in TERMINAL) and any("[/bold]" in one for one in TERMINAL)


PLUGIN = '''
import json
from iterative_sft_cli.types import Verdict

PAYLOADS = json.loads(open(PLACE).read())

def tells(sample):
    """DOC"""
    return Verdict("4" in sample.completion, 0.5, "no_four", {"note": PAYLOADS[len(sample.prompt) % len(PAYLOADS)]})

def raises(sample):
    print("".join(PAYLOADS))
    raise ValueError("".join(PAYLOADS))
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A plug-in whose documentation, extras, output and errors hold every payload."""
    place = tmp_path / "payloads.json"
    place.write_text(json.dumps([one for one in TERMINAL if "\ud800" not in one and "\udfff" not in one]))
    documentation = "".join(f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}" for c in "".join(TERMINAL))
    code = PLUGIN.replace("PLACE", repr(str(place))).replace("DOC", documentation)
    (tmp_path / "p.py").write_text(code)
    return tmp_path / "p.py"


def test_no_command_lets_a_payload_through(
    toy: Callable[..., Path], plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    usable = [one for one in TERMINAL if "\ud800" not in one and "\udfff" not in one]
    filters: list[Any] = ["finished", {"use": "p.py:tells", "workers": 1}, {"threshold": {"by": "tells", "min": 0.1}}]
    config = toy(rounds=1, filters=filters, prompts={"id": "id", "per_round": "all", "level": "level"})
    rows = [
        {"id": f"{i}{one}", "question": f"{i}+1", "answer": str(i + 1), "level": one, "note": one}
        for i, one in enumerate(usable)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = tmp_path / "samples.jsonl"
    lines = [{"completion": f"a {one}", "prompt_id": one, "sample_id": one, "answer": one} for one in TERMINAL]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    commands: list[list[str]] = [
        ["train", str(config)],
        ["samples", "run", "--round", "1"],
        ["samples", "run", "--rejected", "--json"],
        ["show", "run"],
        ["list", "."],
        *(["why", "run", f"1-{i}{one}-0"] for i, one in enumerate(usable) if "\x00" not in one),
        ["filters", "show", "p.py:tells"],
        ["filters", "test", "p.py:tells", str(samples), "--limit", "99"],
        ["filters", "test", "numeric_answer", str(samples), "drop=false"],
        ["filters", "test", "p.py:raises", str(samples)],
        *(["filters", "show", one] for one in usable if "\x00" not in one and not one.startswith("-")),
        *(["filters", "test", "length", str(samples), f"max={one}"] for one in usable[:8]),
        *(["samples", "run", "--prompt", one] for one in usable[:8]),
        ["validate", "".join(usable).replace("\x00", "")[:200]],
    ]
    for argv in commands:
        code = isft(argv)
        out, err = capsys.readouterr()
        assert code in (0, 2, 4, 5), (argv, err)
        assert not steers(out) and not steers(err), (argv, steers(out + err)[:5])
        assert "Traceback" not in err


def test_a_failing_plugin_is_told_without_effect(
    toy: Callable[..., Path], plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy(rounds=1, filters=[{"use": "p.py:raises", "workers": 1}])
    assert isft(["train", str(config)]) == 5
    out, err = capsys.readouterr()
    assert not steers(out + err) and "[/bold]" in err
    outcome = (tmp_path / "run" / "outcome.json").read_bytes()
    assert not steers(outcome.decode("ascii").replace("\n", ""))


def test_stored_text_is_ascii_and_split_by_newlines_alone(
    toy: Callable[..., Path], plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isft(["train", str(toy(rounds=1, eval=None, filters=[{"use": "p.py:tells", "workers": 1}, "dedup"]))]) in (
        0,
        2,
    )
    for path in (tmp_path / "run").rglob("*.jsonl"):
        data = path.read_bytes()
        assert data.isascii() and all(json.loads(line) is not None for line in data.split(b"\n") if line)


BIG = 16 * 1024 * 1024


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"completion": "' + b"x" * (BIG + 1) + b'"}', "bytes"),
        (b'{"completion": "a", "logprob": NaN}', ""),
        ('{"completion": "a\u2028b\u2029c\u0085d"}'.encode(), ""),
        (b'{"completion": "half \\ud800 pair"}', ""),
        (b'{"completion": "' + b"x" * (BIG - 100) + b'"}', ""),
    ],
    ids=["17 MB line", "NaN", "line separators", "lone surrogate", "16 MB line"],
)
def test_odd_lines_of_samples(content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(content + b"\n" + b'{"completion": "second"}\n')
    code = isft(["filters", "test", "nonempty", str(path)])
    out, err = capsys.readouterr()
    assert not steers(out + err)
    if message:
        assert code == 4 and message in err
    else:
        assert code == 0 and "2 samples: 2 kept" in out
