"""
Whether a server of ours that is up does anything.

``/health`` is answered by a thread that does nothing else, so a server that is stuck looks well
there.  What shows is progress: a batch evaluated, a token, an answer.  Slow is not stuck: only
where nothing of that came for `stall` seconds while there was work, the server counts as stuck.
Its output and its streams are listened to; when they are silent, its slots are asked, and a count
that grew is progress as well.  Without work it has only to answer that question; so has one whose
slots all rest, since what is left of an answer then waits for its client to read it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.defer import TimeoutError as TimedOut
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from gateway.background import begin
from gateway.wire.errors import ApiError

Json = Any

#: Looks in the time after which a server counts as stuck.
_LOOKS: Final = 3

#: Of a slot in ``/slots`` (llama.cpp `tools/server/README.md`).
_COUNTS: Final = ("id_task", "n_prompt_tokens", "n_prompt_tokens_processed", "next_token")

log = Logger()


@attrs.define(eq=False)
class Vitals:
    """
    Watches one server, between `start` and `stop`.

    Attributes:
        stall: seconds without progress that are too many.
        works: whether the server has something to do.
        slots: asks for its slots, as ``/slots`` shows them; raises ApiError.
        stuck: told, once, why the server counts as stuck.
    """

    stall: float
    works: Callable[[], bool]
    slots: Callable[[], Awaitable[Sequence[Json]]]
    stuck: Callable[[str], None]
    _reactor: IReactorTime
    _last: float = attrs.field(default=0.0, init=False)
    _counts: Json = attrs.field(default=None, init=False)
    _watching: Deferred[None] | None = attrs.field(default=None, init=False)

    def start(self) -> None:
        """The server is up."""
        self.stop()
        self.sign()
        self._watching = begin(self._watch())

    def stop(self) -> None:
        """It is not, or that is nobody's business any more."""
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()

    def sign(self) -> None:
        """It did something."""
        self._last = self._reactor.seconds()

    async def _watch(self) -> None:
        while True:
            await deferLater(self._reactor, self.stall / _LOOKS)
            if self._reactor.seconds() - self._last < self.stall / _LOOKS:
                continue
            if await self._answers():
                continue
            silent = self._reactor.seconds() - self._last
            if silent >= self.stall:
                does = "no progress" if self.works() else "no answer to any question"
                self._watching = None
                self.stuck(f"{does} for {silent:.0f} s")
                return

    async def _answers(self) -> bool:
        """Ask for the slots; whether that shows a sign of life, which counts as one."""
        worked = self.works()
        asked = Deferred.fromCoroutine(self._ask())
        asked.addTimeout(self.stall / _LOOKS, self._reactor)
        try:
            slots = await asked
        except (ApiError, TimedOut):
            return False
        except CancelledError:
            raise
        except Exception:  # noqa: BLE001  # whatever breaks, a server that is stuck is found
            log.failure("cannot ask a server for signs of life")
            return False
        before, self._counts = self._counts, _counted(slots)
        stood_still = self._counts == before and not _rest(slots)
        if worked and self.works() and stood_still:
            return False
        self.sign()
        return True

    async def _ask(self) -> Sequence[Json]:
        return await self.slots()


def _rest(slots: Sequence[Json]) -> bool:
    """Whether no slot works."""
    return not any(slot.get("is_processing", True) for slot in slots if isinstance(slot, dict))


def _counted(slots: Sequence[Json]) -> Json:
    """What grows in ``/slots`` while a server works."""
    return [[slot.get(name) for name in _COUNTS] for slot in slots if isinstance(slot, dict)]
