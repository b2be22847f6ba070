"""Every config that is shipped loads and is planned."""

from pathlib import Path

import pytest

from iterative_sft_cli.config import load_config

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))


def test_there_are_configs():
    assert {"quickstart.yaml", "quickstart-small.yaml", "gsm8k.yaml", "reasoning-gym.yaml"} <= {p.name for p in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_config_loads(path):
    loaded = load_config(path)
    assert loaded.config.rounds >= 1
