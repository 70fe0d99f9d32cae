"""A copy of the stored artefacts for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
from net_cases import copy_artefacts


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the artefacts as the working directory."""
    monkeypatch.chdir(copy := copy_artefacts(tmp_path / "net"))
    return copy
