"""Exported samples train in TRL's own trainers: ISFT_TRL_PYTHON names a Python that has TRL (scripts/peers says how to make one)."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import call_json

from iterative_sft_cli import Run

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "peers" / "trl_sft.py"


@pytest.fixture(scope="module")
def python():
    found = os.environ.get("ISFT_TRL_PYTHON") or (sys.executable if importlib.util.find_spec("trl") else None)
    if found is None:
        pytest.skip("TRL is not installed here; ISFT_TRL_PYTHON can name a Python that has it")
    return found


@pytest.mark.parametrize(("form", "kind"), [("sft-jsonl", []), ("dpo-jsonl", ["dpo"])])
def test_the_file_trains(done, tmp_path, capsys, python, form, kind):
    from tiny import save_tiny

    from iterative_sft_cli.report.export_model import write_for_older_readers

    model = save_tiny(tmp_path / "model", dtype="float32")
    write_for_older_readers(model)
    made = call_json(capsys, "export", done, "--to", form, "--out", tmp_path / "rows.jsonl")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [python, str(SCRIPT), str(model), str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), *kind]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["rows"] == made["rows"] > 5 and len(told["losses"]) == 2 and all(map(math.isfinite, told["losses"]))
    if not kind:
        first = next(one for one in Run.open(done).iter_samples() if one.accepted)
        assert first.sample.prompt in told["first"] and first.sample.completion in told["first"]
