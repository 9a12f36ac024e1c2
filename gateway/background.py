"""Work that is begun and that nobody awaits: it may be cancelled, and that is no failure."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

T = TypeVar("T")


def begin(work: Coroutine[Deferred[Any], Any, T]) -> Deferred[T | None]:
    """Begin `work`; cancelling what is returned ends it."""
    return Deferred.fromCoroutine(work).addErrback(unless_cancelled)


def unless_cancelled(failure: Failure) -> None:
    """An errback: what was cancelled has no result, and anything else fails still."""
    failure.trap(CancelledError)
