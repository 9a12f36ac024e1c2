"""Files that nobody else may read, and that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.files import write_private


def test_what_is_written_in_private_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full leaves what was there before."""
    path = tmp_path / "prefix.json"
    write_private(path, b"one")
    assert path.stat().st_mode & 0o777 == 0o600

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_private(path, b"two")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"one"


def test_a_file_that_lies_in_the_way_is_not_written_to(tmp_path: Path) -> None:
    """Neither where a link leads, nor with the mode that somebody gave it."""
    other, path = tmp_path / "other", tmp_path / "kept"
    other.write_text("as it was")
    (tmp_path / "kept.part").symlink_to(other)
    write_private(path, b"new")
    assert (other.read_text(), path.read_bytes(), path.is_symlink()) == ("as it was", b"new", False)
    (tmp_path / "kept.part").touch(0o666)
    write_private(path, b"newer")
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_need_not_outlive_a_power_cut_waits_for_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is synced, and the file is there."""

    def hangs(_: int) -> None:
        raise AssertionError

    monkeypatch.setattr(os, "fsync", hangs)
    write_private(tmp_path / "note", b"one", synced=False)
    assert (tmp_path / "note").read_bytes() == b"one"
