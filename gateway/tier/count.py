"""
``count_tokens``: exact, never behind the line, and asked for once.

The server counts, from the same prepared body as the call itself, so that the count equals the
``input_tokens + cache_read_input_tokens`` of that call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final

import attrs
import orjson
from twisted.internet.defer import DeferredSemaphore

from gateway.upstream import Server

Json = Any

#: Counts that are remembered (32 bytes each, and what a dict needs).
_REMEMBERED: Final = 4096

#: Questions to the server at once; ``/context`` asks for 28 counts in one second.
_AT_ONCE: Final = 4

#: What a prompt does not depend on.
_COUNTS_NOT: Final = frozenset(
    {"max_tokens", "stop_sequences", "temperature", "top_p", "top_k", "metadata"}
)


@attrs.define(eq=False)
class Counter:
    """Counts the tokens of prepared bodies on one server."""

    client: Server
    _known: OrderedDict[bytes, int] = attrs.field(factory=OrderedDict, init=False)
    _turnstile: DeferredSemaphore = attrs.field(
        factory=lambda: DeferredSemaphore(_AT_ONCE), init=False
    )

    async def count(
        self, body: Mapping[str, Json], headers: Mapping[str, str] | None = None
    ) -> int | None:
        """
        The tokens of the prompt that `body`, a prepared one, renders to; None where nobody can say.

        Args:
            body: Messages-shaped.
            headers: the client's own, names in lower case: a server elsewhere may need its betas.

        Raises:
            ApiError: the server is down, or cannot render it.
        """
        asked = {name: body[name] for name in body if name not in _COUNTS_NOT}
        key = blake2b(orjson.dumps(asked), digest_size=16).digest()
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        async with self._turnstile:
            tokens = await self.client.count_body(body, headers)
        if tokens is None:
            return None
        self._known[key] = tokens
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return tokens

    def forget(self) -> None:
        """Another model answers now."""
        self._known.clear()
