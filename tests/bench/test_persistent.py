"""What a client that does not give up makes of an answer."""

from __future__ import annotations

from typing import Any

import pytest

from bench.persistent import Again, Refused, Wrong, told, told_in_chunks, understood
from tests.house import HELLO, sse


def error(kind: str) -> dict[str, Any]:
    """The event that says it."""
    return {"type": "error", "error": {"type": kind, "message": "no"}}


def test_a_stream_is_the_message_that_it_tells() -> None:
    """Pings mean nothing, and the usage is the last one that was told."""
    message = told(sse({"type": "ping"}, *HELLO))
    assert message["content"] == [{"type": "text", "text": "Hello"}]
    assert message["stop_reason"] == "end_turn"


@pytest.mark.parametrize("events", range(len(HELLO)))
def test_a_stream_that_ends_too_soon_is_asked_for_again(events: int) -> None:
    """Wherever it ends."""
    with pytest.raises(Again) as found:
        told(sse(*HELLO[:events]))
    assert not found.value.whole


@pytest.mark.parametrize(("kind", "whole"), [("overloaded_error", False), ("api_error", True)])
def test_after_an_error_in_a_stream_it_is_asked_for_again(kind: str, *, whole: bool) -> None:
    """Without a stream, unless the model is only busy."""
    with pytest.raises(Again) as found:
        told(sse(*HELLO[:1], error(kind)))
    assert found.value.whole is whole


@pytest.mark.parametrize(
    "events",
    [
        HELLO[1:],
        (HELLO[0], *HELLO),
        (*HELLO[:2], *HELLO[1:]),
        (*HELLO[:3], *HELLO[4:]),
        (*HELLO[:-2], HELLO[-1]),
    ],
    ids=["no start", "two starts", "a block in a block", "a block left open", "no reason to stop"],
)
def test_a_stream_without_order_is_no_answer(events: tuple[Any, ...]) -> None:
    """It is not asked for again either: somebody has to look."""
    with pytest.raises(Wrong):
        told(sse(*events))


@pytest.mark.parametrize(
    ("status", "headers", "after"),
    [
        (500, {}, None),
        (529, {"Retry-After": "7"}, 7.0),
        (503, {"retry-after": "5"}, 5.0),
        (400, {"x-should-retry": "true"}, None),
    ],
)
def test_what_may_help_is_tried_again(
    status: int, headers: dict[str, str], after: float | None
) -> None:
    """After as long as the gateway says."""
    with pytest.raises(Again) as found:
        understood(status, headers, b"{}")
    assert found.value.after == after


@pytest.mark.parametrize(
    ("status", "headers"), [(400, {}), (404, {}), (500, {"x-should-retry": "false"})]
)
def test_what_cannot_help_is_not(status: int, headers: dict[str, str]) -> None:
    """The gateway's own word goes before the status."""
    with pytest.raises(Refused):
        understood(status, headers, b"{}")


def chunks(*said: str) -> bytes:
    """A stream of OpenAI's API."""
    return "".join(f"data: {each}\n\n" for each in said).encode()


FIRST = '{"choices": [{"delta": {"content": "A gate"}, "finish_reason": null}]}'
LAST = '{"choices": [{"delta": {}, "finish_reason": "stop"}]}'


def test_chunks_are_the_text_that_they_tell() -> None:
    """Comments mean nothing, and neither does a chunk without a choice."""
    raw = b": ping\n\n" + chunks(FIRST, LAST, '{"choices": []}', "[DONE]")
    assert told_in_chunks(raw) == {"text": "A gate", "reason": "stop"}


@pytest.mark.parametrize(
    "said", [(FIRST,), (FIRST, LAST), (FIRST, "[DONE]"), (FIRST, '{"error": {"code": 500}}')]
)
def test_chunks_that_do_not_end_well_are_asked_for_again(said: tuple[str, ...]) -> None:
    """Without a reason, without the mark, or with an error."""
    with pytest.raises(Again):
        told_in_chunks(chunks(*said))
