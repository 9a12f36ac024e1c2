"""
A bare prompt as llama-server's ``/completion`` takes it, and what it says as Messages events.

A prepared body with a ``prompt`` is a bare one (`gateway.wire.openai.Bare`).  Its ``messages`` say
the same to whoever compares prompts; the server does not get them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs
import orjson

from gateway.wire.sse import SSEEvent, SSEParser

Json = Any

_REASONS: Final = {"limit": "max_tokens", "word": "stop_sequence"}

#: What no upstream may send, in the place of all that makes no sense.
_NONSENSE: Final = SSEEvent("nonsense", b"null")


def is_meant(body: Mapping[str, Json]) -> bool:
    """Whether a prepared body is a bare prompt."""
    return "prompt" in body


def completion(body: Mapping[str, Json]) -> dict[str, Json]:
    """The body for ``/completion`` of a prepared one."""
    wanted = {name: body[name] for name in body if name not in ("messages", "max_tokens")}
    return {**wanted, "n_predict": body["max_tokens"], "cache_prompt": True}


@attrs.define(eq=False)
class Continuation:
    """Reads the stream of ``/completion``, as the events that ``/v1/messages`` would send."""

    _parser: SSEParser = attrs.field(factory=SSEParser, init=False)

    def feed(self, chunk: bytes) -> list[SSEEvent]:
        """The events that `chunk` completes, in order; raises `EventTooLong`."""
        return [told for event in self._parser.feed(chunk) for told in _told(event)]


def _told(event: SSEEvent) -> list[SSEEvent]:
    try:
        said = orjson.loads(event.data)
        if "error" in said:
            return [SSEEvent("error", event.data)]
        return list(_events(said))
    except (ValueError, KeyError, TypeError, AttributeError):
        return [_NONSENSE]


def _events(said: Mapping[str, Json]) -> Iterator[SSEEvent]:
    if said["content"]:
        delta = {"type": "text_delta", "text": said["content"]}
        yield _event({"type": "content_block_delta", "index": 0, "delta": delta})
    if said.get("stop"):
        timings = said.get("timings") or {}
        usage = {
            "input_tokens": timings.get("prompt_n", said.get("tokens_evaluated", 0)),
            "cache_read_input_tokens": timings.get("cache_n", 0),
            "output_tokens": said.get("tokens_predicted", 0),
        }
        reason = _REASONS.get(said.get("stop_type", ""), "end_turn")
        delta = {"stop_reason": reason, "stop_sequence": said.get("stopping_word") or None}
        yield _event({"type": "message_delta", "delta": delta, "usage": usage})


def _event(body: Json) -> SSEEvent:
    return SSEEvent(body["type"], orjson.dumps(body))
