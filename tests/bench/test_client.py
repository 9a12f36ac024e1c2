"""How the clients of bench read an answer."""

from __future__ import annotations

import pytest

from bench.client import events
from bench.fast_llama import MESSAGES, chunk

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
BODY = (
    b"event: content_block_delta\ndata: {}\n\nevent: content_block_delta\ndata: {}\n\n"
    b"event: message_stop\ndata: {}\n\n"
)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_are_found_wherever_chunks_end(size: int) -> None:
    """A proxy may put the end of a chunk into an event."""
    chunks = [chunk(BODY[at : at + size]) for at in range(0, len(BODY), size)]
    assert events(HEAD + b"".join(chunks) + chunk(b"")) == (2, True)


def test_an_answer_that_does_not_say_its_end_has_none() -> None:
    """Though its body is whole."""
    assert events(HEAD + MESSAGES.events(3) + chunk(b"")) == (3, False)
