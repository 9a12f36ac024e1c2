"""An upstream's stream with every defect of llama-server in, a correct Messages API stream out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import attrs
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.wire.errors import ApiError
from gateway.wire.events import (
    Assembly,
    Event,
    Repair,
    Truncated,
    Usage,
    encode,
    error_event,
    message_events,
)
from gateway.wire.sse import SSEEvent, SSEParser

Json = Any

# --- what the Messages API promises -----------------------------------------------------------


@attrs.define
class Told:
    """A stream, as a client that knows the rules understands it."""

    message: dict[str, Json] = attrs.field(factory=dict)
    content: list[dict[str, Json]] = attrs.field(factory=list)
    ending: dict[str, Json] = attrs.field(factory=dict)
    usage: dict[str, Json] = attrs.field(factory=dict)


_STOP_REASONS = {"end_turn", "max_tokens", "stop_sequence", "tool_use"}
_USAGE = {
    "input_tokens",
    "output_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
}
_FIELD = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("thinking", "signature"),
    "input_json_delta": ("tool_use", "partial_json"),
}


def events_of(wire: bytes) -> list[dict[str, Json]]:
    """The events of a stream's bytes, each of which must have a name, one line of data, an end."""
    blocks = wire.split(b"\n\n")
    assert blocks.pop() == b"", "the last event is not ended"
    found = []
    for block in blocks:
        name, data = block.split(b"\n")
        assert name.startswith(b"event: ")
        assert data.startswith(b"data: ")
        event = json.loads(data[6:])
        assert event["type"] == name[7:].decode()
        found.append(event)
    return found


def checked(events: Iterable[Mapping[str, Json]]) -> Told:
    """What a whole stream tells; an AssertionError where it breaks a rule of the Messages API."""
    told = Told()
    is_open = is_signed = is_ended = False
    for event in events:
        assert not is_ended, "nothing comes after message_stop"
        kind = event["type"]
        if kind == "ping":
            continue
        assert (kind == "message_start") == (not told.message), "message_start: first, and once"
        match kind:
            case "message_start":
                told.message = dict(event["message"])
                _check_message(told.message)
            case "content_block_start":
                assert not is_open, "one block is open at a time"
                assert not told.ending, "all content comes before message_delta"
                assert event["index"] == len(told.content), "indices count from 0"
                block = dict(event["content_block"])
                _check_block(block)
                told.content.append(block | {"partial_json": ""})
                is_open, is_signed = True, False
            case "content_block_delta":
                assert is_open, "a delta needs a block"
                assert event["index"] == len(told.content) - 1
                assert not is_signed, "a signature comes last"
                block, delta = told.content[-1], event["delta"]
                of, field = _FIELD[delta["type"]]
                assert block["type"] == of
                assert isinstance(delta[field], str)
                block[field] += delta[field]
                is_signed = field == "signature"
            case "content_block_stop":
                assert is_open, "what is closed was open"
                assert event["index"] == len(told.content) - 1
                assert is_signed == (told.content[-1]["type"] == "thinking")
                is_open = False
            case "message_delta":
                assert not is_open, "all blocks are closed before message_delta"
                assert not told.ending, "one message_delta"
                told.ending, told.usage = dict(event["delta"]), dict(event["usage"])
                assert told.ending["stop_reason"] in _STOP_REASONS
                by_sequence = told.ending["stop_reason"] == "stop_sequence"
                assert isinstance(told.ending["stop_sequence"], str if by_sequence else str | None)
                _check_usage(told.usage)
            case "message_stop":
                assert told.ending, "message_stop comes after message_delta"
                is_ended = True
            case _:
                raise AssertionError(kind)
    assert is_ended, "message_stop comes last"
    ids = [block["id"] for block in told.content if block["type"] == "tool_use"]
    assert len(set(ids)) == len(ids)
    return told


def _check_message(message: Mapping[str, Json]) -> None:
    assert message["id"].startswith("msg_")
    assert message["type"] == "message"
    assert message["role"] == "assistant"
    assert isinstance(message["model"], str)
    assert message["content"] == []
    assert message["stop_reason"] is None
    assert message["stop_sequence"] is None
    _check_usage(message["usage"])


def _check_usage(usage: Mapping[str, Json]) -> None:
    assert usage.keys() >= _USAGE
    assert all(isinstance(usage[name], int) and usage[name] >= 0 for name in _USAGE)


def _check_block(block: Mapping[str, Json]) -> None:
    match block["type"]:
        case "text":
            assert block["text"] == ""
        case "thinking":
            assert block["thinking"] == ""
            assert block["signature"] == ""
        case "tool_use":
            assert block["id"].startswith("toolu_")
            assert len(block["id"]) > len("toolu_")
            assert block["name"]
            assert block["input"] == {}
        case _:
            raise AssertionError(block["type"])


# --- what a model says, and how llama-server tells it -----------------------------------------


class Block(NamedTuple):
    """One block of an answer: what it is, and what is told of it piece by piece."""

    kind: str
    pieces: list[str]
    identity: str = ""
    name: str = ""

    @property
    def whole(self) -> str:
        return "".join(self.pieces)


@attrs.frozen
class Answer:
    """
    What a model says, and the defects with which it is told.

    Attributes:
        blocks: its content.
        ending: its stop reason and stop sequence, as llama-server has them.
        tokens: evaluated, cached and generated.
        starts: `message_start` is there.
        in_order: each block is closed before the next; otherwise all at the end, in a row.
        complete: `tool_use` opens with an input and `thinking` with a signature.
        opens: blocks of text and thinking are opened before they are told.
        twice: each block's `content_block_start` comes again after each delta.
        first: the number of the first block.
        half: a `message_delta` without a stop reason comes before the true one.
    """

    blocks: list[Block]
    ending: tuple[str, str | None]
    tokens: tuple[int, int, int]
    starts: bool = True
    in_order: bool = False
    complete: bool = False
    opens: bool = True
    twice: bool = False
    first: int = 0
    half: bool = False

    def events(self) -> list[dict[str, Json]]:
        """The upstream's events."""
        found: list[dict[str, Json]] = []
        evaluated, cached, generated = self.tokens
        if self.starts:
            usage = {"cache_read_input_tokens": cached, "input_tokens": evaluated}
            message: Json = {"id": "chatcmpl-1", "type": "message", "role": "assistant"}
            message |= {"model": "m", "content": [], "usage": usage | {"output_tokens": 0}}
            found.append({"type": "message_start", "message": message})
        closing: list[dict[str, Json]] = []
        for index, block in enumerate(self.blocks, self.first):
            start = {"type": "content_block_start", "index": index}
            start["content_block"] = self._opened(block)
            if self.opens or block.kind == "tool_use":
                found.append(start)
            for piece in block.pieces:
                found.append(_delta(index, block.kind, piece))
                if self.twice:
                    found.append(start)
            closing.extend(_closed(index, block.kind))
            if self.in_order:
                found += closing
                closing = []
        found += closing
        reason, sequence = self.ending
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        if self.half:
            nothing = {"stop_reason": None, "stop_sequence": None}
            found.append({"type": "message_delta", "delta": nothing, "usage": {}})
        usage = {"output_tokens": generated}
        found.append({"type": "message_delta", "delta": delta, "usage": usage})
        return [*found, {"type": "message_stop"}]

    def _opened(self, block: Block) -> dict[str, Json]:
        match block.kind:
            case "text":
                return {"type": "text", "text": ""}
            case "thinking":
                extra: Json = {"signature": ""} if self.complete else {}
                return {"type": "thinking", "thinking": "", **extra}
            case _:
                extra = {"input": {}} if self.complete else {}
                return {"type": "tool_use", "id": block.identity, "name": block.name, **extra}

    @property
    def told(self) -> list[Block]:
        """The blocks that a client can know of: one that is never opened and empty is none."""
        return [
            block for block in self.blocks if self.opens or block.pieces or block.kind == "tool_use"
        ]

    @property
    def stop(self) -> tuple[str, str | None]:
        """The true stop reason and sequence."""
        reason, sequence = self.ending
        if reason == "end_turn" and sequence:
            return "stop_sequence", sequence
        if reason == "end_turn" and any(block.kind == "tool_use" for block in self.blocks):
            return "tool_use", None
        return reason, sequence


def _delta(index: int, kind: str, piece: str) -> dict[str, Json]:
    fields = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}
    names = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}
    delta = {"type": names[kind], fields[kind]: piece}
    return {"type": "content_block_delta", "index": index, "delta": delta}


def _closed(index: int, kind: str) -> list[dict[str, Json]]:
    stop = {"type": "content_block_stop", "index": index}
    if kind != "thinking":
        return [stop]
    signature = {"type": "signature_delta", "signature": ""}
    return [{"type": "content_block_delta", "index": index, "delta": signature}, stop]


class Spelling(NamedTuple):
    """How an upstream writes its events."""

    end: bytes = b"\n"
    bom: bytes = b""
    comments: bool = False
    space: bool = False
    escape: bool = False

    def data(self, event: Mapping[str, Json]) -> bytes:
        separators = (", ", ": ") if self.space else (",", ":")
        return json.dumps(event, ensure_ascii=self.escape, separators=separators).encode()

    def stream(self, events: Iterable[Mapping[str, Json]]) -> bytes:
        comment = b":" + self.end * 2 if self.comments else b""
        line = b"event: %b" + self.end + b"data: %b" + self.end * 2 + comment
        told = (line % (event["type"].encode(), self.data(event)) for event in events)
        return self.bom + comment + b"".join(told)


# Everything that JSON, SSE or a terminal may trip over, and everything else.
_ODD = st.sampled_from(
    [
        "\n\n",
        "\r",
        "\r\n",
        "data: ",
        "event: error",
        '"',
        "\\",
        "\\u0000",
        "\x00",
        "\x1b[0m",
        "\u2028",
        "\ufeff",
        "\N{GRINNING FACE}",
        "\N{ZERO WIDTH JOINER}",
        "é",
        "]}",
        "\x7f",
        "",
    ]
)
_TEXT = st.one_of(_ODD, st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
_PIECES = st.lists(_TEXT, max_size=4)
_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), _TEXT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def _tool_pieces(draw: st.DrawFn) -> list[str]:
    """A tool's input as JSON, in pieces."""
    value = draw(st.dictionaries(_TEXT, _VALUES, max_size=3))
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
    edges = [0, *cuts, len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges)]
    return ["", *pieces] if draw(st.booleans()) else pieces


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    """An answer with any of the defects."""
    blocks = []
    for number in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["text", "thinking", "tool_use"]))
        if kind == "tool_use":
            identity = draw(st.sampled_from(["", "toolu_"])) + f"id{number}"
            pieces = draw(_tool_pieces())
            blocks.append(Block(kind, pieces, identity, draw(st.sampled_from(["Bash", "a-b_c"]))))
        else:
            blocks.append(Block(kind, draw(_PIECES)))
    sequence = draw(st.one_of(st.none(), st.just("STOP"), st.just("\n\n")))
    ends = st.sampled_from(["end_turn", "max_tokens", "tool_use"])
    reason = "end_turn" if sequence else draw(ends)
    counts = st.integers(0, 200_000)
    return Answer(
        blocks,
        (reason, sequence),
        (draw(counts), draw(counts), draw(counts)),
        starts=draw(st.booleans()),
        in_order=draw(st.booleans()),
        complete=draw(st.booleans()),
        opens=draw(st.booleans()),
        twice=draw(st.booleans()),
        first=draw(st.sampled_from([0, 0, 0, 1, 7])),
        half=draw(st.booleans()),
    )


spellings = st.builds(
    Spelling,
    end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    bom=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    comments=st.booleans(),
    space=st.booleans(),
    escape=st.booleans(),
)


def repair() -> Repair:
    return Repair("msg_1", "my-model", "main")


def mended(*chunks: bytes, mending: Repair | None = None) -> list[Event]:
    """The events that the client gets for an upstream's stream in these chunks."""
    mending, parser = mending or repair(), SSEParser()
    found = []
    for chunk in chunks:
        for event in parser.feed(chunk):
            found += mending.feed(event)
    return [*found, *mending.end()]


def written(events: Iterable[Event]) -> bytes:
    return b"".join(map(encode, events))


def check(answer: Answer, wire: bytes) -> Told:
    """The rules are held, and what is told is what the model said."""
    told = checked(events_of(wire))
    assert told.message["id"] == "msg_1"
    assert told.message["model"] == "my-model"
    assert [block["type"] for block in told.content] == [block.kind for block in answer.told]
    for block, said in zip(told.content, answer.told, strict=True):
        field = "partial_json" if said.kind == "tool_use" else said.kind
        assert block[field] == said.whole
        if said.kind == "tool_use":
            assert block["id"] == "toolu_" + said.identity.removeprefix("toolu_")
            assert block["name"] == said.name
        elif said.kind == "thinking":
            assert block["signature"] == ""
    assert (told.ending["stop_reason"], told.ending["stop_sequence"]) == answer.stop
    evaluated, cached, generated = answer.tokens
    if not answer.starts:
        evaluated = cached = 0  # llama-server says them nowhere else
    assert told.usage["input_tokens"] == evaluated
    assert told.usage["cache_read_input_tokens"] == cached
    assert told.usage["output_tokens"] == generated
    return told


@settings(max_examples=500, deadline=None)
@given(answers(), spellings, st.lists(st.integers(0, 5000), max_size=6))
def test_any_answer_with_any_defects_in_any_pieces(
    answer: Answer, spelling: Spelling, cuts: list[int]
) -> None:
    """Whatever is wrong and wherever it is cut, the client gets a valid stream of the same text."""
    stream = spelling.stream(answer.events())
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    chunks = [stream[start:end] for start, end in pairwise(edges)]
    check(answer, written(mended(*chunks)))


@settings(max_examples=40, deadline=None)
@given(answers(), spellings)
def test_an_answer_that_is_cut_at_every_byte(answer: Answer, spelling: Spelling) -> None:
    """At whichever byte a stream is cut in two, and byte by byte, the client gets the same."""
    stream = spelling.stream(answer.events())
    whole = written(mended(stream))
    check(answer, whole)
    for position in range(1, len(stream)):
        assert written(mended(stream[:position], stream[position:])) == whole
    assert written(mended(*(stream[n : n + 1] for n in range(len(stream))))) == whole


@settings(max_examples=300, deadline=None)
@given(answers(), spellings)
def test_deltas_leave_as_the_bytes_that_came(answer: Answer, spelling: Spelling) -> None:
    """A delta that needs no mending is passed on as it was spelled, byte for byte."""
    answer = attrs.evolve(answer, first=0, opens=True)
    events = answer.events()
    wire = written(mended(spelling.stream(events)))
    sent = [data[6:] for data in wire.split(b"\n") if data.startswith(b"data: ")]
    for event in events:
        if event["type"] == "content_block_delta" and "signature" not in event["delta"]:
            assert sent.count(spelling.data(event)) >= 1


@settings(max_examples=300, deadline=None)
@given(answers(), spellings)
def test_the_whole_message_says_what_the_stream_says(answer: Answer, spelling: Spelling) -> None:
    """A client that asked for no stream gets the same message as JSON."""
    events = mended(spelling.stream(answer.events()))
    assembly = Assembly()
    assembly.add(events)
    message = orjson.loads(orjson.dumps(assembly.message()))
    told = check(answer, written(events))
    assert message == {
        **told.message,
        **told.ending,
        "usage": told.usage,
        "content": [_as_content(block) for block in told.content],
    }


def _as_content(block: Mapping[str, Json]) -> dict[str, Json]:
    content = {key: value for key, value in block.items() if key != "partial_json"}
    if block["type"] == "tool_use":
        content["input"] = json.loads(block["partial_json"])
    return content


@settings(max_examples=300, deadline=None)
@given(answers(), spellings, st.data())
def test_a_stream_that_breaks_off_is_truncated(
    answer: Answer, spelling: Spelling, data: st.DataObject
) -> None:
    """Without a stop reason there is no end: what was told so far is right, but no answer."""
    events = answer.events()[:-2]
    stream = spelling.stream(events)
    stream = stream[: data.draw(st.integers(0, len(stream)))]
    mending, parser = repair(), SSEParser()
    told = [event for each in parser.feed(stream) for event in mending.feed(each)]
    with pytest.raises(Truncated):
        mending.end()
    # What was sent is a stream that could still have ended well.
    late = mending.feed(_sse({"type": "message_delta", "delta": {"stop_reason": "max_tokens"}}))
    checked(events_of(written([*told, *late, *mending.end()])))


@settings(max_examples=300, deadline=None)
@given(answers(), spellings, st.booleans(), st.data())
def test_an_error_event_ends_the_answer(
    answer: Answer, spelling: Spelling, bare: bool, data: st.DataObject
) -> None:
    """An `error` event, bare as llama-server sends it or wrapped, is an ApiError with its words."""
    events = answer.events()
    position = data.draw(st.integers(0, len(events)))
    error = {"code": 500, "message": "Compute error.", "type": "server_error"}
    body = error if bare else {"type": "error", "error": error}
    name = spelling.end.join([b"event: error", b"data: " + spelling.data(body), b"", b""])
    # One comment more, so that a lone CR at the end is known to be one.
    stream = spelling.stream(events[:position]) + name + b":\n"
    mending, parser = repair(), SSEParser()
    *before, failure = parser.feed(stream)
    for event in before:
        mending.feed(event)
    with pytest.raises(ApiError, match=r"'main'.*Compute error\.") as caught:
        mending.feed(failure)
    assert (caught.value.status, caught.value.kind) == (500, "api_error")


# --- defects one by one -----------------------------------------------------------------------


def _sse(body: Mapping[str, Json], name: str | None = None) -> SSEEvent:
    return SSEEvent(body["type"] if name is None else name, orjson.dumps(body))


def _start(index: int, kind: str, **more: str) -> dict[str, Json]:
    return {"type": "content_block_start", "index": index, "content_block": {"type": kind, **more}}


_TEXT_0, _TOOL_1 = _start(0, "text", text=""), _start(1, "tool_use", id="x", name="Bash")
_END: dict[str, Json] = {
    "type": "message_delta",
    "delta": {"stop_reason": "end_turn", "stop_sequence": None},
    "usage": {"output_tokens": 5},
}


def _told(*bodies: Mapping[str, Json]) -> Told:
    mending = repair()
    events = [event for body in bodies for event in mending.feed(_sse(body))]
    return checked(events_of(written([*events, *mending.end()])))


def test_an_empty_answer_is_a_message() -> None:
    """A stream that says nothing but how it ends is a message without content."""
    told = _told(_END)
    assert told.content == []
    assert told.ending["stop_reason"] == "end_turn"


def test_the_start_and_a_block_are_sent_as_soon_as_they_come() -> None:
    """Nothing but the end of the message is held back."""
    mending = repair()
    assert not mending.has_content
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 7}}}
    (started,) = mending.feed(_sse(start))
    assert started.body["message"]["usage"]["input_tokens"] == 7
    assert not mending.has_content
    (opened,) = mending.feed(_sse(_TEXT_0))
    assert opened.body == _TEXT_0
    assert mending.has_content
    (delta,) = mending.feed(_sse(_delta(0, "text", "a")))
    assert delta.raw == orjson.dumps(_delta(0, "text", "a"))
    (closed,) = mending.feed(_sse({"type": "content_block_stop", "index": 0}))
    assert closed.body == {"type": "content_block_stop", "index": 0}
    assert mending.feed(_sse(_END)) == []
    assert mending.feed(_sse({"type": "message_stop"})) == []


def test_a_missing_start_leaves_the_input_unknown() -> None:
    """Who asks for the end can tell that the prompt's tokens were never said."""
    mending = repair()
    mending.feed(_sse(_END))
    assert mending.usage.input is None
    mending.usage.input = 99
    assert checked(event.body for event in mending.end()).usage["input_tokens"] == 99


def test_text_that_comes_late_opens_a_block_of_its_own() -> None:
    """Text for a block that is closed is not lost; it comes where it comes."""
    told = _told(
        _TEXT_0,
        _delta(0, "text", "a"),
        _TOOL_1,
        _delta(1, "tool_use", "{}"),
        _TEXT_0,
        _delta(0, "text", "b"),
        _delta(0, "text", "c"),
        _END,
    )
    texts = [(block["type"], block.get("text")) for block in told.content]
    assert texts == [("text", "a"), ("tool_use", None), ("text", "bc")]
    assert told.ending["stop_reason"] == "tool_use"


def test_a_tools_input_that_comes_too_late_is_an_error() -> None:
    """Half a tool call must not be taken for a whole one."""
    mending = repair()
    for body in (_TOOL_1, _delta(1, "tool_use", '{"a"'), _start(2, "text", text="")):
        mending.feed(_sse(body))
    with pytest.raises(ApiError, match="makes no sense"):
        mending.feed(_sse(_delta(1, "tool_use", ": 1}")))


def test_two_tools_with_the_same_number_are_two_blocks() -> None:
    """A number that is used again for another tool does not make one of two."""
    again = _start(1, "tool_use", id="y", name="Bash")
    tools = [_TOOL_1, _delta(1, "tool_use", "{}"), again, _delta(1, "tool_use", '{"b":1}')]
    told = _told(*tools, _END)
    assert [(block["id"], block["partial_json"]) for block in told.content] == [
        ("toolu_x", "{}"),
        ("toolu_y", '{"b":1}'),
    ]


def test_one_call_where_the_client_wants_no_more() -> None:
    """Calls after the first are left out, wherever their input comes; words between them stay."""
    second, third = (_start(n, "tool_use", id=f"y{n}", name="Bash") for n in (2, 4))
    tools = [
        _TOOL_1,
        _delta(1, "tool_use", '{"a":1}'),
        second,
        _delta(2, "tool_use", '{"b":1}'),
        _start(3, "text", text=""),
        _delta(3, "text", "and"),
        third,
        _delta(4, "tool_use", "{}"),
        _start(4, "text", text=""),
        _delta(4, "text", "so on"),
    ]
    mending = attrs.evolve(repair(), one_call=True)
    events = [event for body in [*tools, _END] for event in mending.feed(_sse(body))]
    told = checked(events_of(written([*events, *mending.end()])))
    said = [block.get("text") or block["partial_json"] for block in told.content]
    assert said == ['{"a":1}', "and", "so on"]
    assert told.ending["stop_reason"] == "tool_use"


def test_a_true_signature_stays() -> None:
    """A thinking block that comes signed is not signed again."""
    signature = {"type": "signature_delta", "signature": "abc="}
    told = _told(
        _start(0, "thinking", thinking=""),
        _delta(0, "thinking", "hm"),
        {"type": "content_block_delta", "index": 0, "delta": signature},
        _END,
    )
    assert (told.content[0]["thinking"], told.content[0]["signature"]) == ("hm", "abc=")


def test_data_in_several_lines_leaves_as_one() -> None:
    """An upstream may break its JSON into several `data:` lines; our stream has one a event."""
    lines = json.dumps(_delta(0, "text", "a b"), indent=1).replace("\n", "\ndata: ")
    delta = b"event: content_block_delta\ndata: " + lines.encode() + b"\n\n"
    stream = Spelling().stream([_TEXT_0]) + delta + Spelling().stream([_END])
    told = checked(events_of(written(mended(stream))))
    assert told.content[0]["text"] == "a b"


@pytest.mark.parametrize(
    ("reason", "sequence", "told"),
    [
        ("end_turn", None, "end_turn"),
        ("end_turn", "", "end_turn"),
        ("end_turn", "###", "stop_sequence"),
        ("max_tokens", None, "max_tokens"),
        ("tool_use", None, "tool_use"),
        ("stop_sequence", "###", "stop_sequence"),
    ],
)
def test_stop_reasons(reason: str, sequence: str | None, told: str) -> None:
    """A stop sequence is the reason where there is one; everything else stays."""
    delta = {"stop_reason": reason, "stop_sequence": sequence}
    assert _told({**_END, "delta": delta}).ending["stop_reason"] == told


def test_the_last_usage_counts() -> None:
    """What a later event leaves out stays as an earlier one had it."""
    usage = Usage()
    usage.learn({"input_tokens": 7, "cache_read_input_tokens": 3, "output_tokens": 0})
    usage.learn({"output_tokens": 9})
    assert usage.as_json() == {
        "input_tokens": 7,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 3,
        "output_tokens": 9,
    }


@pytest.mark.parametrize("number", ["12", 12.5, -5, True, {}, [1], 2**63 + 5])
def test_a_usage_that_makes_no_sense(number: Any) -> None:
    """It is left out, and neither the client nor the ledger sees it."""
    usage = Usage()
    usage.learn({"input_tokens": 7, "output_tokens": 1})
    usage.learn(dict.fromkeys(("input_tokens", "cache_read_input_tokens", "output_tokens"), number))
    assert (usage.input, usage.cached, usage.output) == (7, 0, 1)


def test_what_a_client_is_told_to_ignore_is_not_sent() -> None:
    """Pings and events of the future do not reach the client from upstream."""
    mending = repair()
    assert mending.feed(_sse({"type": "ping"})) == []
    assert mending.feed(_sse({"type": "some_day", "index": 3})) == []
    assert mending.feed(_sse({"type": "content_block_stop", "index": 3})) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[DONE]",
        b"[]",
        b'"text"',
        b"null",
        b"\xff",
        b'{"type":"message_start"}',
        b'{"type":"message_start","message":[]}',
        b'{"type":"message_start","message":{"usage":7}}',
        b'{"type":"content_block_start","index":0}',
        b'{"type":"content_block_start","content_block":{"type":"text"}}',
        b'{"type":"content_block_start","index":0,"content_block":"text"}',
        b'{"type":"content_block_delta","index":0}',
        b'{"type":"content_block_delta","index":0,"delta":{"text":"a"}}',
        b'{"type":"content_block_delta","index":0,"delta":{"type":"some_day"}}',
        b'{"type":"content_block_delta","index":0,"delta":{"type":"input_json_delta"}}',
        b'{"type":"content_block_stop"}',
        b'{"type":"message_delta"}',
        b'{"type":"message_delta","delta":7}',
    ],
)
def test_nonsense_is_an_error(data: bytes) -> None:
    """What is no event, or lacks what it needs, is an ApiError and never another exception."""
    mending = repair()
    mending.feed(_sse(_TEXT_0))
    event = SSEEvent("content_block_stop" if b"_stop" in data else "x", data)
    with pytest.raises(ApiError, match="makes no sense") as caught:
        # Block 5 is none that is open.
        mending.feed(event._replace(data=data.replace(b'"index":0', b'"index":5')))
    assert caught.value.kind == "api_error"
    assert caught.value.status == 500
    assert data.decode("latin-1") not in caught.value.message or not data


def test_an_overflow_within_the_stream_is_said_as_claude_code_knows_it() -> None:
    """The numbers of llama-server's overflow error come back in the words that compact."""
    error = {"code": 400, "type": "exceed_context_size_error", "message": "too long"}
    error |= {"n_prompt_tokens": 5000, "n_ctx": 4096}
    with pytest.raises(ApiError) as caught:
        repair().feed(_sse(error, "error"))
    assert caught.value.message == "prompt is too long: 5000 tokens > 4095 maximum"
    assert caught.value.kind == "invalid_request_error"


def test_an_error_without_words_is_still_one() -> None:
    """An empty error object does not break the reading of it."""
    with pytest.raises(ApiError, match="failed"):
        repair().feed(SSEEvent("error", b"{}"))


# --- whole messages ---------------------------------------------------------------------------


def test_a_tools_input_that_was_cut_off_is_empty() -> None:
    """At `max_tokens` a tool's input may be no JSON; the message is still one."""
    assembly, mending = Assembly(), repair()
    for body in (_TOOL_1, _delta(1, "tool_use", '{"a": [1,'), _END):
        assembly.add(mending.feed(_sse(body)))
    assembly.add(mending.end())
    assert assembly.message()["content"][0]["input"] == {}


def test_a_whole_message_as_a_stream() -> None:
    """`message_events` tells a message of text blocks by the same rules."""
    message = {
        "id": "msg_7",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": '{"a":"\n"}'}, {"type": "text", "text": ""}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": Usage(1, 2, 3).as_json(),
    }
    events = message_events(message)
    told = checked(events_of(written(events)))
    assert [block["text"] for block in told.content] == ['{"a":"\n"}', ""]
    assert told.usage == message["usage"]
    assembly = Assembly()
    assembly.add(events)
    assert assembly.message() == message


def test_an_error_event_of_ours_ends_what_was_cut_in_the_middle() -> None:
    """Half an event before it does not swallow the error."""
    error = ApiError("overloaded_error", "Later.")
    (event,) = SSEParser().feed(b'event: content_block_delta\ndata: {"x' + error_event(error, "r"))[
        -1:
    ]
    assert event.name == "error"
    assert orjson.loads(event.data) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "Later."},
        "request_id": "r",
    }


# --- the rules themselves ---------------------------------------------------------------------

_GOOD: Sequence[Mapping[str, Json]] = [
    event.body
    for event in mended(
        Spelling().stream(
            Answer(
                [Block("thinking", ["a"]), Block("tool_use", ["{}"], "x", "Bash")],
                ("end_turn", None),
                (1, 2, 3),
            ).events()
        )
    )
]


def test_the_rules_accept_a_good_stream() -> None:
    """The stream that the next test breaks is right before."""
    checked(_GOOD)


#: All but the pieces of a text, of which there may be any number.
_NEEDED = [
    number
    for number, event in enumerate(_GOOD)
    if event.get("delta", {}).get("type") not in ("thinking_delta", "input_json_delta")
]


@pytest.mark.parametrize("number", _NEEDED)
def test_the_rules_are_rules(number: int) -> None:
    """A stream with one event left out or told twice is refused, whichever it is."""
    with pytest.raises(AssertionError):
        checked([*_GOOD[:number], *_GOOD[number + 1 :]])
    with pytest.raises(AssertionError):
        checked([*_GOOD[: number + 1], *_GOOD[number:]])
