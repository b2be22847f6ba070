from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from config_files import write

SCRIPT = """
import sys, time
started = time.process_time()
import iterative_sft_cli.config as config
imported = time.process_time()
from pathlib import Path
try:
    config.load_config(Path(sys.argv[1]), sys.argv[2:])
    print("valid")
except config.InvalidConfig as error:
    print(len(error.problems), "problems")
done = time.process_time()
heavy = {"torch", "transformers", "datasets", "peft", "accelerate", "numpy", "pyarrow"} & set(sys.modules)
print(round(imported - started, 3), round(done - imported, 3), sorted(heavy))
"""


def run(path: Path, *overrides: str) -> tuple[str, float, float, str]:
    command = [sys.executable, "-c", SCRIPT, str(path), *overrides]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    to_import, to_load, heavy = out[1].split(" ", 2)
    return out[0], float(to_import), float(to_load), heavy


def test_a_config_is_checked_in_a_fraction_of_a_second_without_torch(tmp_path: Path) -> None:
    said, to_import, to_load, heavy = run(write(tmp_path))
    assert (said, heavy) == ("valid", "[]")
    # CPU seconds, with room for a machine that is busy or slow: 0.11 and 0.03 on two cores of a Zen 4
    assert to_import < 0.6 and to_load < 0.4


def test_a_config_full_of_mistakes_too(tmp_path: Path) -> None:
    from test_config_messages import BAD

    said, _, to_load, heavy = run(write(tmp_path, BAD), "generate.x=3", "a.b=c")
    assert (said, heavy) == ("25 problems", "[]")
    assert to_load < 0.6


def test_names_of_plug_ins_are_looked_up_without_importing_them(tmp_path: Path) -> None:
    said, _, _, heavy = run(
        write(tmp_path),
        "prompts.use=nobody:rows",
        "train.objective=nobody:loss",
        "filters=[nobody:f]",
        "eval=null",
    )
    assert (said, heavy) == ("valid", "[]")
