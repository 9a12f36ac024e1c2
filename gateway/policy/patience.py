"""
How long a client waits for an answer that is not streamed, and what is no use asking then.

Claude Code asks again after 360 s, unless its settings say otherwise; spaces before the JSON do not
help, they make it 300 s (docs/protocol.md, "The client's clock").

A safety check of auto mode is a prompt of some 35 000 tokens, not streamed; the client denies the
action after several tries (docs/protocol.md, "The classifier").  One that cannot be answered in
time would only keep the model from its turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gateway.wire.errors import ApiError

#: Seconds that Claude Code waits for the headers of an answer that is not streamed, and the value
#: of `API_TIMEOUT_MS`, in seconds, above which it is that value.
_CUT_OFF: Final = 360.0
_DEFAULT: Final = 600.0

#: What nobody means who says how long he waits: more than a month.
_LONGEST: Final = 31 * 86400.0

#: Seconds before that in which it is told.
_IN_TIME: Final = 10.0

#: Seconds that are left to what no estimate knows.
_MARGIN: Final = 20.0

#: Tokens of a verdict with its reasons, where more are allowed.
_VERDICT: Final = 1024

_REMEDY: Final = (
    'turn auto mode off ("disableAutoMode": "disable" in the permissions of the client\'s settings,'
    ' as `claudegw settings` prints them), or give kind = "classifier" a [[route]] to a faster tier'
)


def verdict_tokens(max_tokens: int) -> int:
    """Tokens that a check is likely to generate, of the `max_tokens` that it may."""
    return min(max_tokens, _VERDICT)


def client_waits(headers: Mapping[str, str]) -> float | None:
    """
    Seconds in which an answer that is not streamed must be there; None where nobody counts them.

    Args:
        headers: the request's headers, names in lower case.
    """
    if not headers.get("user-agent", "").startswith("claude-cli/"):
        return None
    try:
        timeout = float(headers.get("x-stainless-timeout", _DEFAULT))
    except ValueError:
        timeout = _DEFAULT
    if not 0 <= timeout <= _LONGEST:  # nor can any clock count it
        timeout = _DEFAULT
    limit = timeout if timeout > _DEFAULT else min(timeout, _CUT_OFF)
    return max(1.0, limit - _IN_TIME)


def refuse(
    tokens: int, needed: float | None, waited: float, limit: float | None
) -> ApiError | None:
    """
    The error for a check that would come too late; None for one that may go on.

    Args:
        tokens: of its prompt.
        needed: seconds that it would take from now on; None where that was never measured.
        waited: seconds since it came.
        limit: what `client_waits` says.
    """
    if needed is None:
        why = f"how long a safety check of {tokens} tokens takes here is not known yet"
    elif limit is not None and waited + needed > limit - _MARGIN:
        why = (
            f"a safety check of {tokens} tokens would take {waited + needed:.0f} s here,"
            f" and the client waits {limit:.0f} s for it"
        )
    else:
        return None
    message = f"Not asked: {why}. Either {_REMEDY}."
    return ApiError("api_error", message, status=503, should_retry=False)
