"""
A chat-completions stream in, a Messages stream out, without any I/O.

Chat servers differ in what they leave out, so little is relied on
(https://platform.openai.com/docs/api-reference/chat-streaming):

1. Thinking comes as ``reasoning_content`` or ``reasoning``; text as ``content``.
2. The parts of a tool call have an ``index``, and its first part the id and the name.  Some servers
   send no index, or the same one for each call, or all calls in one piece.
3. Parts of several calls may come mixed, and Messages blocks may not: one call is told as it comes,
   and what comes beside it is kept until the end.
4. The usage comes last, in a chunk without choices, or beside the reason to stop.

What comes out goes through `gateway.wire.events.Repair` like any other upstream's stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs
import orjson

from gateway.wire.sse import EventTooLong, SSEEvent, SSEParser

Json = Any

_STOP_REASONS: Final[Mapping[str, str]] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "end_turn",  # which is "tool_use" where a tool is used
    "function_call": "end_turn",
    "content_filter": "refusal",
}

#: Bytes that a block costs before it says anything.
_BLOCK: Final = 100

#: Where the stop sequence that was met is said, by servers that say it.
_STOPPED_BY: Final = ("stop_reason", "matched_stop")

_DELTAS: Final[Mapping[str, tuple[str, str]]] = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


@attrs.define
class _Block:
    """
    One content block.

    Attributes:
        kind: of the block.
        id: of a tool call.
        name: of the tool that it calls.
        kept: parts that wait for the block's turn.
    """

    kind: str
    id: str = ""
    name: str = ""
    kept: list[str] = attrs.field(factory=list)

    @property
    def says_something(self) -> bool:
        """Whether it is worth a block: chat templates put white space between calls."""
        return self.kind == "tool_use" or not "".join(self.kept).isspace()

    def opening(self) -> Json:
        if self.kind == "tool_use":
            return {"type": "tool_use", "id": self.id, "name": self.name, "input": {}}
        return {"type": self.kind, self.kind: ""}


@attrs.define(eq=False)
class Chunks:
    """
    Bytes of chat chunks in, Messages events out; the whole may be fed to `Repair`.

    Attributes:
        limit: bytes that may be kept of one event, and of all calls; beyond, `feed` raises
            `EventTooLong`.
    """

    limit: int = 8 * 1024 * 1024
    _parser: SSEParser = attrs.field(init=False)
    _started: bool = attrs.field(default=False, init=False)
    _stopped: bool = attrs.field(default=False, init=False)
    _open: _Block | None = attrs.field(default=None, init=False)
    _index: int = attrs.field(default=-1, init=False)
    _waiting: list[_Block] = attrs.field(factory=list, init=False)
    _calls: list[_Block] = attrs.field(factory=list, init=False)
    _by_index: dict[int, _Block] = attrs.field(factory=dict, init=False)
    _kept: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self._parser = SSEParser(self.limit)

    def feed(self, chunk: bytes) -> list[SSEEvent]:
        """The events that `chunk` completes, in order."""
        return [
            told if isinstance(told, SSEEvent) else SSEEvent(told["type"], orjson.dumps(told))
            for event in self._parser.feed(chunk)
            for told in self._event(event)
        ]

    def _event(self, event: SSEEvent) -> Iterator[Json]:
        try:
            if event.data.strip() != b"[DONE]":
                yield from self._chunk(orjson.loads(event.data))
            elif self._started and not self._stopped:
                yield from self._stop({"finish_reason": "stop"})
        except (ValueError, LookupError, TypeError, AttributeError):
            yield SSEEvent(event.name, b"")  # which nobody takes for an event

    def _chunk(self, body: Mapping[str, Json]) -> Iterator[Json]:
        if body.get("error") or body.get("object") == "error":
            said = body.get("error") or {"message": body.get("message"), "code": body.get("code")}
            yield {"type": "error", "error": said if isinstance(said, dict) else {"message": said}}
            return
        if not self._started:
            self._started = True
            yield {"type": "message_start", "message": {}}
        choices = body.get("choices") or ()
        for choice in choices:
            if choice.get("index", 0) == 0:
                yield from self._choice(choice)
        if body.get("usage") and (self._stopped or not choices):
            yield {"type": "message_delta", "delta": {}, "usage": usage(body["usage"])}

    def _choice(self, choice: Mapping[str, Json]) -> Iterator[Json]:
        delta = choice.get("delta") or {}
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if thought:
            yield from self._words("thinking", thought)
        if delta.get("content"):
            yield from self._words("text", delta["content"])
        for call in delta.get("tool_calls") or ():
            yield from self._call(call)
        if choice.get("finish_reason") and not self._stopped:
            yield from self._stop(choice)

    # --- what is said -----------------------------------------------------------------------------

    def _words(self, kind: str, words: str) -> Iterator[Json]:
        if not isinstance(words, str):
            raise TypeError(words)
        if self._calls:  # a call may have parts to come
            if not self._waiting or self._waiting[-1].kind != kind:
                self._count(_BLOCK)
                self._waiting.append(_Block(kind))
            self._keep(self._waiting[-1], words)
            return
        if self._open is None or self._open.kind != kind:
            yield from self._begin(_Block(kind))
        yield self._delta(words)

    def _call(self, call: Mapping[str, Json]) -> Iterator[Json]:
        function = call.get("function") or {}
        arguments = function.get("arguments") or ""
        if not isinstance(arguments, str):
            arguments = orjson.dumps(arguments).decode()
        name, identity = str(function.get("name") or ""), str(call.get("id") or "")
        block = self._of(call)
        if block is None:
            self._count(_BLOCK + len(name) + len(identity))
            block = _Block("tool_use", identity, name)
            self._calls.append(block)
            if len(self._calls) == 1 and block.name:
                yield from self._begin(block)
            else:
                self._waiting.append(block)
            if "index" in call:
                self._by_index[call["index"]] = block
        else:
            self._count(0 if block.name else len(name))
            self._count(0 if block.id else len(identity))
            block.name = block.name or name
            block.id = block.id or identity
        if block is not self._open:
            self._keep(block, arguments)
        elif arguments:
            yield self._delta(arguments)

    def _of(self, call: Mapping[str, Json]) -> _Block | None:
        """The call that this is a part of; None if it is the first part."""
        identity = call.get("id")
        if "index" in call:
            known = self._by_index.get(call["index"])
        elif identity or (call.get("function") or {}).get("name"):
            known = next((each for each in self._calls if identity and each.id == identity), None)
        else:
            known = self._calls[-1]
        is_another = known is not None and identity and known.id and identity != known.id
        return None if is_another else known

    def _keep(self, block: _Block, part: str) -> None:
        self._count(len(part))
        block.kept.append(part)

    def _count(self, size: int) -> None:
        self._kept += size
        if self._kept > self.limit:
            raise EventTooLong(f"tool calls of more than {self.limit} characters")

    # --- blocks -----------------------------------------------------------------------------------

    def _begin(self, block: _Block) -> Iterator[Json]:
        yield from self._end()
        self._open = block
        self._index += 1
        opening = block.opening()
        yield {"type": "content_block_start", "index": self._index, "content_block": opening}

    def _delta(self, part: str) -> Json:
        assert self._open is not None
        kind, key = _DELTAS[self._open.kind]
        delta = {"type": kind, key: part}
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _end(self) -> Iterator[Json]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._index}

    def _stop(self, choice: Mapping[str, Json]) -> Iterator[Json]:
        self._stopped = True
        for block in self._waiting:
            if block.kind == "tool_use" and not block.name:
                raise ValueError
            if block.says_something:
                yield from self._begin(block)
                yield self._delta("".join(block.kept))
        self._waiting.clear()
        yield from self._end()
        reason = _STOP_REASONS.get(str(choice["finish_reason"]), "end_turn")
        by = next((choice[key] for key in _STOPPED_BY if isinstance(choice.get(key), str)), None)
        if reason != "end_turn":
            by = None
        yield {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": by}}


def usage(said: Mapping[str, Json]) -> dict[str, int]:
    """The usage of a chat completion as the Messages API has it."""
    details = said.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens") or said.get("prompt_cache_hit_tokens") or 0
    found = {"output_tokens": said.get("completion_tokens") or 0}
    if said.get("prompt_tokens") is not None:
        found |= {
            "input_tokens": max(0, said["prompt_tokens"] - cached),
            "cache_read_input_tokens": cached,
        }
    return found
