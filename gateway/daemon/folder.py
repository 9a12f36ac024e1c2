"""The state folder, which nobody else may write to: what lies in it is run and trusted."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

#: Group and others may write.
_OPEN: Final = 0o022


def private(path: Path) -> Path:
    """
    The folder at `path`, made for its owner alone if there is none.

    One that is there keeps its mode: it may be somebody's home.

    Raises:
        OSError: it cannot be made, belongs to another user, or others may write to it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = path.stat()
    if state.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user", str(path))
    if state.st_mode & _OPEN:
        raise PermissionError(errno.EPERM, "other users may write to it: chmod 700", str(path))
    return path
