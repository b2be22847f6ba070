"""Every small variant runs as it is written, offline, in minutes; run by scripts/test-slow."""

import json
import os
import subprocess
import sys
import time

import pytest

from iterative_sft_cli.recipes import names, write_recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", names())
def test_the_small_variant_runs_offline_in_minutes(name, tmp_path):
    write_recipe(name, tmp_path)
    start = time.monotonic()
    out = subprocess.run(
        [sys.executable, "-m", "iterative_sft_cli", "train", f"{name}-small.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=900,
    )
    assert out.returncode == 0, out.stderr
    assert time.monotonic() - start < 600
    stats = [
        json.loads(line) for line in (tmp_path / "runs" / f"{name}-small" / "stats.jsonl").read_text().splitlines()
    ]
    assert stats[-1]["generate/num_samples"] > 0 and stats[-1]["filters/num_accepted"] > 0
