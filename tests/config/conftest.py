from __future__ import annotations

import pytest

from iterative_sft_cli.config import availability


@pytest.fixture(autouse=True)
def everything_is_available(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schema is tested whole, whatever is still refused; only the tests of that see the real table."""
    if request.module.__name__ not in ("test_config_availability", "test_every_leaf_is_read"):
        monkeypatch.setattr(availability, "NOT_YET", {})
