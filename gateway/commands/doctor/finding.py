"""What one look of the doctor found, and how it says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import attrs

Status = Literal["ok", "warning", "problem", "skipped"]


@attrs.frozen
class Finding:
    """
    What one look found.

    Attributes:
        check: its name; that of a tier's begins with the tier's.
        status: ``problem`` where Claude Code would not work.
        found: what was seen.
        remedy: what mends it; "" where nothing is wrong.
    """

    check: str
    status: Status
    found: str
    remedy: str = ""


Say = Callable[..., Finding]


def who(name: str, pid: int) -> str:
    """Somebody who listens at a port."""
    return f"{name} (process {pid})" if pid else "something"
