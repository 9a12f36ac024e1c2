"""
Who goes next.

1. A call that somebody waits for goes before a background call.
2. Among equals, the one that came first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Waiting(Protocol):
    """What is known of a waiting call."""

    @property
    def background(self) -> bool: ...


def next_to_go(waiting: Sequence[Waiting]) -> int:
    """The index of the next call among `waiting`, which is in order of arrival and not empty."""
    for index, call in enumerate(waiting):
        if not call.background:
            return index
    return 0
