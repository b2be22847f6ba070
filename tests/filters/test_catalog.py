"""`isft filters list|show|test`, the starter file, and a real installed package of plug-ins."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filter_samples import make_entries, new_sample

from iterative_sft_cli.errors import ConfigError, DataError, PluginError
from iterative_sft_cli.filters import Judged, resolve_filters
from iterative_sft_cli.filters.builtin import NAMES
from iterative_sft_cli.filters.catalog import entry_for, list_filters, read_samples, show_filter, test_filter
from iterative_sft_cli.filters.starter import write_starter

Judge = Callable[..., list[Judged]]
PACKAGE = Path(__file__).resolve().parents[1] / "plugin_package"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the example package."""
    if importlib.util.find_spec("hatchling") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("pip and hatchling are needed to install the example package")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--target", str(folder), str(PACKAGE)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    importlib.invalidate_caches()
    yield site
    for name in [name for name in sys.modules if name.startswith("isft_example_plugins")]:
        del sys.modules[name]


def test_the_list_holds_built_ins_and_installed_filters(installed: Path) -> None:
    rows = list_filters()
    assert {row.name for row in rows} == {*NAMES, "politeness", "first_is_longest", "quota", "api_grader"}
    by_name = {row.name: row for row in rows}
    polite = by_name["politeness"]
    assert (polite.source, polite.place) == ("isft-example-plugins 1.2.0", "isft_example_plugins.filters:politeness")
    assert by_name["dedup"].to_row()["kind"] == "group" and by_name["dedup"].source == "built-in"
    assert all(row.summary.endswith(".") for row in rows if row.source == "built-in")
    assert "isft_example_plugins" not in sys.modules


def test_installed_filters_run_by_name(installed: Path, judge: Judge) -> None:
    texts = ["thank you", "no", "you are very welcome", "thanks"]
    samples = [new_sample(text, i=i) for i, text in enumerate(texts)]
    judged = judge(
        samples, "politeness", {"threshold": {"by": "politeness", "min": 0.2}}, {"first_is_longest": 3}, {"quota": 1}
    )
    assert [one.kept for one in judged].count(True) == 1
    assert judged[1].says[-1].reason == "below_threshold"
    assert judged[2].says[-1].reason == "longer_than_first"
    again = judge(
        samples, "politeness", {"threshold": {"by": "politeness", "min": 0.2}}, {"first_is_longest": 3}, {"quota": 1}
    )
    assert [one.kept for one in again] == [one.kept for one in judged]


def test_resolved_plugins_tell_where_they_come_from(installed: Path) -> None:
    polite, longest, quota = resolve_filters(
        make_entries("politeness", "first_is_longest", {"quota": 3}), base_dir=installed
    )
    assert (polite.distribution, polite.role, polite.scores_only) == ("isft-example-plugins 1.2.0", "scorer", True)
    assert (longest.prefix_stable, quota.kind, quota.arguments) == (True, "samples", {"n": 3})
    with pytest.raises(ConfigError, match="unknown argument `word`.*Did you mean `words`"):
        resolve_filters(make_entries({"politeness": {"word": ["x"]}}), base_dir=installed)


def test_a_prompt_source_and_an_engine_come_by_entry_point(installed: Path) -> None:
    from iterative_sft_cli.types import Decoding, Request

    [source] = importlib.metadata.entry_points(group="isft.prompts", name="times_table")
    rows = list(source.load()(size=3))
    assert len(rows) == 9 and rows[4] == {"id": "2x2", "prompt": "What is 2 x 2?", "answer": "4", "level": 2}
    [point] = importlib.metadata.entry_points(group="isft.engines", name="echo")
    engine = point.load()(SimpleNamespace(args={"text": "It is 4."}))
    requests = [Request(row["id"], row["prompt"], (1, 2), (0, 1), (7, 8)) for row in rows]
    decoding = Decoding(eos_token_ids=(2,))
    made = list(engine.generate(requests, decoding, engine.plan(requests, decoding)))
    assert len(made) == 18 and made[0].text == "It is 4." and made[0].token_ids[-1] == 2


def test_a_grader_with_a_key_gets_it_and_nothing_else(
    installed: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers["Authorization"])
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
            body = json.dumps({"score": 0.9 if "good" in text else 0.1}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/grade"
    monkeypatch.setenv("GRADER_KEY", "key-of-the-grader")
    samples = [new_sample(text, i=i) for i, text in enumerate(["good", "bad"])]
    try:
        judged = judge(samples, {"use": "api_grader", "args": {"url": url}, "env": ["GRADER_KEY"], "workers": 1})
        assert [(one.kept, one.says[0].score, one.says[0].reason) for one in judged] == [
            (True, 0.9, "graded_low"),
            (False, 0.1, "graded_low"),
        ]
        assert set(seen) == {"Bearer key-of-the-grader"}
        with pytest.raises(PluginError) as caught:
            judge(samples, {"use": "api_grader", "args": {"url": url}, "workers": 1})
        assert "its set-up raised KeyError: 'GRADER_KEY'" in caught.value.what
    finally:
        server.shutdown()
        server.server_close()


def test_show_tells_kind_arguments_documentation_and_cost(installed: Path) -> None:
    text = show_filter("dedup", base_dir=installed)
    assert text.startswith("dedup: built-in, selector, looks at all samples of a prompt")
    assert "level: 'exact' | 'normalized' | 'near' | 'equation_list' | 'ast' ['exact']" in text
    assert "similarity: float | None [None]" in text and "cost: one hash" in text
    text = show_filter("math_verify", base_dir=installed)
    assert "needs: iterative-sft-cli[math]" in text and "long form: timeout_s" in text
    text = show_filter("quota", base_dir=installed)
    assert "isft-example-plugins 1.2.0" in text and "n: int required" in text and "in worker processes" in text
    with pytest.raises(ConfigError, match="Did you mean `dedup`"):
        show_filter("dedupe", base_dir=installed)


def test_a_filter_is_tried_on_a_file_of_samples(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    rows = [
        {"prompt_id": "a", "completion": "It is 4.", "answer": "4"},
        {"prompt_id": "a", "completion": "It is 5.", "answer": "4", "level": 3},
        {"prompt_id": "b", "completion": "4\u2028", "answer": "4", "finish_reason": "length"},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    samples = read_samples(file)
    assert samples[1].row == {"level": 3} and samples[0].final == "It is 4."
    done = test_filter(entry_for("numeric_answer", []), samples, base_dir=tmp_path)
    assert [row.keep for row in done.rows] == [True, False, True] and not done.failed
    assert done.rows[1].to_row()["reason"] == "wrong_answer" and done.total_s > 0
    grouped = test_filter(entry_for("max_per_prompt", ["n=1"]), samples, base_dir=tmp_path)
    assert [(row.sample_id, row.keep) for row in grouped.rows] == [("a-0", True), ("a-1", False), ("b-2", True)]
    wide = test_filter(entry_for("top_fraction", ["by=num_tokens", "q=0.4"]), samples, base_dir=tmp_path)
    assert [row.keep for row in wide.rows] == [True, True, False]
    with pytest.raises(ConfigError, match="`n` is not an argument"):
        entry_for("max_per_prompt", ["n"])


def test_errors_of_a_tried_filter_are_rows(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def f(sample):\n    return 1 / len(sample.completion) > 0.3\n")
    samples = [new_sample(text, i=i) for i, text in enumerate(["ab", "", "abcdef"])]
    done = test_filter(entry_for("f.py:f", []), samples, base_dir=tmp_path)
    assert [row.keep for row in done.rows] == [True, None, False] and done.failed
    assert "ZeroDivisionError: division by zero" in str(done.rows[1].error)
    assert done.rows[2].seconds > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is no sample"),
        (b"{}", "has no text `completion`"),
        (b'{"completion": 3}', "has no text `completion`"),
        (b"[1]", "has no text `completion`"),
        (b"{", "is not JSON"),
        (b'{"completion": "' + b"\xff" + b'"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_bad_sample_files_are_data_errors(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_samples(file)
    with pytest.raises(DataError, match="cannot read"):
        read_samples(tmp_path / "gone.jsonl")


def test_the_starter_works_and_passes_its_own_test(tmp_path: Path, judge: Judge) -> None:
    write_starter(tmp_path / "my_filter.py")
    samples = [new_sample("It is four.", i=0), new_sample("a " * 50, i=1)]
    judged = judge(samples, "my_filter.py:keep_short", {"my_filter.py:MentionsWord": "Four"})
    assert [one.kept for one in judged] == [True, False]
    assert judged[1].says[0].reason == "too_many_words" and judged[1].says[0].extra == {"words": 50}
    root = str(Path(__file__).resolve().parents[2])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "-c",
        "/dev/null",
        "my_filter.py",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": root}, timeout=60
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "my_filter.py"], cwd=tmp_path, capture_output=True
    )
    assert ruff.returncode == 0 or b"No module named" in ruff.stderr


@pytest.mark.parametrize("name", ["my_filter.py", "no-name.py", "filter.txt", "../up/x.py"])
def test_the_starter_replaces_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "my_filter.py").write_text("mine")
    with pytest.raises(ConfigError):
        write_starter(tmp_path / name)
    assert (tmp_path / "my_filter.py").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["my_filter.py"]
