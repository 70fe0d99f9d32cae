"""Writing files and folders when other processes write the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from lapwan.files import atomic_folder


@pytest.mark.parametrize(("first_wins", "kept"), [(True, "theirs"), (False, "ours")])
def test_a_folder_that_appears_meanwhile(first_wins: bool, kept: str, tmp_path: Path) -> None:
    """Two tests of one machine built the embedded model at once; the second took the first one's folder away."""
    path = tmp_path / "model"
    with atomic_folder(path, first_wins=first_wins) as temporary:
        (temporary / "weights").write_text("ours")
        path.mkdir()
        (path / "weights").write_text("theirs")
    assert (path / "weights").read_text() == kept and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_written_where_none_or_an_empty_one_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with atomic_folder(tmp_path / name, first_wins=True) as temporary:
            (temporary / "weights").write_text("ours")
        assert (tmp_path / name / "weights").read_text() == "ours"


def test_a_path_that_cannot_be_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), atomic_folder(tmp_path / "file", first_wins=True) as temporary:
        (temporary / "weights").write_text("ours")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
