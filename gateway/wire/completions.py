"""
What the OpenAI API says: answers and errors, in its words.

An answer is told as chunks (https://platform.openai.com/docs/api-reference/chat-streaming), or as
one object; what keeps a waiting client alive is a comment, which its clients pass over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final, Self

import attrs
import orjson

from gateway.wire.errors import ApiError
from gateway.wire.events import Event

Json = Any

#: Where a schema stands in a Messages request, and where it stood in the client's.
_SCHEMA: Final = ("output_config.format.schema", "response_format.json_schema.schema")

# --- whose words ----------------------------------------------------------------------------------

#: Paths that only this API has.
_OWN: Final = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


def is_meant(path: str, headers: Mapping[str, str]) -> bool:
    """
    Whether a request wants to be answered in the words of this API.

    Args:
        path: what it asks for.
        headers: its headers, names in lower case.
    """
    if path in _OWN:
        return True
    if not path.startswith("/v1/") or path.startswith("/v1/messages"):
        return False
    shows_anthropic = "anthropic-version" in headers or "x-api-key" in headers
    return not shows_anthropic and headers.get("authorization", "").startswith("Bearer ")


# --- errors ---------------------------------------------------------------------------------------

#: Kind of error -> its type and code here, where they are others.
_ERRORS: Final[Mapping[str, tuple[str, str | None]]] = {
    "authentication_error": ("invalid_request_error", "invalid_api_key"),
    "not_found_error": ("invalid_request_error", None),
    "request_too_large": ("invalid_request_error", None),
    "api_error": ("server_error", None),
    "timeout_error": ("server_error", None),
    "overloaded_error": ("server_error", None),
}

_PATH: Final = re.compile(r"([a-z_]+(?:\.\w+)*): ")


def status(error: ApiError) -> int:
    """The HTTP status of `error`; this API has no 529."""
    return 503 if error.status == 529 else error.status


def envelope(error: ApiError) -> dict[str, Json]:
    """The body, as this API wraps it."""
    message = error.message.replace(*_SCHEMA)
    kind, code = _ERRORS.get(error.kind, (error.kind, None))
    if message.lower().startswith("prompt is too long"):
        code = "context_length_exceeded"
    where = _PATH.match(message)
    param = where[1] if where and kind == "invalid_request_error" else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model(identity: str, window: int | None) -> dict[str, Json]:
    """A model, with its window in tokens where that is known, as other local servers say it."""
    found = {"id": identity, "object": "model", "created": 1767225600, "owned_by": "claudegw"}
    return found if window is None else {**found, "max_model_len": window}


# --- an answer in the words of this API -----------------------------------------------------------

_PING: Final = b": ping\n\n"
_DONE: Final = b"data: [DONE]\n\n"

_REASONS: Final = {"max_tokens": "length", "tool_use": "tool_calls", "refusal": "content_filter"}


def _usage(said: Mapping[str, Json]) -> Json:
    cached = said["cache_read_input_tokens"]
    prompt, output = said["input_tokens"] + cached, said["output_tokens"]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


@attrs.define(eq=False)
class _Told:
    """One answer, on its way (`gateway.wire.dialect.Dialect`)."""

    model: str
    created: int
    with_usage: bool = False
    _id: str = attrs.field(default="", init=False)

    #: What an answer is called, a part of a stream, and how its id begins.
    kinds: ClassVar[tuple[str, str, str]]

    @classmethod
    def to(cls, body: Mapping[str, Json], created: int) -> Self:
        """The answer to a checked body."""
        options = body.get("stream_options") or {}
        return cls(body["model"], created, bool(options.get("include_usage")))

    def ping(self) -> bytes:
        return _PING

    def still(self) -> bytes:
        return _PING

    def told(self, events: Iterable[Event]) -> bytes:
        return b"".join(chunk for event in events for chunk in self._chunks(event.body))

    def failed(self, error: ApiError, request_id: str) -> bytes:  # noqa: ARG002  # it has no place
        return b"\n\n" + _line(envelope(error))

    def whole(self, message: Mapping[str, Json]) -> bytes:
        self._id = message["id"]
        reason = _reason(message)
        choice = {"index": 0, "logprobs": None, "finish_reason": reason, **self._all(message)}
        usage = _usage(message["usage"])
        return orjson.dumps({**self._head(self.kinds[0]), "choices": [choice], "usage": usage})

    def _chunks(self, body: Mapping[str, Json]) -> Iterator[bytes]:
        head = self._head(self.kinds[1])
        no_usage = {"usage": None} if self.with_usage else {}
        if body["type"] == "message_start":
            self._id = body["message"]["id"]
            head = self._head(self.kinds[1])
        for said in self._says(body):
            choice = {"index": 0, "logprobs": None, "finish_reason": None, **said}
            yield _line({**head, "choices": [choice], **no_usage})
        if body["type"] == "message_delta" and self.with_usage:
            yield _line({**head, "choices": [], "usage": _usage(body["usage"])})
        if body["type"] == "message_stop":
            yield _DONE

    def _head(self, kind: str) -> dict[str, Json]:
        identity = self.kinds[2] + self._id.removeprefix("msg_")
        return {"id": identity, "object": kind, "created": self.created, "model": self.model}

    def _says(self, body: Mapping[str, Json]) -> Iterator[Json]:
        """What an event says, as choices."""
        raise NotImplementedError

    def _all(self, message: Mapping[str, Json]) -> Json:
        """What a whole message says, as a choice."""
        raise NotImplementedError


@attrs.define(eq=False)
class Chat(_Told):
    """The answer to a chat call."""

    _calls: int = attrs.field(default=0, init=False)
    _awaits_input: bool = attrs.field(default=False, init=False)

    kinds = ("chat.completion", "chat.completion.chunk", "chatcmpl-")

    def _says(self, body: Mapping[str, Json]) -> Iterator[Json]:
        match body["type"]:
            case "message_start":
                yield {"delta": {"role": "assistant", "content": ""}}
            case "content_block_start":
                yield from self._begins(body["content_block"])
            case "content_block_delta":
                yield from self._goes_on(body["delta"])
            case "content_block_stop" if self._awaits_input:  # no input is an empty one
                yield self._input("{}")
            case "message_delta":
                yield {"delta": {}, "finish_reason": _reason(body["delta"])}

    def _begins(self, block: Mapping[str, Json]) -> Iterator[Json]:
        match block["type"]:
            case "text" if block["text"]:
                yield {"delta": {"content": block["text"]}}
            case "thinking" if block["thinking"]:
                yield {"delta": {"reasoning_content": block["thinking"]}}
            case "tool_use":
                self._calls += 1
                self._awaits_input = True
                function = {"name": block["name"], "arguments": ""}
                call = {"id": block["id"], "type": "function", "function": function}
                yield {"delta": {"tool_calls": [{"index": self._calls - 1, **call}]}}

    def _goes_on(self, delta: Mapping[str, Json]) -> Iterator[Json]:
        match delta["type"]:
            case "text_delta":
                yield {"delta": {"content": delta["text"]}}
            case "thinking_delta":
                yield {"delta": {"reasoning_content": delta["thinking"]}}
            case "input_json_delta" if delta["partial_json"]:
                yield self._input(delta["partial_json"])

    def _input(self, text: str) -> Json:
        self._awaits_input = False
        call = {"index": self._calls - 1, "function": {"arguments": text}}
        return {"delta": {"tool_calls": [call]}}

    def _all(self, message: Mapping[str, Json]) -> Json:
        blocks = message["content"]
        said: dict[str, Json] = {"role": "assistant", "content": _texts(blocks, "text") or None}
        thought = _texts(blocks, "thinking")
        if thought:
            said["reasoning_content"] = thought
        calls = [_tool_call(block) for block in blocks if block["type"] == "tool_use"]
        if calls:
            said["tool_calls"] = calls
        return {"message": said | {"refusal": None}}


@attrs.define(eq=False)
class Text(_Told):
    """What goes on from a bare prompt."""

    kinds = ("text_completion", "text_completion", "cmpl-")

    def _says(self, body: Mapping[str, Json]) -> Iterator[Json]:
        match body["type"]:
            case "content_block_delta" if body["delta"]["type"] == "text_delta":
                yield {"text": body["delta"]["text"]}
            case "message_delta":
                yield {"text": "", "finish_reason": _reason(body["delta"])}

    def _all(self, message: Mapping[str, Json]) -> Json:
        return {"text": _texts(message["content"], "text")}


def _line(value: Json) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(value)


def _reason(ending: Mapping[str, Json]) -> str:
    return _REASONS.get(ending["stop_reason"], "stop")


def _texts(blocks: Iterable[Mapping[str, Json]], kind: str) -> str:
    return "".join(block[kind] for block in blocks if block["type"] == kind)


def _tool_call(block: Mapping[str, Json]) -> Json:
    function = {"name": block["name"], "arguments": orjson.dumps(block["input"]).decode()}
    return {"id": block["id"], "type": "function", "function": function}
