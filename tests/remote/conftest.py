"""Stops the gateways that a test leaves behind, whose calls may still be under way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.remote.scene import Scene


@pytest.fixture(autouse=True)
def scenes_end() -> Iterator[None]:
    """Their lines let nobody in any more."""
    yield
    while Scene.open:
        Scene.open.pop().tier.stop()
