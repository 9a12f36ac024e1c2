"""What a process that runs for months agrees with the machine that starts it."""

from __future__ import annotations

from typing import Final

#: Beside the log: what launchd writes down of starts that failed before there was a log.
BEFORE_THE_LOG: Final = "launchd.log"

#: Seconds for what comes after the answers: their last bytes, what is saved, the children's end.
_AFTERWARDS: Final = 60.0


def longest_stop(grace: float) -> float:
    """Seconds that a gateway needs to stop at most, with `grace` for its answers and servers."""
    return grace + _AFTERWARDS
