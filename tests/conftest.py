"""
What every test is held to: no failure may be logged that it does not ask for.

How long an example takes is no matter: the machine may have other work.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import cast

import pytest
from hypothesis import settings
from twisted.logger import ILogObserver, LogEvent, LogLevel, globalLogPublisher

# In CI hypothesis has a profile of its own, which has no deadline either.
if settings.get_current_profile_name() == "default":
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")


@pytest.fixture
def logged() -> Iterator[list[LogEvent]]:
    """What the code under test has logged so far."""
    events: list[LogEvent] = []
    observer = cast("ILogObserver", events.append)
    globalLogPublisher.addObserver(observer)
    yield events
    globalLogPublisher.removeObserver(observer)


@pytest.fixture(autouse=True)
def no_failure_is_logged(logged: list[LogEvent]) -> Iterator[None]:
    """Neither an unhandled Deferred nor an error may pass unseen; a test that means one clears."""
    yield
    gc.collect(1)  # what a test leaves behind is young
    bad = [
        event
        for event in logged
        if event.get("log_failure") is not None or event["log_level"] >= LogLevel.error
    ]
    assert bad == []
