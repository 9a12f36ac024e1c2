"""llama-server's ``/completion`` in the place of ``/v1/messages``."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.bare import Continuation, completion, is_meant
from gateway.wire.errors import ApiError
from gateway.wire.events import Assembly, Repair
from gateway.wire.sse import EventTooLong

Json = Any

END: Json = {
    "content": "",
    "stop": True,
    "stop_type": "eos",
    "tokens_predicted": 4,
    "tokens_evaluated": 9,
    "timings": {"cache_n": 3, "prompt_n": 6},
}


def stream(*said: Json) -> bytes:
    return b"".join(b"data: %b\n\n" % orjson.dumps(each) for each in said)


def message(data: bytes, size: int = 1000) -> Json:
    """The message that a stream tells, read in pieces of so many bytes."""
    continuation, repair, assembly = Continuation(), Repair("msg_1", "m"), Assembly()
    for at in range(0, len(data), size):
        for event in continuation.feed(data[at : at + size]):
            assembly.add(repair.feed(event))
    assembly.add(repair.end())
    return assembly.message()


@given(st.lists(st.text(max_size=9), max_size=6), st.integers(1, 60))
def test_the_text_is_the_same_whatever_the_chunking(pieces: list[str], size: int) -> None:
    """All that was generated is one text, with what it cost."""
    said = [{"content": piece, "stop": False} for piece in pieces]
    found = message(stream(*said, END), size)
    assert "".join(block["text"] for block in found["content"]) == "".join(pieces)
    usage = found["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (
        6,
        3,
        4,
    )


@pytest.mark.parametrize(
    ("kind", "word", "reason"),
    [("eos", "", "end_turn"), ("word", ".", "stop_sequence"), ("limit", "", "max_tokens")],
)
def test_why_it_ended(kind: str, word: str, reason: str) -> None:
    """Each way to end has its stop reason; a stop word is named."""
    found = message(stream({**END, "stop_type": kind, "stopping_word": word}))
    assert (found["stop_reason"], found["stop_sequence"]) == (reason, word or None)


def test_a_server_without_timings() -> None:
    """An older one says how long the prompt was, and nothing of what it had."""
    found = message(stream({name: END[name] for name in END if name != "timings"}))
    assert (found["usage"]["input_tokens"], found["usage"]["cache_read_input_tokens"]) == (9, 0)


@pytest.mark.parametrize("data", [b"data: {\n\n", b"data: []\n\n", b"data: {}\n\n", b"data: 5\n\n"])
def test_nonsense(data: bytes) -> None:
    """What is no event of that endpoint is an error."""
    with pytest.raises(ApiError, match="makes no sense"):
        message(data)


def test_an_error() -> None:
    """What the server says of its failure is said."""
    failed = {"error": {"code": 500, "message": "Compute error.", "type": "server_error"}}
    with pytest.raises(ApiError, match="Compute error"):
        message(stream(failed))


def test_an_event_that_never_ends() -> None:
    """It is held as little as any other stream's."""
    with pytest.raises(EventTooLong):
        Continuation().feed(b"data: " + b"x" * 10 * 1024 * 1024)


def test_what_the_server_gets() -> None:
    """The prompt and its sampling under the server's own names, and nothing that is ours."""
    body = {"prompt": "a", "messages": [], "max_tokens": 5, "seed": 1}
    assert is_meant(body)
    assert not is_meant({"messages": []})
    assert completion(body) == {"prompt": "a", "seed": 1, "n_predict": 5, "cache_prompt": True}
