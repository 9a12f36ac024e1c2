"""
One record a call: what it was, where it went, what it cost.

A record is opened when a call comes in and closed by what became of it, with one structured log
line; then the disk keeps it (`gateway.history`).  It holds no body, no prompt and no key.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import attrs
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from gateway.history import History
from gateway.wire.errors import ApiError
from gateway.wire.events import Usage

Json = Any

#: Closed records that are kept for ``/status``.
_KEPT: Final = 100

#: Seconds that one step of the chart stands for, and how many steps it has: six hours.
_STEP: Final = 300
_STEPS: Final = 72

#: A closed record, in the log.
_LINE: Final = (
    "{id} {kind} {model!r} -> {tier} ({rule}): {outcome}, waited {waited} s, took {took} s,"
    " {input} + {cached} cached in, {output} out"
)

log = Logger()


@attrs.define(eq=False)
class Record:
    """
    What is written down of one call.

    Attributes:
        id: the ``request-id`` that the client was told.
        at: when it arrived, in seconds of the epoch.
        arrived: the same on the ledger's clock, as all times here.
        kind: what it is; "" until it is understood.
        session: Claude Code's id of the session that it belongs to, or "".
        model: the client's own name for the model.
        tier: where it went.
        rule: what sent it there.
        background: it gives way to others.
        started: when its turn came; None while it waits.
        first: when the first content of its answer came; None before that.
        ended: when it was over; None while it is not.
        resent: how often its server went away, and it was sent again.
        usage: what it cost.
        cold: why its prompt was as cold as it was.
        outcome: what became of it.
    """

    id: str
    at: float
    arrived: float
    kind: str = ""
    session: str = ""
    model: str = ""
    tier: str = ""
    rule: str = ""
    background: bool = False
    started: float | None = None
    first: float | None = None
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
        self.started = self.first = None

    def as_json(self, now: float) -> dict[str, Json]:
        """For the log and ``/status``; times in seconds."""
        until = now if self.ended is None else self.ended
        turn = until if self.started is None else self.started
        return {
            "id": self.id,
            "at": round(self.at, 3),
            "kind": self.kind,
            "session": self.session[:80],
            "model": self.model[:80],
            "tier": self.tier,
            "rule": self.rule,
            "background": self.background,
            "waited": round(turn - self.arrived, 3),
            "first": None if self.first is None else round(self.first - turn, 3),
            "took": round(until - turn, 3),
            "resent": self.resent,
            "input": self.usage.input,
            "cached": self.usage.cached,
            "output": self.usage.output,
            "cold": self.cold,
            "outcome": self.outcome or ("waiting" if self.started is None else "running"),
        }


@attrs.define
class _Step:
    """What one step of the chart counts."""

    calls: int = 0
    input: int = 0
    cached: int = 0
    output: int = 0
    first: float = 0.0
    with_first: int = 0

    @property
    def mean_first(self) -> float | None:
        return round(self.first / self.with_first, 3) if self.with_first else None


@attrs.define(eq=False)
class _Chart:
    """The calls of the last hours, by when they ended; counts of tokens are none of them."""

    _steps: dict[int, _Step] = attrs.field(factory=dict, init=False)

    def add(self, call: Mapping[str, Json]) -> None:
        """A call that ended, as `Record.as_json` has it."""
        if call["kind"] == "count":
            return
        ended = call["at"] + call["waited"] + call["took"]
        step = self._steps.setdefault(int(ended // _STEP), _Step())
        step.calls += 1
        step.input += call["input"] or 0
        step.cached += call["cached"]
        step.output += call["output"]
        if call["first"] is not None:
            step.first += call["first"]
            step.with_first += 1
        if len(self._steps) > _STEPS:
            del self._steps[min(self._steps)]

    def until(self, now: float) -> list[dict[str, Json]]:
        """All steps up to the one of `now`, in seconds of the epoch, oldest first."""
        last = int(now // _STEP)
        wanted = range(last - _STEPS + 1, last + 1)
        steps = {number: self._steps.get(number, _Step()) for number in wanted}
        return [
            {
                "at": number * _STEP,
                "calls": step.calls,
                "input": step.input,
                "cached": step.cached,
                "output": step.output,
                "first": step.mean_first,
                "with_first": step.with_first,
            }
            for number, step in steps.items()
        ]


@attrs.define(eq=False)
class Ledger:
    """
    All records of this process: those that are open, and the last that were closed.

    Attributes:
        history: what keeps them for the next process; None keeps none.
        heard: told of each call that is over, as `Record.as_json` has it.
    """

    _clock: IReactorTime
    _wall: Callable[[], float] = time.time
    history: History | None = None
    heard: list[Callable[[Mapping[str, Json]], None]] = attrs.field(factory=list, init=False)
    _open: dict[str, Record] = attrs.field(factory=dict, init=False)
    _closed: deque[dict[str, Json]] = attrs.field(factory=lambda: deque(maxlen=_KEPT), init=False)
    _chart: _Chart = attrs.field(factory=_Chart, init=False)

    def start(self) -> None:
        """Know what the last process knew, and begin to write."""
        if self.history is not None:
            for closed in self.history.start(self._wall() - _STEP * _STEPS, _KEPT):
                self._closed.append(closed)
                self._chart.add(closed)

    def stop(self) -> None:
        """Have everything written."""
        if self.history is not None:
            self.history.stop()

    @contextmanager
    def call(self, identity: str) -> Iterator[Record]:
        """The record of a call, closed when the block is left, by how it is left."""
        record = Record(identity, self._wall(), self._clock.seconds())
        self._open[identity] = record
        try:
            yield record
            record.outcome = record.outcome or "answered"
        except ApiError as error:
            record.outcome = record.outcome or f"{error.status} {error.kind}"
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
        record.started, record.first = self._clock.seconds(), None

    def content(self, record: Record) -> None:
        """There is content of its answer; the first counts."""
        if record.first is None:
            record.first = self._clock.seconds()

    def chart(self) -> list[dict[str, Json]]:
        """
        The last six hours in steps of five minutes, oldest first.

        Each has ``at``, the epoch seconds at which it begins, and of the calls that ended in it:
        ``calls``, the tokens ``input``, ``cached`` and ``output``, and ``first``, the mean seconds
        from a call's turn to its first content, of the ``with_first`` calls that had any; None
        where there are none.
        """
        return self._chart.until(self._wall())

    def status(self) -> dict[str, Json]:
        """For ``/status``: what is under way, and the last calls, newest first."""
        now = self._clock.seconds()
        return {
            "calls": [record.as_json(now) for record in self._open.values()],
            "last": [*reversed(self._closed)],
            "ledger": None if self.history is None else self.history.status(),
        }

    def _close(self, record: Record) -> None:
        now = record.ended = self._clock.seconds()
        closed = record.as_json(now)
        try:
            self._write(closed)
        except Exception:  # noqa: BLE001  # no answer may fail for what is written of it
            log.failure("{id} could not be written down", id=record.id)

    def _write(self, closed: dict[str, Json]) -> None:
        self._closed.append(closed)
        self._chart.add(closed)
        if self.history is not None:
            self.history.put(closed)
        for hear in self.heard:
            hear(closed)
        # In one piece: Twisted takes longer to fill in each field than Python all of them.
        log.info("{line}", line=_LINE.format_map(closed), **closed)
