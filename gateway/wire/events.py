"""
A llama-server's event stream in, a correct Messages API stream out.

The Messages API promises (https://docs.anthropic.com/en/api/messages-streaming):

1. ``message_start`` comes first and once, with ids that start with ``msg_``;
2. content blocks are numbered from 0, and one is closed before the next one is opened;
3. ``tool_use`` opens with ``input: {}`` and an id that starts with ``toolu_``; ``thinking`` opens
   with ``signature: ""`` and is signed before it closes;
4. ``message_delta`` comes after the last block, with the stop reason and the whole usage;
5. ``message_stop`` ends it.

llama-server breaks each of these somewhere (docs/protocol.md, "The stream").  `Repair` holds the
promises whatever comes in, and touches nothing that is right: a text delta that needs no mending
leaves as the bytes that came.  `Assembly` folds the same events into one message, for clients that
did not ask for a stream.  Neither knows of sockets or time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import attrs
import orjson

from gateway.wire import sse
from gateway.wire.errors import STATUSES, ApiError, from_upstream_error
from gateway.wire.sse import SSEEvent

Json = Any

PING: Final = sse.encode("ping", b'{"type": "ping"}')

#: A sign of life that stops nothing; it may stand wherever no content block is open.
STILL: Final = sse.encode(
    "message_delta",
    orjson.dumps(
        {
            "type": "message_delta",
            "delta": {"stop_reason": None, "stop_sequence": None},
            "usage": {"output_tokens": 0},
        }
    ),
)

#: The kinds of deltas that we know: of which kind of block, and where what they say stands.
_DELTAS: Final[Mapping[str, tuple[str, str]]] = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("thinking", "signature"),
    "input_json_delta": ("tool_use", "partial_json"),
}


#: What the end of a message says of it; more there may be, but nothing that its start says.
_OF_THE_END: Final = frozenset({"stop_reason", "stop_sequence", "usage"})

#: Bytes that the events of a message that is held whole may have, and what each costs beside them.
_LONGEST: Final = 64 * 1024 * 1024
_EACH: Final = 64


class Truncated(Exception):
    """The upstream's stream ended before it said why."""


class Event(NamedTuple):
    """One event of our stream; `raw` is its data where that need not be written anew."""

    body: Mapping[str, Json]
    raw: bytes | None = None


def encode(event: Event) -> bytes:
    """An event on the wire."""
    return sse.encode(event.body["type"], event.raw or orjson.dumps(event.body))


def error_event(error: ApiError, request_id: str) -> bytes:
    """
    An error inside a stream whose status was sent long ago.

    The empty line before it ends an event that may have been cut in the middle.
    """
    return b"\n\n" + sse.encode("error", orjson.dumps(error.envelope(request_id)))


@attrs.define
class Usage:
    """
    What an answer cost, in tokens.

    Attributes:
        input: prompt tokens that were evaluated; None until it is known.
        cached: prompt tokens that the server still had.
        output: tokens generated.
        created: prompt tokens that it keeps for a price of their own, counted beside `input`.
    """

    input: int | None = None
    cached: int = 0
    output: int = 0
    created: int = 0

    def learn(self, said: Mapping[str, Json]) -> None:
        """Take over what an upstream's ``usage`` says; what makes no sense is left out."""
        known = {name: number for name, number in said.items() if _is_count(number)}
        self.input = known.get("input_tokens", self.input)
        self.cached = known.get("cache_read_input_tokens") or self.cached
        self.created = known.get("cache_creation_input_tokens") or self.created
        self.output = known.get("output_tokens") or self.output

    def forget(self) -> None:
        """Nothing is known any more."""
        self.input, self.cached, self.created, self.output = None, 0, 0, 0

    def as_json(self) -> dict[str, int]:
        """As the Messages API has it."""
        return {
            "input_tokens": self.input or 0,
            "cache_creation_input_tokens": self.created,
            "cache_read_input_tokens": self.cached,
            "output_tokens": self.output,
        }


def _is_count(number: Json) -> bool:
    """Whether this can be a number of tokens; sums of them stay what JSON can say."""
    return type(number) is int and 0 <= number < 2**40


@attrs.frozen
class _Block:
    """The block that is open: its index there, its index here, its kind, its upstream id."""

    there: int
    here: int
    kind: str
    id: str = ""
    signed: bool = False


@attrs.define(eq=False)
class Repair:
    """
    One answer's stream, from upstream events to ours.

    Attributes:
        message_id: the ``msg_`` id of the answer.
        model: the client's own name for the model.
        tier: where it comes from, for the wording of errors.
        one_call: whether all tool calls after the first are left out, for a client that said so.
    """

    message_id: str
    model: str
    tier: str = ""
    one_call: bool = False
    usage: Usage = attrs.field(factory=Usage, init=False)
    _started: bool = attrs.field(default=False, init=False)
    _block: _Block | None = attrs.field(default=None, init=False)
    _next_index: int = attrs.field(default=0, init=False)
    _has_tool_use: bool = attrs.field(default=False, init=False)
    _left_out: set[int] = attrs.field(factory=set, init=False)
    _ending: Mapping[str, Json] | None = attrs.field(default=None, init=False)

    @property
    def has_content(self) -> bool:
        """Whether the client was sent anything of the answer itself."""
        return self._next_index > 0

    @property
    def has_started(self) -> bool:
        """Whether the client was sent its ``message_start``."""
        return self._started

    @property
    def in_block(self) -> bool:
        """Whether a content block is open."""
        return self._block is not None

    def start(self, tokens: int) -> list[Event]:
        """
        Begin the message before the upstream does, with `tokens` as its input.

        The upstream's own beginning is left out then; the last usage tells the truth.
        """
        if not self._started:
            self.usage.input = tokens
        return self._start()

    def again(self) -> None:
        """The upstream begins anew; of what came so far the client has the beginning at most."""
        self._block, self._next_index, self._has_tool_use = None, 0, False
        self._left_out.clear()
        self._ending = None
        self.usage.forget()

    def feed(self, event: SSEEvent) -> list[Event]:
        """
        The events to send for one upstream event.

        The end of the message is kept back until `end`: only then is all known that it says.

        Raises:
            ApiError: the upstream says that it failed, or sends what is no event at all.
        """
        try:
            body = orjson.loads(event.data)
        except ValueError:
            raise self._nonsense(event) from None
        if not isinstance(body, dict):
            raise self._nonsense(event)
        # The type of a bare error object names the error, not the event.
        kind = "error" if event.name == "error" else body.get("type")
        try:
            match kind:
                case "content_block_delta":
                    return self._delta(body, event.data)
                case "content_block_start":
                    return self._start_block(body)
                case "content_block_stop":
                    return self._stop_block(body)
                case "message_start":
                    self.usage.learn(body["message"].get("usage") or {})
                    return self._start()
                case "message_delta":
                    self.usage.learn(body.get("usage") or {})
                    if body["delta"].get("stop_reason") is not None:
                        _check_is(str | None, body["delta"].get("stop_sequence"))
                        self._ending = body["delta"]
                    return []
                case "error":
                    raise self._failure(body)
                case _:  # message_stop, ping, and whatever else a client is told to ignore
                    return []
        except (KeyError, TypeError, AttributeError):
            raise self._nonsense(event) from None

    def end(self) -> list[Event]:
        """
        The events that end the answer, once the upstream has ended its own.

        Raises:
            Truncated: it never said why it stopped.
        """
        if self._ending is None:
            raise Truncated
        events = [*self._start(), *self._close()]
        delta = {
            **self._ending,
            "stop_reason": self._stop_reason(self._ending),
            "stop_sequence": self._ending.get("stop_sequence"),
        }
        events.append(
            Event({"type": "message_delta", "delta": delta, "usage": self.usage.as_json()})
        )
        events.append(Event({"type": "message_stop"}))
        return events

    # --- one kind of upstream event each --------------------------------------------------------

    def _start(self) -> list[Event]:
        if self._started:
            return []
        self._started = True
        message: Json = {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self.usage.as_json(),
        }
        return [Event({"type": "message_start", "message": message})]

    def _start_block(self, body: Mapping[str, Json]) -> list[Event]:
        there, block = body["index"], body["content_block"]
        kind, identity = block["type"], block.get("id", "")
        _check_is(int, there)
        now = self._block
        if now and (now.there, now.kind, now.id) == (there, kind, identity):
            return []  # opened twice
        if kind == "tool_use" and self.one_call and self._has_tool_use:
            self._left_out.add(there)
            return self._close()
        self._left_out.discard(there)
        return self._open(there, block)

    def _open(self, there: int, block: Mapping[str, Json]) -> list[Event]:
        kind = block["type"]
        _check_is(str, kind)
        if kind in ("text", "thinking"):
            block = {**block, kind: block.get(kind, "")}
            _check_is(str, block[kind])
        elif kind == "tool_use":
            _check_is(str, block["name"])
            _check_is(str, block.get("id", ""))
        events = [*self._start(), *self._close()]
        self._block = _Block(there, self._next_index, kind, block.get("id", ""))
        self._next_index += 1
        if kind == "tool_use":
            self._has_tool_use = True
            nameless = f"{self.message_id.removeprefix('msg_')}_{self._block.here}"
            block = {**block, "id": _tool_id(block.get("id") or nameless), "input": {}}
        elif kind == "thinking":
            block = {"signature": "", **block}
        opened = {"type": "content_block_start", "index": self._block.here, "content_block": block}
        return [*events, Event(opened)]

    def _delta(self, body: Mapping[str, Json], raw: bytes) -> list[Event]:
        there, delta = body["index"], body["delta"]
        if there in self._left_out:
            return []
        kind, says = _DELTAS.get(delta["type"], (None, "type"))
        if type(there) is not int or type(delta[says]) is not str:
            raise TypeError
        now = self._block
        if now is not None and now.there == there and _goes_into(kind, now.kind):
            if delta["type"] == "signature_delta":
                self._block = attrs.evolve(now, signed=True)
            if now.here == there and b"\n" not in raw:
                return [Event(body, raw)]
            return [Event({**body, "index": now.here})]
        if delta["type"] == "signature_delta":
            return []  # of a thinking block that is closed, and was signed when it was
        if kind == "tool_use" or kind is None:
            raise self._nonsense(SSEEvent("content_block_delta", raw))
        empty = {"type": kind, kind: ""}
        events = self._open(there, empty)
        assert self._block is not None
        return [*events, Event({**body, "index": self._block.here})]

    def _stop_block(self, body: Mapping[str, Json]) -> list[Event]:
        if self._block is not None and self._block.there == body["index"]:
            return self._close()
        return []  # closed already, when the next one was opened

    def _close(self) -> list[Event]:
        block, self._block = self._block, None
        if block is None:
            return []
        events = []
        if block.kind == "thinking" and not block.signed:
            signed = {"type": "signature_delta", "signature": ""}
            events.append({"type": "content_block_delta", "index": block.here, "delta": signed})
        events.append({"type": "content_block_stop", "index": block.here})
        return [Event(event) for event in events]

    # --- what the upstream means ------------------------------------------------------------------

    def _stop_reason(self, ending: Mapping[str, Json]) -> str:
        """llama-server says ``end_turn`` also for a stop sequence, which it names beside it."""
        reason = str(ending["stop_reason"])
        if reason == "end_turn" and ending.get("stop_sequence"):
            return "stop_sequence"
        if reason == "end_turn" and self._has_tool_use:
            return "tool_use"
        return reason

    def _failure(self, body: Mapping[str, Json]) -> ApiError:
        """An ``error`` event, wrapped as the Messages API has it or bare as llama-server does."""
        error = body["error"] if isinstance(body.get("error"), dict) else body
        code = error.get("code")
        status = code if isinstance(code, int) else STATUSES.get(str(error.get("type")), 500)
        return from_upstream_error(
            status, str(error.get("type", "")), str(error.get("message", "")), error, self.tier
        )

    def _nonsense(self, event: SSEEvent) -> ApiError:
        return ApiError(
            "api_error",
            f"The model server of tier {self.tier!r} sent an event that makes no sense here"
            f" ({event.name[:40]!r}, {len(event.data)} bytes).",
        )


def _check_is(kind: Any, value: Json) -> None:
    """Raises TypeError where `value` is not of a type of JSON; true and false are no numbers."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError


def _goes_into(kind: str | None, block: str) -> bool:
    """Whether a block takes deltas of this kind; None is one that we do not know."""
    return kind in (block, None) or (kind == "tool_use" and block.endswith("_tool_use"))


def _tool_id(there: str) -> str:
    return there if there.startswith("toolu_") else f"toolu_{there}"


@attrs.define(eq=False)
class Assembly:
    """The events of `Repair`, folded into the one message that they tell, of bounded length."""

    # Whose beginning was told to somebody else has none here.
    _message: dict[str, Json] = attrs.field(factory=lambda: {"content": []}, init=False)
    _parts: list[list[str]] = attrs.field(factory=list, init=False)
    _room: int = attrs.field(factory=lambda: _LONGEST, init=False)

    def add(self, events: Iterable[Event]) -> None:
        """These came next; raises ApiError if they are too many."""
        for event in events:
            self._room -= _EACH + len(event.raw or orjson.dumps(event.body))
            if self._room < 0:
                message = f"The model server sent an answer of more than {_LONGEST} bytes."
                raise ApiError("api_error", message)
            self._add(event.body)

    def again(self) -> None:
        """Everything after the beginning will come anew."""
        self._message["content"] = []
        self._parts.clear()
        self._room = _LONGEST

    def _add(self, body: Mapping[str, Json]) -> None:
        match body["type"]:
            case "message_start":
                self._message = {**body["message"], "content": []}
            case "content_block_start":
                self._message["content"].append(dict(body["content_block"]))
                self._parts.append([])
            case "content_block_delta":
                delta = body["delta"]
                if delta["type"] == "signature_delta":
                    self._message["content"][-1]["signature"] = delta["signature"]
                else:
                    self._parts[-1].append(_payload(delta))
            case "message_delta":
                ending = {**body["delta"], "usage": body["usage"]}
                taken = self._message.keys() - _OF_THE_END
                self._message |= {name: ending[name] for name in ending if name not in taken}

    def message(self) -> dict[str, Json]:
        """The whole message; call it after the last event."""
        for block, parts in zip(self._message["content"], self._parts, strict=True):
            whole = "".join(parts)
            if block["type"].endswith("tool_use"):  # a server's own too
                block["input"] = _input(whole)
            elif block["type"] in ("text", "thinking"):
                block[block["type"]] += whole
        return self._message


def _payload(delta: Mapping[str, Json]) -> str:
    key = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
    return str(delta.get(key.get(delta["type"], ""), ""))


def _input(text: str) -> Json:
    """A tool's input; an answer that was cut off at ``max_tokens`` leaves it incomplete."""
    try:
        return orjson.loads(text) if text else {}
    except ValueError:
        return {}


def message_events(message: Mapping[str, Json]) -> list[Event]:
    """The stream that tells a whole message of text blocks."""
    empty: Json = {"stop_reason": None, "stop_sequence": None, "content": []}
    events: list[Json] = [{"type": "message_start", "message": {**message, **empty}}]
    for index, block in enumerate(message["content"]):
        opened = {"type": "text", "text": ""}
        said = {"type": "text_delta", "text": block["text"]}
        events += [
            {"type": "content_block_start", "index": index, "content_block": opened},
            {"type": "content_block_delta", "index": index, "delta": said},
            {"type": "content_block_stop", "index": index},
        ]
    why = {key: message[key] for key in ("stop_reason", "stop_sequence")}
    events.append({"type": "message_delta", "delta": why, "usage": message["usage"]})
    events.append({"type": "message_stop"})
    return [Event(event) for event in events]
