"""Forked ranks, two hosts, and experiments for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forking import Forks
from hosts import Hosts
from rank_helpers import AGAIN, QUICK, contents, write_tiny


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    found = Forks()
    yield found
    found.close()


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """Two hosts for two ranks; skips where namespaces cannot be made."""
    try:
        found = Hosts()
    except OSError as error:
        pytest.skip(str(error))
    yield found
    found.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    from tiny import save_tiny

    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(forks: Forks, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, str]:
    """What two ranks leave of the tiny experiment `AGAIN`."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_tiny(folder, "run", tiny_model, **AGAIN)
    assert forks.run(folder, 2, "train", str(config), **QUICK) == [0, 0], (folder / "rank0.txt").read_text()
    return contents(folder / "run")


@pytest.fixture
def said(tmp_path: Path) -> Any:
    """What a rank printed."""
    return lambda rank: (tmp_path / f"rank{rank}.txt").read_text()
