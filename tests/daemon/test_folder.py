"""A state folder that nobody else may write to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.daemon.folder import private
from gateway.service import Options


def test_it_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    """Whatever the umask lets through, nobody else may look into it."""
    before = os.umask(0)
    try:
        folder = private(tmp_path / "state")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_one_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    """It may be a folder that others read for a reason."""
    tmp_path.chmod(0o755)
    assert private(tmp_path).stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_one_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    """They could put another settings file there, or another snapshot."""
    tmp_path.chmod(mode)
    with pytest.raises(PermissionError, match="other users may write to it"):
        private(tmp_path)


def test_one_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who made it first in a folder of all could change what is in it at any time."""
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        private(tmp_path)


def test_a_gateway_does_not_start_in_such_a_folder(tmp_path: Path) -> None:
    """It says which key leads there, and what to do."""
    path, state = tmp_path / "gw.toml", tmp_path / "state"
    state.mkdir()
    state.chmod(0o777)
    path.write_text(f'[gateway]\nstate_dir = "{state}"\n[tier.main]\nurl = "http://h:1"\n')
    with pytest.raises(SystemExit, match=r"gateway\.state_dir: .*: chmod 700"):
        Options().parseOptions(["--config", str(path)])
