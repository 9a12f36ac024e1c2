"""Server-sent events, whatever the bytes and however they are cut."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.wire.sse import EventTooLong, SSEEvent, SSEParser, encode

#: What matters to the format, in the mixture that finds mistakes.
PIECES = st.sampled_from(
    [
        b"\n",
        b"\n\n",
        b"\r",
        b"\r\n",
        b"\r\n\r\n",
        b":",
        b": ",
        b" ",
        b"data",
        b"data:",
        b"data: ",
        b"event: ",
        b"event:",
        b"id: 7",
        b"retry: 5",
        b"x",
        b"ping",
        "\N{GRINNING FACE}é".encode(),
        b"\x00",
        b"\xef\xbb\xbf",
        b"\xff",
    ]
)
STREAMS = st.lists(PIECES, max_size=40).map(b"".join)


def by_the_book(stream: bytes) -> list[SSEEvent]:
    """The events of a whole stream, read line by line as the WHATWG describes it."""
    found: list[SSEEvent] = []
    name, data = b"", b""
    # What follows the last end of a line is no line.
    for line in re.split(rb"\r\n|\r|\n", stream.removeprefix(b"\xef\xbb\xbf"))[:-1]:
        if not line:
            if data:
                found.append(SSEEvent(name.decode("utf-8", "replace") or "message", data[:-1]))
            name, data = b"", b""
            continue
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            name = value
        elif field == b"data":
            data += value + b"\n"
    return found


def read(*chunks: bytes) -> list[SSEEvent]:
    """The events of the stream that comes in these chunks."""
    parser = SSEParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def cut(stream: bytes, positions: list[int]) -> list[bytes]:
    """`stream` in pieces, cut at these positions."""
    edges = [0, *sorted(min(position, len(stream)) for position in positions), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges)]


@settings(max_examples=600, deadline=None)
@given(STREAMS, st.lists(st.integers(0, 200), max_size=8))
def test_any_stream_in_any_pieces_is_read_by_the_book(stream: bytes, positions: list[int]) -> None:
    """Any bytes, cut anywhere, give the events that the format says; one LF ends what is open."""
    # A CR at the very end may be half of a CRLF, so the parser may wait there for the next byte.
    stream += b"\n"
    assert read(*cut(stream, positions)) == by_the_book(stream)


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"], ids=["LF", "CR", "CRLF"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["no BOM", "BOM"])
def test_each_single_cut_gives_the_same_events(end: bytes, bom: bytes) -> None:
    """A stream that is cut in two at any byte gives the same events as the whole one."""
    lines = [b": ping", b"", b"event: a", b'data: {"x": "\xc3\xa9"}', b"", b":", b"", b"data:b"]
    stream = bom + end.join([*lines, b"", b": the end", b"", b""])
    expected = [SSEEvent("a", b'{"x": "\xc3\xa9"}'), SSEEvent("message", b"b")]
    assert read(stream) == expected
    for position in range(len(stream) + 1):
        assert read(stream[:position], stream[position:]) == expected
    assert read(*(stream[n : n + 1] for n in range(len(stream)))) == expected


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_an_event_is_given_as_soon_as_it_is_complete(end: bytes) -> None:
    """No further byte is needed after the empty line that ends an event."""
    parser = SSEParser()
    assert parser.feed(b"data: 1" + end) == []
    assert parser.feed(end) == [SSEEvent("message", b"1")]


def test_several_data_lines_are_joined_by_a_line_feed() -> None:
    """Each `data:` line adds one line to the data."""
    assert read(b"data: a\ndata:\ndata:  b\n\n") == [SSEEvent("message", b"a\n\n b")]


def test_an_event_without_data_is_none() -> None:
    """A name alone, a comment or an empty line make no event."""
    assert read(b"event: a\n\n: b\n\n\n\nid: 3\nretry: 4\n\n") == []


def test_an_event_that_was_not_ended_is_not_given() -> None:
    """What is left when the stream breaks off is no event."""
    assert read(b"data: a\n\ndata: b\n") == [SSEEvent("message", b"a")]


def test_only_the_first_byte_order_mark_is_dropped() -> None:
    """A byte order mark within the stream belongs to its line."""
    assert read(b"\xef\xbb", b"\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n") == [
        SSEEvent("message", b"a")
    ]


def test_an_event_beyond_the_limit_is_an_error() -> None:
    """An event that does not end is not held for ever."""
    parser = SSEParser(limit=100)
    for _ in range(10):
        assert parser.feed(b"data: 789\n") == []
    with pytest.raises(EventTooLong, match="100"):
        parser.feed(b"!")


def test_many_short_events_are_no_long_one() -> None:
    """The limit is for one event, however many there are."""
    parser = SSEParser(limit=100)
    for _ in range(50):
        assert len(parser.feed(b"data: 123456789\n\n")) == 1


@settings(max_examples=300, deadline=None)
@given(
    st.from_regex(r"[a-z_]{1,30}", fullmatch=True),
    st.binary(min_size=1).filter(lambda data: not re.search(rb"[\r\n]", data)),
)
def test_what_is_written_is_read_again(name: str, data: bytes) -> None:
    """`encode` and the parser are inverse to each other."""
    assert read(encode(name, data)) == [SSEEvent(name, data)]
