"""Forked ranks, two hosts, and experiments for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forking import Forks
from hosts import Hosts
from rank_helpers import AGAIN, PIECES, QUICK, contents, write_tiny


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
    return run_undisturbed(forks, tmp_path_factory.mktemp("undisturbed"), tiny_model, AGAIN)


@pytest.fixture(scope="session")
def undisturbed_pieces(forks: Forks, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, str]:
    """What they leave of it with fsdp2."""
    return run_undisturbed(forks, tmp_path_factory.mktemp("pieces"), tiny_model, PIECES)


def run_undisturbed(forks: Forks, folder: Path, tiny_model: Path, changes: dict[str, Any]) -> dict[str, str]:
    config = write_tiny(folder, "run", tiny_model, **changes)
    assert forks.run(folder, 2, "train", str(config), **QUICK) == [0, 0], (folder / "rank0.txt").read_text()
    return contents(folder / "run")


@pytest.fixture
def said(tmp_path: Path) -> Any:
    """What a rank printed."""
    return lambda rank: (tmp_path / f"rank{rank}.txt").read_text()
