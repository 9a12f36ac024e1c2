"""
What keeps a waiting client alive, and when.

Claude Code gives a request up after 360 s without headers, 300 s of silence or 600 s of mere pings
(docs/protocol.md, "The client's clock").  So headers go out with the first sign of the upstream or
after `COMMIT` seconds, a ``ping`` with them, and another one after each `PERIOD` seconds in which
nothing else was said.  This module knows the times and the bytes; `gateway.tier.answer` owns the
clock and the socket.
"""

from __future__ import annotations

from typing import Final

from gateway.wire.events import PING

#: Seconds after which headers go out, whatever the upstream does.
COMMIT: Final = 1.0

#: Seconds of silence after which a sign of life is due.
PERIOD: Final = 10.0


def due(now: float, last_said: float | None) -> tuple[bytes, float]:
    """
    What is to be said now, and in how many seconds to ask again.

    Args:
        now: seconds on the answer's clock.
        last_said: when the client last got a byte of the body, on the same clock; None for never.
    """
    if last_said is None:
        return PING, PERIOD
    silence = now - last_said
    if silence >= PERIOD:
        return PING, PERIOD
    return b"", PERIOD - silence
