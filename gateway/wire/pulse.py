"""
What keeps a waiting client alive, and when.

Claude Code gives a request up after 360 s without headers, 300 s of silence or 600 s of mere pings,
and accepts ``message_delta`` events without end (docs/protocol.md, "The client's clock").  Hence a
ladder, from the coming of the call on:

1. Nothing for a second: what is refused in it gets a true status.  While no server can count yet
   (it is loading) that second is two minutes.
2. The headers and a ``ping``, and one more after every ten seconds of silence, in line and in
   prefill.
3. From 500 s on ``message_start``; the upstream's own is left out when it comes.
4. A ``message_delta`` that stops nothing after every thirty seconds of silence.  While a content
   block is open it is a ``ping`` again: nothing else may stand inside a block.

This module knows the times; `gateway.tier.answer` owns the clock and the socket.
"""

from __future__ import annotations

from enum import Enum, auto

import attrs


class Rung(Enum):
    """What is due."""

    NOTHING = auto()
    PING = auto()
    START = auto()
    DELTA = auto()


@attrs.frozen
class Times:
    """
    The rungs' times, in seconds.

    Attributes:
        commit: after the call's coming: headers.
        hold: the same while no server can count yet.
        ping: of silence: a ``ping``.
        start: after the call's coming: ``message_start``.
        delta: of silence after that: a ``message_delta``.
    """

    commit: float = 1.0
    hold: float = 120.0
    ping: float = 10.0
    start: float = 500.0
    delta: float = 30.0


@attrs.frozen
class Told:
    """
    What a client has been told so far; times in seconds on the answer's clock.

    Attributes:
        arrived: when its call came.
        said_at: when it last got a byte of the body; None for never.
        held: no server can count yet.
        started: it got its ``message_start``.
        in_block: a content block is open.
    """

    arrived: float
    said_at: float | None = None
    held: bool = False
    started: bool = False
    in_block: bool = False


def due(now: float, told: Told, times: Times) -> tuple[Rung, float]:
    """What is to be said now, and in how many seconds to ask again."""
    start_at = told.arrived + times.start
    if told.said_at is None:
        begin_at = told.arrived + (times.hold if told.held else times.commit)
        if now < min(begin_at, start_at):
            return Rung.NOTHING, min(begin_at, start_at) - now
        said_at = now - times.ping  # as if the silence had lasted
    else:
        said_at = told.said_at
    if not told.started and now >= start_at:
        return Rung.START, times.delta
    rung, period = Rung.PING, times.ping
    if told.started and not told.in_block:
        rung, period = Rung.DELTA, times.delta
    silence = now - said_at
    again = period if silence >= period else period - silence
    if not told.started:
        again = min(again, start_at - now)
    return (rung if silence >= period else Rung.NOTHING), again
