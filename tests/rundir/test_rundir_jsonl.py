"""JSON lines: any text survives, a tear harms nothing but itself, what is no JSON is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterative_sft_cli.errors import DataError, StorageError
from iterative_sft_cli.rundir import RunDir, fs, jsonl
from iterative_sft_cli.rundir.ledger import read_log, read_loose

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
rows = st.lists(
    st.dictionaries(st.text(), st.recursive(scalars, lambda inner: st.lists(inner)), max_size=4), max_size=4
)


@given(rows)
def test_what_is_written_is_read_back(table: list[dict[str, object]]) -> None:
    assert jsonl.decode_rows(jsonl.encode_rows(table)) == table


@pytest.mark.parametrize("text", ["a\u2028b", "a\u0085b", "a\rb", "a\x0bb", "\ud800", "\x00", "é\n"])
def test_no_character_ends_a_line_but_the_newline(text: str) -> None:
    data = jsonl.encode_row({"text": text})
    assert data.count(b"\n") == 1 and data.isascii()
    assert jsonl.decode_rows(data) == [{"text": text}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        jsonl.encode_row({"loss": value})
    with pytest.raises(jsonl.BadLine, match="not JSON"):
        jsonl.decode_row(b'{"loss": %s}' % str(value).replace("nan", "NaN").replace("inf", "Infinity").encode())


def test_a_line_over_the_limit_is_refused_both_ways() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        jsonl.encode_row({"text": "x" * jsonl.MAX_LINE_BYTES})
    with pytest.raises(jsonl.BadLine, match="longer than"):
        jsonl.decode_row(b"x" * (jsonl.MAX_LINE_BYTES + 1))


@pytest.mark.parametrize("line", [b"", b"[1]", b"3", b"{", b"[" * 100_000, b'{"a":1}}'])
def test_a_bad_line_is_named_by_its_number(line: bytes) -> None:
    with pytest.raises(jsonl.BadLine) as caught:
        jsonl.decode_rows(b'{"a":1}\n' + line + b'\n{"a":2}\n')
    assert caught.value.line == 2


def new_run(path: Path) -> RunDir:
    return RunDir.create(path, config_source=b"", resolved={}, environment={})


@pytest.mark.parametrize("file", ["ledger.jsonl", "stats.jsonl"])
def test_a_log_cut_at_any_byte_is_mended_and_nothing_is_glued(tmp_path: Path, file: str) -> None:
    table = [{"n": n, "text": f"é\u2028 {n} 漢字"} for n in range(6)]
    with new_run(tmp_path / "run") as run:
        log = run.ledger if file == "ledger.jsonl" else run.stats
        for row in table[:3]:
            log.append(row)
        run.checkpoints.commit("0001", lambda folder: None, {})
        for row in table[3:]:
            log.append(row)
    path = tmp_path / "run" / file
    whole = path.read_bytes()
    kept = len(jsonl.encode_rows(table[:3]))
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with RunDir.open(tmp_path / "run") as run:
            log = run.ledger if file == "ledger.jsonl" else run.stats
            assert log.rows() == table[:3]
            for row in table[3:]:
                log.append(row)
            assert log.path.read_bytes() == whole
            # a tear inside what a checkpoint recorded, and a torn last line, are kept for whoever wants to look
            assert bool(run.quarantined) == (cut < kept or whole[:cut][-1:] != b"\n")


def test_a_damaged_line_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":\n{"a":3}\n')
    with pytest.raises(DataError, match="line 2 is damaged"):
        read_log(path)
    assert read_loose(path) == [{"a": 1}, {"a": 3}]


def test_telemetry_after_a_torn_line_keeps_both_neighbours(tmp_path: Path) -> None:
    with new_run(tmp_path / "run") as run:
        run.telemetry.append({"n": 1})
        run.telemetry.append({"n": 2})
    path = tmp_path / "run" / "telemetry.jsonl"
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        with RunDir.open(tmp_path / "run") as run:
            run.telemetry.append({"n": 3})
            found = [row["n"] for row in run.telemetry.rows()]
        # (without its newline only, the second row is whole)
        assert found == ([1, 2, 3] if cut == len(whole) - 1 else [1, 3])


def test_a_file_without_its_last_newline_is_cut_off() -> None:
    with pytest.raises(jsonl.BadLine, match="line 2: the last line is cut off"):
        jsonl.decode_rows(b'{"a":1}\n{"a":2}')
    assert jsonl.split_rows(b'{"a":1}\n{"a"') == ([{"a": 1}], b'{"a"')


def test_nothing_is_glued_to_a_row_that_a_full_disk_tore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrote = []

    def tear(op: fs.Op) -> int | None:
        if op.kind != "write":
            return None
        wrote.append(op)
        if len(wrote) > 1:
            raise OSError(28, "injected")
        return 4

    with new_run(tmp_path / "run") as run:
        monkeypatch.setattr(fs, "hook", tear)
        for _ in range(2):
            with pytest.raises(StorageError, match="No space left"):
                run.ledger.append({"n": 1})
        assert len(wrote) == 2
        monkeypatch.setattr(fs, "hook", None)
        with pytest.raises(StorageError):
            run.ledger.append({"n": 2})
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == b'{"n"'
