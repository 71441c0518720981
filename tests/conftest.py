"""Shared by all tests: where the real data lies, and what no test may do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Wall-clock deadlines say more about the neighbours of a shared machine than about the code.
settings.register_profile("twinlook", deadline=None)
settings.load_profile("twinlook")

# Ray would otherwise decide by files in the home directory whether clusters need a token.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real Sentinel pixels and recorded STAC answers that lie beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: this test needs Sentinel pixels that are not in the repository")
    return folder
