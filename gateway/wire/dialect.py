"""
In which API's words an answer is told.

An answer is events of the Messages API until the moment it is written down; a `Dialect` writes it.
`MESSAGES` is that API's own, those of the OpenAI API stand in `gateway.wire.openai`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

import attrs
import orjson

from gateway.wire.errors import ApiError
from gateway.wire.events import PING, STILL, Event, encode, error_event

Json = Any


class Dialect(Protocol):
    """Writes one answer; it may remember what it has written."""

    def ping(self) -> bytes:
        """A sign of life, wherever it comes."""

    def still(self) -> bytes:
        """A sign of life between two blocks, for a client that does not take pings for ever."""

    def told(self, events: Iterable[Event]) -> bytes:
        """These events, in a stream."""

    def failed(self, error: ApiError, request_id: str) -> bytes:
        """An error inside a stream whose status was sent long ago."""

    def whole(self, message: Mapping[str, Json]) -> bytes:
        """A whole message, as the only body."""


@attrs.frozen
class _Messages:
    """The Messages API."""

    def ping(self) -> bytes:
        return PING

    def still(self) -> bytes:
        return STILL

    def told(self, events: Iterable[Event]) -> bytes:
        return b"".join(map(encode, events))

    def failed(self, error: ApiError, request_id: str) -> bytes:
        return error_event(error, request_id)

    def whole(self, message: Mapping[str, Json]) -> bytes:
        return orjson.dumps(message)


MESSAGES: Final[Dialect] = _Messages()
