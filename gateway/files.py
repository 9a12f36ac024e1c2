"""Files that only the gateway may read, and that are whole or not there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_private(path: Path, data: bytes, *, synced: bool = True) -> None:
    """
    Put `data` into a file at `path`, whole or not at all, for nobody else to read.

    Args:
        path: of the file; what is there is replaced.
        data: all that it has then.
        synced: whether it outlives a power cut too.  That waits for the disk: do it in a thread.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # its mode may be another
        handle = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        part.rename(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    if synced:
        _sync(path.parent)


def _sync(folder: Path) -> None:
    """Let a new name outlive a power cut, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
