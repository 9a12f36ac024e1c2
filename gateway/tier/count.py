"""
``count_tokens``: exact, never behind the line, and asked for once.

A prompt is rendered by the server's own ``/apply-template`` and counted by its own ``/tokenize``,
from the same prepared body as the call itself, so that the count equals the
``input_tokens + cache_read_input_tokens`` of that call.  Where that cannot be done (an image, which
becomes tokens elsewhere; a server without ``/apply-template``) the server's own count is taken.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final

import attrs
import orjson
from twisted.internet.defer import DeferredSemaphore

from gateway.llama.client import LlamaClient
from gateway.wire import bare, chat
from gateway.wire.errors import ApiError

Json = Any

#: Counts that are remembered (32 bytes each, and what a dict needs).
_REMEMBERED: Final = 4096

#: Questions to the server at once; ``/context`` asks for 28 counts in one second.
_AT_ONCE: Final = 4


@attrs.define(eq=False)
class Counter:
    """Counts the tokens of prepared bodies on one server."""

    client: LlamaClient
    _known: OrderedDict[bytes, int] = attrs.field(factory=OrderedDict, init=False)
    _turnstile: DeferredSemaphore = attrs.field(
        factory=lambda: DeferredSemaphore(_AT_ONCE), init=False
    )

    async def count(self, body: Mapping[str, Json]) -> int:
        """
        The tokens of the prompt that `body`, a prepared one, renders to.

        Raises:
            ApiError: the server is down, or cannot render it.
        """
        asked = body if bare.is_meant(body) else chat.from_messages(body)
        key = blake2b(orjson.dumps(asked), digest_size=16).digest()
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        async with self._turnstile:
            tokens = await self._ask(asked, body)
        self._known[key] = tokens
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return tokens

    def forget(self) -> None:
        """Another model answers now."""
        self._known.clear()

    async def _ask(self, asked: Mapping[str, Json], body: Mapping[str, Json]) -> int:
        if bare.is_meant(asked):
            prompt = asked["prompt"]
            return len(prompt) if isinstance(prompt, list) else await self.client.count(prompt)
        if _has_image(asked):
            return await self.client.count_tokens(body)
        try:
            prompt = await self.client.apply_template(asked)
        except ApiError as error:
            if error.status != 502:  # no such endpoint
                raise
            return await self.client.count_tokens(body)
        return await self.client.count(prompt)


def _has_image(asked: Mapping[str, Json]) -> bool:
    return any(
        part["type"] == "image_url"
        for message in asked["messages"]
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )
