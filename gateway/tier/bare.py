"""
A bare prompt, to be gone on with.

A prepared body with a ``prompt`` is a bare one (`gateway.wire.openai.Bare`).  It goes to
``/completion``, which streams events of its own; they become those of ``/v1/messages`` here, so
that all that stands above is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
import orjson
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer

from gateway.llama.client import Answer, LlamaClient
from gateway.wire import sse
from gateway.wire.errors import ApiError
from gateway.wire.sse import EventTooLong, SSEEvent, SSEParser

Json = Any

#: What a prepared body has for the house, and not for the server.
_OURS: Final = ("messages", "max_tokens")

_REASONS: Final = {"limit": "max_tokens", "word": "stop_sequence"}


async def asked(client: LlamaClient, body: Mapping[str, Json]) -> Answer | Told:
    """
    The answer to a prepared body, bare or not, to be streamed as Messages events.

    Raises:
        ApiError: the server cannot be reached, or refuses.
        Lost: it went away before it answered.
    """
    if "prompt" not in body:
        return await client.messages(body)
    wanted = {name: body[name] for name in body if name not in _OURS}
    wanted |= {"n_predict": body["max_tokens"], "cache_prompt": True}
    return Told(await client.go_on(wanted))


@attrs.frozen(eq=False)
class Told:
    """An answer of ``/completion``, told as ``/v1/messages`` would."""

    _answer: Answer

    def stream(
        self, receive: Callable[[bytes], None], meet: Callable[[IPushProducer], None]
    ) -> Deferred[None]:
        """As `Answer.stream`."""
        parser = SSEParser()

        def translate(chunk: bytes) -> None:
            try:
                events = parser.feed(chunk)
            except EventTooLong as error:
                raise ApiError("api_error", f"The model server sent {error}.") from None
            receive(b"".join(map(_message_event, events)))

        return self._answer.stream(translate, meet)


def _message_event(event: SSEEvent) -> bytes:
    """What one event of ``/completion`` is in the Messages API."""
    try:
        said = orjson.loads(event.data)
        if "error" in said:
            return sse.encode("error", event.data)
        told = _block(said["content"]) if said["content"] else b""
        return told + _end(said) if said.get("stop") else told
    except (ValueError, KeyError, TypeError, AttributeError):
        return sse.encode("nonsense", b"null")  # it is known what to say to that


def _block(text: str) -> bytes:
    delta = {"type": "text_delta", "text": text}
    return _encode({"type": "content_block_delta", "index": 0, "delta": delta})


def _end(said: Mapping[str, Json]) -> bytes:
    reason = _REASONS.get(said.get("stop_type", ""), "end_turn")
    timings = said.get("timings") or {}
    usage = {
        "input_tokens": timings.get("prompt_n", said.get("tokens_evaluated", 0)),
        "cache_read_input_tokens": timings.get("cache_n", 0),
        "output_tokens": said.get("tokens_predicted", 0),
    }
    delta = {"stop_reason": reason, "stop_sequence": said.get("stopping_word") or None}
    return _encode({"type": "message_delta", "delta": delta, "usage": usage})


def _encode(body: Json) -> bytes:
    return sse.encode(body["type"], orjson.dumps(body))
