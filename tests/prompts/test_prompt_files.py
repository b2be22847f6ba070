from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path

import pytest

from iterative_sft_cli.errors import DataError
from iterative_sft_cli.prompts.files import plain, read_rows


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


ROWS = [{"q": "a\nb", "n": 1}, {"q": 'é, "x"', "n": 2}]


def test_jsonl_splits_on_line_feeds_only(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in [{"q": "a\u2028b\x85c"}, {"q": "d"}])
    write(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + text.encode().replace(b"}\n", b"}\r\n") + b"\n\n")
    assert read_rows("a.jsonl", base_dir=tmp_path) == [{"q": "a\u2028b\x85c"}, {"q": "d"}]


def test_json_csv_tsv_and_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    write(tmp_path, "a.json", json.dumps(ROWS))
    write(tmp_path, "b.json", "\ufeff" + json.dumps({"data": ROWS}))
    write(tmp_path, "c.csv", 'q,n\r\n"a\nb",1\r\n"é, ""x""",2\r\n')
    write(tmp_path, "d.tsv", 'q\tn\n"a\nb"\t1\n"é, ""x"""\t2\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    for name in ("a.json", "b.json", "e.parquet"):
        assert read_rows(name, base_dir=tmp_path) == ROWS, name
    for name in ("c.csv", "d.tsv"):
        assert read_rows(name, base_dir=tmp_path) == [{**row, "n": str(row["n"])} for row in ROWS], name


def test_paths_are_relative_to_the_config_then_to_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").mkdir()
    write(tmp_path, "a.jsonl", '{"q": "here"}')
    monkeypatch.chdir(tmp_path)
    assert read_rows("a.jsonl", base_dir=tmp_path / "config") == [{"q": "here"}]
    write(tmp_path / "config", "a.jsonl", '{"q": "beside"}')
    assert read_rows("a.jsonl", base_dir=tmp_path / "config") == [{"q": "beside"}]


def test_limit_reads_no_further(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"q": 1}\n{"q": 2}\nbroken')
    assert len(read_rows("a.jsonl", base_dir=tmp_path, limit=2)) == 2


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", '{"q": 1}\n\n{"q": 2,}\n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", '{"q": 1}\n[1]\n', r"a\.jsonl:2: a JSON list, expected a JSON object"),
        ("a.jsonl", '[{"q": 1}]', r"a\.jsonl:1: .*\n?.*named \.json"),
        ("a.jsonl", '{"q": NaN}', r"a\.jsonl:1: not JSON: NaN"),
        ("a.jsonl", '{"q": "\\ud800"}', r"a\.jsonl:1: holds half of a surrogate"),
        ("a.jsonl", b'{"q": 1}\n{"q": "\xff"}', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.jsonl", " \n\n", r"a\.jsonl: no rows"),
        ("a.json", '[{"q": 1}, 2]', r"a\.json: item 2: a number"),
        ("a.json", '{"q": 1}', r"a\.json: a JSON object, expected a list"),
        ("a.json", '[\n{"q": 1},\n]', r"a\.json: not JSON: .*line 3"),
        ("a.csv", "", r"a\.csv: no rows"),
        ("a.csv", "q,n\n", r"a\.csv: no rows"),
        ("a.csv", "q,q\n1,2\n", r"a\.csv:1: the column 'q' is there twice"),
        ("a.csv", 'q,n\n"x\ny",1\n3\n', r"a\.csv:4: 1 fields, expected 2"),
        ("a.csv", 'q,n\n"x,1\n', r"a\.csv:\d+: not CSV"),
        ("a.parquet", "no", r"a\.parquet: not parquet"),
        ("a.txt", "x", r"no reader for the suffix '\.txt'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, data: str | bytes, message: str) -> None:
    write(tmp_path, name, data)
    with pytest.raises(DataError, match=message):
        read_rows(name, base_dir=tmp_path)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"no such file(.|\n)*did you mean train\.jsonl"):
        read_rows("trian.jsonl", base_dir=tmp_path)
    with pytest.raises(DataError, match="relative to"):
        read_rows("far/away.jsonl", base_dir=tmp_path)
    with pytest.raises(DataError, match="folder"):
        read_rows(".", base_dir=tmp_path)


def test_rows_of_other_libraries_become_plain_json() -> None:
    import numpy

    row = {
        "when": datetime.datetime(2024, 1, 2, 3),
        "price": decimal.Decimal("1.5"),
        "count": decimal.Decimal("2"),
        "set": {2, 1},
        "pair": (1, {3: "x"}),
        "image": b"123",
        "array": numpy.arange(2),
        "scalar": numpy.float32(0.5),
        "nan": float("nan"),
        "other": Path("x"),
    }
    assert plain(row) == {
        "when": "2024-01-02T03:00:00",
        "price": 1.5,
        "count": 2,
        "set": [1, 2],
        "pair": [1, {"3": "x"}],
        "image": "<3 bytes>",
        "array": [0, 1],
        "scalar": 0.5,
        "nan": None,
        "other": "x",
    }
    assert json.loads(json.dumps(plain(row), allow_nan=False)) == plain(row)
