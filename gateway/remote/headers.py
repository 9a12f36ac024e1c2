"""
Which of a client's headers go on to a server of the Messages API.

Betas and versions to come must pass, so their prefixes do, and who asks.  Nothing else: never what
is about this connection, who may come in, where the client is, or who a proxy says that it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_PASSED: Final = ("anthropic-", "x-stainless-", "x-claude-")
_ALONE: Final = frozenset({"user-agent", "x-app"})

#: What may be a secret between the client and us.
_SECRET: Final = ("auth", "key", "token", "secret", "cookie", "credential")


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of `headers` (names in lower case) that the server gets."""
    return {
        name: value
        for name, value in headers.items()
        if (name in _ALONE or name.startswith(_PASSED))
        and not any(word in name for word in _SECRET)
    }
