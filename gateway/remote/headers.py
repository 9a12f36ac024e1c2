"""
Which of a client's headers go on to a server of the Messages API.

The rule is open, since betas and versions to come must pass: all of ``anthropic-*`` and ``x-*``,
and who asks.  Never what is about this connection, who may come in, or where the client is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_PASSED: Final = ("anthropic-", "x-")
_ALONE: Final = frozenset({"user-agent"})

#: What may be a secret between the client and us, or is about the way to us.
_SECRET: Final = ("auth", "key", "token", "secret", "cookie", "credential")
_KEPT: Final = ("x-forwarded", "x-real-ip", "x-claudegw-", "x-client-ip", "x-http-method")


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of `headers` (names in lower case) that the server gets."""
    return {
        name: value
        for name, value in headers.items()
        if (name in _ALONE or name.startswith(_PASSED))
        and not name.startswith(_KEPT)
        and not any(word in name for word in _SECRET)
    }
