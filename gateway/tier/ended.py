"""
The calls that a person has ended.

A client whose stream breaks off sends its request again, whatever the error says (docs/protocol.md,
"Errors").  A call that was ended by hand would so begin anew at once; so for a short while it is
refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs
from twisted.internet.interfaces import IReactorTime

from gateway.wire.errors import ApiError

#: Seconds for which the same call is refused.
REMEMBERED: Final = 15.0

#: Calls that are remembered at most.
_MOST: Final = 100


@attrs.define(eq=False)
class Ended:
    """What is remembered of them: when each ended, the oldest first."""

    _reactor: IReactorTime
    _when: dict[bytes, float] = attrs.field(factory=dict, init=False)

    def end(self, key: bytes) -> ApiError:
        """What is told to the client of the call that `key` tells from others."""
        self._when.pop(key, None)
        self._when[key] = self._reactor.seconds()
        if len(self._when) > _MOST:
            del self._when[next(iter(self._when))]
        return _refusal()

    def check(self, key: Callable[[], bytes]) -> None:
        """Raise ApiError (400, not to be tried again) for a call that was ended a moment ago."""
        oldest = self._reactor.seconds() - REMEMBERED
        self._when = {key: when for key, when in self._when.items() if when > oldest}
        # Most of the time there are none, and a key is the digest of a whole body.
        if self._when and key() in self._when:
            raise _refusal()


def _refusal() -> ApiError:
    message = "Somebody ended this call by hand; ask again in a while if that was a mistake."
    return ApiError("invalid_request_error", message, should_retry=False)
