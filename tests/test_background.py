"""Work that nobody awaits."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from gateway.background import begin


def test_who_is_cancelled_stops_and_has_not_failed() -> None:
    """The work itself is told, and nothing is left that would be logged."""
    awaited: Deferred[None] = Deferred()
    told: list[type[BaseException]] = []

    async def work() -> int:
        try:
            await awaited
        except CancelledError as error:
            told.append(type(error))
            raise
        return 1

    ended: list[int | None] = []
    under_way = begin(work())
    under_way.addCallback(ended.append)
    under_way.cancel()
    assert (told, ended) == ([CancelledError], [None])


def test_what_fails_still_fails() -> None:
    """An error is no cancellation."""

    async def work() -> None:
        raise ValueError("wrong")

    failed: list[Failure] = []
    begin(work()).addErrback(failed.append)
    assert [failure.type for failure in failed] == [ValueError]
