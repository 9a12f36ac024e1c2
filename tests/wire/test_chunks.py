"""Chat chunks to Messages events; `Repair` and `Assembly` judge what comes out."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.chunks import Chunks
from gateway.wire.errors import ApiError
from gateway.wire.events import Assembly, Repair, Truncated
from gateway.wire.sse import EventTooLong

Json = Any

STOP = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
CALLS = {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}


def chunk(**delta: Json) -> Json:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def part(arguments: str = "", index: int | None = 0, **more: Json) -> Json:
    """A chunk with one part of a tool call."""
    function: Json = {"arguments": arguments}
    if "name" in more:
        function["name"] = more.pop("name")
    call = {**more, "function": function} | ({} if index is None else {"index": index})
    return chunk(tool_calls=[call])


def wire(*chunks: Json, done: bool = True) -> bytes:
    lines = b"".join(b"data: %b\n\n" % orjson.dumps(each) for each in chunks)
    return lines + (b"data: [DONE]\n\n" if done else b"")


def message(raw: bytes, size: int = 1 << 20) -> Json:
    """The message that a stream tells, fed in pieces of `size` bytes."""
    chunks, repair, assembly = Chunks(), Repair("msg_1", "m", "main"), Assembly()
    for start in range(0, len(raw), size):
        for event in chunks.feed(raw[start : start + size]):
            assembly.add(repair.feed(event))
    assembly.add(repair.end())
    return assembly.message()


def told(*chunks: Json) -> list[Json]:
    """The content blocks of the message that these chunks tell."""
    content: list[Json] = message(wire(*chunks))["content"]
    return content


def called(name: str, city: str, identity: str) -> Json:
    return {"type": "tool_use", "id": identity, "name": name, "input": {"city": city}}


def test_words_come_as_they_are_said() -> None:
    """Each piece of text is an event of its own, at once."""
    chunks, repair = Chunks(), Repair("msg_1", "m", "main")
    said = []
    for piece in ("Hel", "lo"):
        for event in chunks.feed(wire(chunk(role="assistant", content=piece), done=False)):
            said += repair.feed(event)
    assert [event.body["type"] for event in said] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
    ]
    assert [event.body["delta"]["text"] for event in said[2:]] == ["Hel", "lo"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_is_thinking(key: str) -> None:
    """Under either name, in a block before the text."""
    assert told(chunk(**{key: "Hm."}), chunk(content="Yes."), STOP) == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Yes."},
    ]


def test_a_tool_call_comes_part_by_part() -> None:
    """The parts of its arguments are told as they come, and the answer stops for the tool."""
    raw = wire(
        chunk(content="Let me look."),
        part(name="weather", id="call_1"),
        part('{"city": "Pa'),
        part('ris"}'),
        CALLS,
    )
    events = [orjson.loads(event.data) for event in Chunks().feed(raw)]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert [delta.get("partial_json") for delta in deltas] == [None, '{"city": "Pa', 'ris"}']
    said = message(raw)
    assert said["stop_reason"] == "tool_use"
    assert said["content"][1:] == [called("weather", "Paris", "toolu_call_1")]


def test_parts_of_several_calls_may_be_mixed() -> None:
    """Each call is whole, in the order in which they began."""
    assert told(
        part(name="one", id="a"),
        part('{"city":', 0),
        part(name="two", id="b", index=1),
        part('{"city":', 1),
        part('"Rome"}', 0),
        part('"Bern"}', 1),
        CALLS,
    ) == [called("one", "Rome", "toolu_a"), called("two", "Bern", "toolu_b")]


@pytest.mark.parametrize("index", [0, None], ids=["the same", "none"])
def test_calls_whose_index_says_nothing(index: int | None) -> None:
    """The ids tell them apart."""
    assert told(
        part('{"city":"Rome"}', index, name="one", id="a"),
        part('{"city":"Bern"}', index, name="two", id="b"),
        CALLS,
    ) == [called("one", "Rome", "toolu_a"), called("two", "Bern", "toolu_b")]


def test_parts_without_index_belong_to_the_last_call() -> None:
    """Where only the first part says which call it is."""
    assert told(
        part(name="one", id="a", index=None),
        part('{"city":', None),
        part('"Rome"}', None),
        STOP,
    ) == [called("one", "Rome", "toolu_a")]


def test_an_id_that_is_repeated_is_the_same_call() -> None:
    """Some servers say it with each part."""
    assert told(
        part('{"city":', None, name="one", id="a"), part('"Rome"}', None, name="one", id="a"), STOP
    ) == [called("one", "Rome", "toolu_a")]


def test_a_call_that_is_named_late_is_kept() -> None:
    """Its block opens with the name, so it waits for that."""
    assert told(part('{"city":', id="a"), part('"Rome"}', name="one"), STOP) == [
        called("one", "Rome", "toolu_a")
    ]


def test_a_call_without_a_name_is_nonsense() -> None:
    """Nobody could run it, and nobody may think that there was none."""
    with pytest.raises(ApiError, match="makes no sense"):
        told(part("{}", id="a"), STOP)


def test_arguments_that_are_an_object() -> None:
    """As Ollama has them."""
    call = {"function": {"name": "one", "arguments": {"city": "Rome"}}, "id": "a"}
    assert told(chunk(tool_calls=[call]), STOP) == [called("one", "Rome", "toolu_a")]


def test_words_after_a_call_come_after_it() -> None:
    """They are kept until the calls are whole; white space between calls is nobody's word."""
    assert told(
        part('{"city":', name="one", id="a"),
        chunk(content="\n"),
        part('"Rome"}'),
        part('{"city":"Bern"}', 1, name="two", id="b"),
        chunk(content="There."),
        CALLS,
    ) == [
        called("one", "Rome", "toolu_a"),
        called("two", "Bern", "toolu_b"),
        {"type": "text", "text": "There."},
    ]


@pytest.mark.parametrize(
    ("reason", "more", "stop_reason", "sequence"),
    [
        ("stop", {}, "end_turn", None),
        ("length", {}, "max_tokens", None),
        ("content_filter", {}, "refusal", None),
        ("tool_calls", {}, "end_turn", None),
        ("stop", {"stop_reason": "END"}, "stop_sequence", "END"),
        ("stop", {"matched_stop": "END"}, "stop_sequence", "END"),
        ("stop", {"matched_stop": 151645}, "end_turn", None),
        ("length", {"stop_reason": "END"}, "max_tokens", None),
        ("something new", {}, "end_turn", None),
    ],
)
def test_why_it_stopped(reason: str, more: Json, stop_reason: str, sequence: str | None) -> None:
    """A call that was announced and did not come is none; a token's number is no sequence."""
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason, **more}]}
    said = message(wire(chunk(content="x"), end))
    assert (said["stop_reason"], said["stop_sequence"]) == (stop_reason, sequence)


@pytest.mark.parametrize("apart", [True, False], ids=["in a chunk of its own", "beside the end"])
@pytest.mark.parametrize(
    ("details", "evaluated", "cached"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 30}}, 12, 30),
        ({"prompt_cache_hit_tokens": 30}, 12, 30),
        ({"prompt_tokens_details": None}, 42, 0),
        ({}, 42, 0),
    ],
)
def test_the_usage(details: Json, evaluated: int, cached: int, *, apart: bool) -> None:
    """Cached tokens are a part of the prompt there, and stand beside it here."""
    said = {"prompt_tokens": 42, "completion_tokens": 7, **details}
    ends = [STOP, {"choices": [], "usage": said}] if apart else [{**STOP, "usage": said}]
    usage = message(wire(chunk(content="x"), *ends))["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (evaluated, cached)
    assert usage["output_tokens"] == 7


def test_a_stream_that_breaks_off_is_not_whole() -> None:
    """Neither a reason to stop nor the sign of the end came."""
    with pytest.raises(Truncated):
        message(wire(chunk(content="x"), done=False))


def test_the_sign_of_the_end_is_enough() -> None:
    """Some servers give no reason."""
    assert message(wire(chunk(content="x")))["stop_reason"] == "end_turn"


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "out of memory", "code": 500}},
        {"error": "out of memory"},
        {"object": "error", "message": "out of memory", "code": 500},
    ],
)
def test_an_error_in_the_stream(error: Json) -> None:
    """In whichever shape: the call fails with what the server says."""
    with pytest.raises(ApiError, match="out of memory"):
        message(wire(chunk(content="x"), error))


@pytest.mark.parametrize(
    "raw",
    [
        b"data: {nonsense\n\n",
        b"data: []\n\n",
        wire({"choices": 5}),
        wire(chunk(content=5)),
        wire({"choices": [None]}),
        wire(chunk(tool_calls=[5])),
        wire(part(index=[1])),  # type: ignore[arg-type]
        wire({"choices": [], "usage": 5}),
    ],
)
def test_nonsense_is_an_error(raw: bytes) -> None:
    """Never an exception of another kind, and never silence."""
    with pytest.raises(ApiError, match="makes no sense"):
        message(raw + wire(STOP))


def test_what_waits_is_bounded() -> None:
    """A server that never ends its second call cannot fill the memory."""
    chunks = Chunks(limit=1200)
    chunks.feed(wire(part(name="one", id="a"), part(name="two", id="b", index=1), done=False))
    chunks.feed(wire(part("x" * 900, 1), done=False))
    with pytest.raises(EventTooLong):
        chunks.feed(wire(part("x" * 101, 1), done=False))


@pytest.mark.parametrize(
    "said",
    [
        [part(index=n, name="one", id=f"call_{n}") for n in range(1000)],
        [each for n in range(500) for each in (part(index=n), part(index=n, name="x" * 900))],
        [each for n in range(500) for each in (part(index=n), part(index=n, id="x" * 900))],
        [part(name="one", id="a"), *[chunk(content=" "), chunk(reasoning="x")] * 1000],
    ],
    ids=["calls", "names", "ids", "words"],
)
def test_what_says_nothing_is_bounded_too(said: list[Json]) -> None:
    """Each call and each block of words takes room, whatever it says."""
    with pytest.raises(EventTooLong):
        Chunks(limit=100_000).feed(wire(*said, done=False))


def test_other_choices_are_left_out() -> None:
    """Nobody asked for two answers."""
    other = {"choices": [{"index": 1, "delta": {"content": "no"}, "finish_reason": None}]}
    assert told(chunk(content="yes"), other, STOP) == [{"type": "text", "text": "yes"}]


@given(st.integers(min_value=1, max_value=40))
def test_pieces_of_any_size(size: int) -> None:
    """Wherever the bytes are split, the message is the same."""
    raw = wire(
        chunk(reasoning="Hm é."),
        chunk(content="Hello."),
        part('{"city":"Rome"}', name="one", id="a"),
        CALLS,
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}},
    )
    assert message(raw, size) == message(raw)
