"""What MODEL may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from lapwan.errors import UserError
from lapwan.tiny.model import tiny_folder
from lapwan.tiny.resolve import resolve


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """A hub cache of our own; nothing goes to the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_hub_id_is_taken_from_the_local_cache(hub) -> None:
    repository = hub / "models--someone--wan"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("a" * 40)).symlink_to(tiny_folder("t2v"))
    assert resolve("someone/wan").task == "t2v"


def test_a_hub_id_that_is_not_there_is_not_downloaded(hub) -> None:
    with pytest.raises(UserError, match="fetch it first: hf download someone/else"):
        resolve("someone/else")


@pytest.mark.parametrize("name", ["out/merged", "../out/merged", "nowhere"])
def test_a_mistyped_path_is_a_path(hub, name) -> None:
    (hub.parent / "out").mkdir()
    with pytest.raises(UserError, match=f"no model folder {name}"):
        resolve(name)
    with pytest.raises(UserError, match="no embedded model 'tiny-x'"):
        resolve("tiny-x")
