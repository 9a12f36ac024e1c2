"""
One record a call: what it was, where it went, what it cost.

A record is opened when a call comes in and closed by what became of it, with one structured log
line.  It holds no body, no prompt and no key.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import attrs
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from gateway.wire.errors import ApiError
from gateway.wire.events import Usage

#: Closed records that are kept for ``/status``.
_KEPT: Final = 100

log = Logger()


@attrs.define(eq=False)
class Record:
    """
    What is written down of one call.

    Attributes:
        id: the ``request-id`` that the client was told.
        arrived: seconds on the ledger's clock, as all times here.
        kind: what it is; "" until it is understood.
        session: Claude Code's id of the session that it belongs to, or "".
        model: the client's own name for the model.
        tier: where it went.
        rule: what sent it there.
        background: it gives way to others.
        started: when its turn came; None while it waits.
        ended: when it was over; None while it is not.
        resent: how often its server went away, and it was sent again.
        usage: what it cost.
        cold: why its prompt was as cold as it was.
        outcome: what became of it.
    """

    id: str
    arrived: float
    kind: str = ""
    session: str = ""
    model: str = ""
    tier: str = ""
    rule: str = ""
    background: bool = False
    started: float | None = None
    resent: int = 0
    ended: float | None = None
    usage: Usage = attrs.field(factory=Usage)
    cold: Any = None
    outcome: str = ""

    def knows_cold(self, cold: Any) -> None:
        """Why its prompt was as cold as it was."""
        self.cold = cold

    def again(self) -> None:
        """It waits anew, for a server that went away."""
        self.resent += self.started is not None
        self.started = None

    def as_json(self, now: float) -> dict[str, Any]:
        """For the log and ``/status``; times in seconds."""
        until = now if self.ended is None else self.ended
        turn = until if self.started is None else self.started
        return {
            "id": self.id,
            "kind": self.kind,
            "session": self.session[:80],
            "model": self.model[:80],
            "tier": self.tier,
            "rule": self.rule,
            "background": self.background,
            "waited": round(turn - self.arrived, 3),
            "took": round(until - turn, 3),
            "resent": self.resent,
            "input": self.usage.input,
            "cached": self.usage.cached,
            "output": self.usage.output,
            "cold": self.cold,
            "outcome": self.outcome or ("waiting" if self.started is None else "running"),
        }


@attrs.define(eq=False)
class Ledger:
    """All records of this process: those that are open, and the last that were closed."""

    _clock: IReactorTime
    _open: dict[str, Record] = attrs.field(factory=dict, init=False)
    _closed: deque[Record] = attrs.field(factory=lambda: deque(maxlen=_KEPT), init=False)

    @contextmanager
    def call(self, identity: str) -> Iterator[Record]:
        """The record of a call, closed when the block is left, by how it is left."""
        record = Record(identity, self._clock.seconds())
        self._open[identity] = record
        try:
            yield record
            record.outcome = record.outcome or "answered"
        except ApiError as error:
            record.outcome = f"{error.status} {error.kind}"
            raise
        except (CancelledError, GeneratorExit):
            record.outcome = "cancelled"
            raise
        except BaseException:
            record.outcome = "500 internal"
            raise
        finally:
            del self._open[identity]
            self._close(record)

    def started(self, record: Record) -> None:
        """The call's turn has come."""
        record.started = self._clock.seconds()

    def status(self) -> dict[str, Any]:
        """For ``/status``: what is under way, and the last calls, newest first."""
        now = self._clock.seconds()
        return {
            "calls": [record.as_json(now) for record in self._open.values()],
            "last": [record.as_json(now) for record in reversed(self._closed)],
        }

    def _close(self, record: Record) -> None:
        now = record.ended = self._clock.seconds()
        self._closed.append(record)
        log.info(
            "{id} {kind} {model!r} -> {tier} ({rule}): {outcome},"
            " waited {waited} s, took {took} s,"
            " {input} + {cached} cached in, {output} out",
            **record.as_json(now),
        )
