"""The torch-free door and the direction of imports: down only, and no stage knows another."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "iterative_sft_cli"
STAGES = {"prompts", "generate", "filters", "train"}
LEVELS = [
    {"types", "errors", "machine", "system", "native", "tensor_files", "plugin_import"},
    {"config", "encoding", "samples", "eval", "tensor_files"},
    {"model", "rundir", "stats", "prompts", "generate", "filters", "train", "temporary"},
    {"guards", "alarms", "console", "signals", "watchdog", "rounds", "harness"},
    {"loop", "build", "report", "recipes", "resume", "tracking"},
    {"experiment", "plan", "plan_memory", "ranks", "probe"},
    {"app", "cli", "commands"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    name = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    return "model" if name.startswith("model_") else "encoding" if name.startswith("encoding_") else name


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("iterative_sft_cli"):
            rest = node.module.split(".")[1:]
            names = (
                [rest[0]]
                if rest
                else [a.name for a in node.names if (PACKAGE / f"{a.name}.py").exists() or (PACKAGE / a.name).is_dir()]
            )
            found |= set(names)
    return {"model" if n.startswith("model_") else "encoding" if n.startswith("encoding_") else n for n in found}


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_of_the_package_has_a_level():
    assert {part_of(path) for path in SOURCES} <= LEVEL.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_and_stages_do_not_meet(path):
    part = part_of(path)
    for other in imports_of(path) - {part}:
        if part == "__init__":
            continue
        assert LEVEL[other] <= LEVEL[part], f"{part} imports {other}, which is above it"
        assert not (part in STAGES and other in STAGES), f"stage {part} imports stage {other}"


HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "numpy")


@pytest.mark.parametrize(
    "code",
    [
        "import iterative_sft_cli",
        "import iterative_sft_cli.cli, iterative_sft_cli.commands",
        "import iterative_sft_cli.config",
        "import iterative_sft_cli.loop, iterative_sft_cli.experiment",
        "import iterative_sft_cli.filters, iterative_sft_cli.prompts, iterative_sft_cli.rundir",
    ],
)
def test_nothing_heavy_is_imported_without_a_model(code):
    script = f"{code}\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


POSIX_CALLS = {
    *("os.killpg", "os.fork", "os.getuid", "os.geteuid", "os.getpgid", "os.setsid", "os.statvfs", "os.O_NOFOLLOW"),
    *("signal.SIGKILL", "signal.SIGUSR1"),
}


def test_modules_and_calls_that_only_posix_has_are_used_by_one_file():
    posix_only = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "posix"}
    for path in SOURCES:
        tree = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {a.name for n in tree if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in tree if isinstance(n, ast.ImportFrom) and n.module}
        calls = {
            f"{n.value.id}.{n.attr}" for n in tree if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
        }
        assert not (names & posix_only or calls & POSIX_CALLS) or path.name == "posix.py", path
