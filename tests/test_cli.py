"""The command line: fast, data on stdout, everything else on stderr, documented exit codes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iterative_sft_cli import __version__
from iterative_sft_cli.app import app
from iterative_sft_cli.cli import run

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate")


def isft(*argv: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "iterative_sft_cli", *argv], capture_output=True, text=True, cwd=ROOT, **options
    )


def test_help_is_fast():
    isft("--help")  # compiles what is not compiled yet
    times = []
    for _ in range(5):
        start = time.perf_counter()
        result = isft("--help")
        times.append(time.perf_counter() - start)
    assert result.returncode == 0 and "train" in result.stdout
    assert min(times) < 0.3, times


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["validate", "configs/quickstart.yaml"],
        ["plan", "configs/quickstart.yaml"],
        ["schema"],
    ],
    ids=" ".join,
)
def test_commands_without_a_model_import_no_torch(argv):
    script = (
        "import sys\nfrom iterative_sft_cli.cli import run\n"
        f"code = run({argv!r})\nprint('HEAVY', [m for m in {HEAVY!r} if m in sys.modules], code, file=sys.stderr)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "HEAVY [] 0" in out.stderr, out.stderr


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"isft {__version__}\n"


def test_validate_prints_data_on_stdout_and_takes_overrides(toy, capsys):
    config = str(toy())
    assert run(["validate", config]) == 0
    assert "valid" in capsys.readouterr().out
    assert run(["validate", config, "--json", "--resolved", "generate.temperature=0.25"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["generate"]["temperature"] == 0.25
    assert run(["validate", config, "generate.temprature=0.25"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "command line" in captured.err and "temperature" in captured.err


def test_validate_as_json_lists_every_problem(toy, capsys):
    assert run(["validate", str(toy()), "--json", "rounds=0", "seed=-1"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["valid"] is False and len(told["problems"]) == 2


def test_schema_and_env_are_json(capsys):
    assert run(["schema"]) == 0
    assert "generate" in json.loads(capsys.readouterr().out)["properties"]
    assert run(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["isft"] == __version__ and facts["versions"]["pydantic"] != "missing"
    assert str(Path.home()) not in json.dumps(facts)


def test_dry_run_is_the_plan_and_writes_nothing(toy, tmp_path, capsys):
    assert run(["train", str(toy()), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "round 3:" in told and "48 samples of 12 prompts" in told and "checkpoint 0002" in told
    assert not (tmp_path / "run").exists()


def test_plan_as_json(toy, capsys):
    assert run(["plan", str(toy()), "--json"]) == 0
    rounds = json.loads(capsys.readouterr().out)["rounds"]
    assert [row["round"] for row in rounds] == [1, 2, 3] and rounds[0]["start_from"] == "the starting model"


def test_resume_takes_a_run_directory(toy, tmp_path, capsys):
    assert run(["train", str(toy(rounds=1))]) == 0
    assert run(["resume", str(tmp_path / "run"), "rounds=2"]) == 0
    stats = (tmp_path / "run" / "stats.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in stats] == [0, 1, 2]
    assert run(["resume", str(tmp_path / "nothing")]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_a_moved_run_goes_on(toy, tmp_path, capsys):
    assert run(["train", str(toy(rounds=1))]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run(["resume", str(tmp_path / "moved"), "rounds=2"]) == 0, capsys.readouterr().err
    assert len((tmp_path / "moved" / "stats.jsonl").read_text().splitlines()) == 3


def test_completion_script_is_offered():
    env = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    out = isft("--show-completion", "bash", env=env)
    assert out.returncode == 0 and "isft" in out.stdout or "complete" in out.stdout


def test_every_command_has_help():
    from typer.main import get_command

    from iterative_sft_cli import commands

    assert commands
    for name, command in get_command(app).commands.items():
        assert command.help and command.help.strip(), name


def test_plain_lines_without_a_terminal_and_no_colour_codes(toy):
    out = isft("train", str(toy(rounds=1)), env={**os.environ, "FORCE_COLOR": "", "NO_COLOR": "1"})
    assert out.returncode == 0, out.stderr
    assert "\x1b" not in out.stderr and out.stdout == ""
    assert "round 1 generate: 48 samples" in out.stderr and "next: isft" in out.stderr
