"""`isft docs`: every page is there, every command and key in it exists, every example in it works."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from report_runs import call, call_json

from iterative_sft_cli.commands.docs_command import command_tree, help_texts
from iterative_sft_cli.config import parse_config
from iterative_sft_cli.config.availability import NOT_YET
from iterative_sft_cli.config.walk import leaves
from iterative_sft_cli.config.yaml_loader import read_yaml
from iterative_sft_cli.report import documents
from iterative_sft_cli.report.documents import TOPICS, fill, page

PAGES = {topic: page(topic, help_texts()) for topic in TOPICS}
WRITTEN = [topic for topic in TOPICS if topic not in documents.GENERATED]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def command_lines(text):
    """Every `isft ...` in code: indented lines, fenced shell, and inline code."""
    shell = [line.strip() for line in text.splitlines() if line.startswith("    isft ")]
    shell += [line.strip() for block in blocks(text, "sh") for line in block.splitlines() if line.startswith("isft ")]
    shell += [code for code in re.findall(r"`(isft [^`]+)`", text)]
    return [line.rstrip("& ").split("  #")[0].strip() for line in shell]


@pytest.mark.parametrize("topic", WRITTEN)
def test_every_command_in_the_docs_exists_with_its_options(topic):
    for line in command_lines(PAGES[topic]):
        words = shlex.split(line, comments=True)[1:]
        command = command_tree()
        while getattr(command, "commands", None) and words:
            assert words[0] in command.commands or words[0].isupper(), f"{topic}: {line}"
            command = command.commands[words.pop(0)]
        known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)} | {"--help"}
        for word in words:
            if word.startswith("-") and not re.fullmatch(r"-\d+", word) and word != "-":
                assert word.partition("=")[0] in known, f"{topic}: {line}: {word}"


@pytest.mark.parametrize("topic", WRITTEN)
def test_every_config_in_the_docs_is_valid(topic):
    for text in blocks(PAGES[topic], "yaml"):
        found = read_yaml(text.encode())
        assert not found.faults, found.faults
        tree = found.data
        train = {"start_from": "previous", "data": "replace", **tree.get("train", {})}
        whole = {"model": "acme/model", "output_dir": "runs/x", "rounds": 3, **tree, "train": train}
        whole.setdefault("prompts", {"path": "p.jsonl", "answer": "answer"})
        if "passes" in train:
            whole["filters"] = ["mine.py:reward"]
        assert parse_config(whole).config.rounds


@pytest.mark.parametrize("topic", WRITTEN)
def test_python_in_the_docs_compiles_and_imports_what_is_there(topic):
    import iterative_sft_cli

    for text in blocks(PAGES[topic], "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "iterative_sft_cli":
                assert all(alias.name in iterative_sft_cli.__all__ for alias in node.names), topic


def test_the_filters_of_the_page_do_what_it_says(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(blocks(PAGES["filters"], "python")[0])
    rows = [{"completion": "one two", "prompt_id": "a"}, {"completion": "one two three four", "prompt_id": "a"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, arguments in (("short_answer", ["max_words=3"]), ("longest_of_prompt", [])):
        code, out, err = call(capsys, "filters", "test", f"mine.py:{name}", "samples.jsonl", *arguments, "--json")
        assert code == 0, err
        assert out.count('"keep": true') == 1 and out.count('"keep": false') == 1, out


def test_the_python_page_runs(tmp_path, capsys, monkeypatch):
    import report_runs

    report_runs.write_config(tmp_path).rename(tmp_path / "addition.yaml")
    monkeypatch.chdir(tmp_path)
    first, second = blocks(PAGES["python"], "python")
    scope: dict[str, object] = {}
    exec(compile(first, "python.md", "exec"), scope)  # noqa: S102  (the page itself)
    assert len((tmp_path / "accepted.jsonl").read_text().splitlines()) == scope["run"].stats[2]["filters/num_accepted"]
    columns = scope["frame"].columns
    named = re.search(r"Columns of `samples\(\)`: `(.*?)`", PAGES["python"], re.DOTALL)[1]
    assert [name.strip() for name in named.split(",")] == list(columns[: len(named.split(","))])
    assert "trainer.step(texts=" in second


def test_the_trainer_of_the_python_page_runs():
    from tiny import tiny_llama, tiny_tokenizer

    scope = {"tokenizer": tiny_tokenizer(), "model": tiny_llama()}
    exec(compile(blocks(PAGES["python"], "python")[1], "python.md", "exec"), scope)  # noqa: S102  (the page itself)
    assert scope["stats"]["num_trained_tokens"] > 10


def test_every_command_is_in_the_reference(capsys):
    texts = help_texts()
    assert {"train", "samples", "export", "filters list", "docs"} <= texts.keys()
    for name, text in texts.items():
        assert f"## isft {name}\n" in PAGES["cli"] and text.strip() in PAGES["cli"]
        capsys.readouterr()
        code, out, err = call(capsys, *name.split(), "--help")
        told = " ".join((out + err).split())
        first = text.strip().splitlines()[2].strip()
        assert code == 0 and first[:40] in told, name


def test_every_key_is_in_the_config_reference():
    reference = PAGES["config"]
    sections = dict(re.findall(r"\n#{2,4} ([\w.]+|top level)\n(.*?)(?=\n#{2,4} |\Z)", reference, re.DOTALL))
    for path in (leaf.path for leaf in leaves()):
        section, _, key = path.replace("[]", "").rpartition(".")
        assert f"- `{key}` (" in sections[section or "top level"], path
    for line in reference.splitlines():
        if line.startswith("- `"):
            assert re.fullmatch(r"- `\w+` \(.+\): .+", line), line


def test_what_is_not_available_is_said_until_it_is(monkeypatch):
    text = "a\n[[not-yet samples.keep]]\n[[available samples.keep]]\nuse it\n[[end]]\nb\n"
    monkeypatch.setattr(documents, "NOT_YET", {"samples.keep": "dropping samples"})
    assert "dropping samples (`samples.keep`)" in fill(text) and "use it" not in fill(text)
    assert "- dropping samples (`samples.keep`)" in fill("[[not-yet]]")
    monkeypatch.setattr(documents, "NOT_YET", {})
    assert fill(text) == "a\nuse it\nb\n" and "nothing" in fill("[[not-yet]]")
    for what in NOT_YET.values():
        assert what in PAGES["limits"]
    assert not any("[[" in PAGES[topic] for topic in WRITTEN)


def test_the_table_of_methods_is_that_of_the_recipes():
    from iterative_sft_cli.recipes.catalog import text_of

    names = {
        "expert iteration": "expert-iteration",
        "STaR": "star",
        "ReST-EM": "rest-em",
        "ReST": "rest",
        "RAFT": "raft",
        "RFT": "rft",
    }
    rows = re.findall(r"^\| ([\w -]+) \| (\w+) \| ([^|]+) \|", PAGES["recipes"], re.MULTILINE)
    found = {name: (start, data) for name, start, data in rows if name in names}
    assert found.keys() == names.keys()
    for name, recipe in names.items():
        train = yaml.safe_load(text_of(recipe))["train"]
        start, data = found[name]
        assert start == train["start_from"] and ("all rounds" in data) == (train["data"] == "accumulate"), name
        assert ("passes" in data) == bool(train.get("passes")), name


def test_topics_are_listed_printed_and_written(tmp_path, capsys):
    listed = call_json(capsys, "docs")
    assert [one["topic"] for one in listed] == list(TOPICS) and all(one["title"] for one in listed)
    code, out, _ = call(capsys, "docs", "concepts")
    assert code == 0 and out == PAGES["concepts"]
    assert call_json(capsys, "docs", "cli")["markdown"] == PAGES["cli"]
    code, _, err = call(capsys, "docs", "--write", tmp_path / "pages")
    assert code == 0 and sorted(p.stem for p in (tmp_path / "pages").iterdir()) == sorted(TOPICS)
    code, _, err = call(capsys, "docs", "recepies")
    assert code == 2 and "did you mean recipes?" in err
    assert {path.stem for path in documents.FOLDER.glob("*.md")} == set(WRITTEN)


def test_pages_name_each_other_rightly():
    for topic in WRITTEN:
        for name in re.findall(r"isft docs ([\w-]+)", PAGES[topic]):
            assert name in TOPICS, f"{topic} names {name}"


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_the_slurm_script_requeues_what_was_preempted(tmp_path):
    [script] = [text for text in blocks(PAGES["resuming"], "sh") if "SBATCH" in text]
    (tmp_path / "job.sh").write_text(script)
    stub = (
        "#!/bin/sh\ntrap 'sleep 0.2; exit 75' TERM\nsleep 0.5; touch started\nfor i in $(seq 100); do sleep 0.1; done\n"
    )
    for name, text in {"isft": stub, "scontrol": '#!/bin/sh\necho "$@" > requeued\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["sh", "job.sh"], cwd=tmp_path, env=env)
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 75 and (tmp_path / "requeued").read_text() == "requeue 7\n"
    (tmp_path / "requeued").unlink()
    (tmp_path / "isft").write_text("#!/bin/sh\nexit 0\n")
    assert subprocess.run(["sh", "job.sh"], cwd=tmp_path, env=env, timeout=20, check=False).returncode == 0
    assert not Path(tmp_path / "requeued").exists()
