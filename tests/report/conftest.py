"""One finished toy run for all reading tests; a test that changes a run makes its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import report_runs


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of three rounds, with an evaluation. Read only."""
    return report_runs.train(tmp_path_factory.mktemp("done"))
