"""
Whether a safety check of auto mode can be answered while its client waits.

The check is a prompt of some 35 000 tokens, not streamed; Claude Code gives up on it after 360 s
and denies the action after several tries (docs/protocol.md, "The classifier").  One that cannot be
answered in time would only keep the model from its turns.
"""

from __future__ import annotations

from typing import Final

from gateway.wire.errors import ApiError

#: Seconds that Claude Code waits for the headers of an answer that is not streamed.
CLIENT_WAITS: Final = 360.0

#: Seconds that are left to what no estimate knows.
_MARGIN: Final = 30.0

#: Tokens of a verdict with its reasons, where more are allowed.
_VERDICT: Final = 1024

_REMEDY: Final = (
    'turn auto mode off ("disableAutoMode": "disable" in the permissions of the client\'s settings,'
    ' as `claudegw settings` prints them), or give kind = "classifier" a [[route]] to a faster tier'
)


def verdict_tokens(max_tokens: int) -> int:
    """Tokens that a check is likely to generate, of the `max_tokens` that it may."""
    return min(max_tokens, _VERDICT)


def refuse(tokens: int, needed: float | None, waited: float) -> ApiError | None:
    """
    The error for a check that would come too late; None for one that may go on.

    Args:
        tokens: of its prompt.
        needed: seconds that it would take from now on; None where that was never measured.
        waited: seconds since it came.
    """
    if needed is None:
        why = f"how long a safety check of {tokens} tokens takes here is not known yet"
    elif waited + needed > CLIENT_WAITS - _MARGIN:
        why = (
            f"a safety check of {tokens} tokens would take {waited + needed:.0f} s here,"
            f" and Claude Code waits {CLIENT_WAITS:.0f} s for it"
        )
    else:
        return None
    message = f"Not asked: {why}. Either {_REMEDY}."
    return ApiError("api_error", message, status=503, should_retry=False)
