"""What the refusals of servers elsewhere are made of."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gateway.remote.refusals import read
from gateway.wire.errors import ApiError, Unavailable

Json = Any


LEAVES_NO_ROOM = (
    "input length and `max_tokens` exceed context limit: 8000 + 1000 > 8192,"
    " decrease input length or `max_tokens` and try again"
)


def refused(status: int, body: Json = None, **headers: str) -> ApiError:
    """The error for an answer with these headers, names with ``_`` for ``-``."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return read(status, raw, lambda name: named.get(name, ""), "main")


def anthropic(kind: str, message: str) -> Json:
    return {"type": "error", "error": {"type": kind, "message": message}}


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_the_gateways(status: int) -> None:
    """The client's own was right; what the server says may hold a part of the key."""
    error = refused(status, anthropic("authentication_error", "Incorrect API key: sk-abc123"))
    assert (error.status, error.kind, error.should_retry) == (502, "api_error", False)
    assert "api_key_env in [tier.main]" in error.message
    assert "sk-" not in error.message


@pytest.mark.parametrize(
    ("status", "kind"), [(429, "rate_limit_error"), (529, "overloaded_error"), (500, "api_error")]
)
def test_what_passes_is_passed_on(status: int, kind: str) -> None:
    """With the time after which trying again makes sense, and the server's name for the call."""
    said = anthropic(kind, "Slow down.")
    error = refused(status, said, retry_after="7", request_id="req_9", x_should_retry="true")
    assert (error.status, error.kind, error.retry_after, error.should_retry) == (
        status,
        kind,
        7,
        True,
    )
    assert "Slow down." in error.message
    assert "'main'" in error.message
    assert "req_9" in error.message


@pytest.mark.parametrize(
    ("text", "seconds"), [("0.4", 0), ("12", 12), ("Wed, 21 Oct 2026", None), ("inf", None)]
)
def test_when_to_come_again(text: str, seconds: int | None) -> None:
    """A number is seconds; a date says nothing here."""
    assert refused(429, b"", retry_after=text).retry_after == seconds


@pytest.mark.parametrize(
    "body",
    [
        anthropic("invalid_request_error", "messages.0: wrong"),
        {"error": {"message": "messages.0: wrong", "type": "BadRequestError", "code": 400}},
        {"error": "messages.0: wrong"},
        {"detail": "messages.0: wrong"},
        {"object": "error", "message": "messages.0: wrong"},
    ],
)
def test_a_wrong_request_is_the_clients(body: Json) -> None:
    """In the server's own words, whatever their shape."""
    error = refused(400, body)
    assert (error.status, error.kind) == (400, "invalid_request_error")
    assert error.message == "messages.0: wrong"


@pytest.mark.parametrize(
    ("status", "kind", "wanted"),
    [
        (402, "billing_error", "billing_error"),
        (413, "request_too_large", "request_too_large"),
        (422, "Unprocessable", "invalid_request_error"),
        (418, "overloaded_error", "overloaded_error"),
    ],
)
def test_kinds_that_are_not_ours(status: int, kind: str, wanted: str) -> None:
    """What the Messages API may say one day passes, with its status."""
    error = refused(status, anthropic(kind, "No."))
    assert (error.status, error.kind) == (status, wanted)


@pytest.mark.parametrize("status", [404, 405])
def test_what_is_not_there_is_a_mistake_of_the_configuration(status: int) -> None:
    """A 404 would make Claude Code ask again without a stream."""
    error = refused(status, anthropic("not_found_error", "model: nobody"))
    assert (error.status, error.should_retry) == (502, False)
    assert "model: nobody" in error.message
    assert "[tier.main]" in error.message


def test_a_redirect_is_followed_by_a_person() -> None:
    """The gateway goes nowhere with a key that it was not told to go."""
    error = refused(301, b"")
    assert (error.status, error.should_retry) == (502, False)
    assert "url in [tier.main]" in error.message


def test_a_server_that_loads_is_waited_for() -> None:
    """One that says when to come again says it to the client."""
    assert isinstance(refused(503, b"Loading"), Unavailable)
    later = refused(503, b"", retry_after="30")
    assert not isinstance(later, Unavailable)
    assert (later.status, later.retry_after) == (503, 30)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            {"type": "exceed_context_size_error", "n_prompt_tokens": 9000, "n_ctx": 4096},
            "prompt is too long: 9000 tokens > 4095 maximum",
        ),
        (
            {
                "message": "This model's maximum context length is 8192 tokens. However, your"
                " messages resulted in 9001 input tokens. Please reduce the length."
            },
            "prompt is too long: 9001 tokens > 8191 maximum",
        ),
        (
            {
                "message": "This model's maximum context length is 8192 tokens. However, you"
                " requested 9000 tokens (8500 in the messages, 500 in the completion)."
            },
            "prompt is too long: 8500 tokens > 8191 maximum",
        ),
        (
            {
                "message": "This model's maximum context length is 8192 tokens. However, you"
                " requested 1000 output tokens and your prompt contains at least 8000 input tokens"
            },
            LEAVES_NO_ROOM,
        ),
        ({"message": "The context length is exceeded."}, "Prompt is too long"),
        (
            {"message": "prompt is too long: 5 tokens > 4 maximum"},
            "prompt is too long: 5 tokens > 4 maximum",
        ),
    ],
)
def test_an_overflow_is_told_in_the_words_that_make_the_client_compact(
    error: Json, message: str
) -> None:
    """Whoever says it."""
    found = refused(400, {"error": error})
    assert (found.status, found.kind) == (400, "invalid_request_error")
    assert found.message == message


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"5", b'{"error": 5}', b'{"error": null}'])
def test_a_body_of_any_shape(body: bytes) -> None:
    """What says nothing leaves the status."""
    error = refused(500, body)
    assert (error.status, error.kind) == (500, "api_error")
    assert "HTTP status 500" in error.message


def test_a_long_message_is_cut() -> None:
    """A page of HTML in it helps nobody."""
    assert len(refused(400, {"error": {"message": "x" * 10_000}}).message) == 600


@pytest.mark.parametrize("status", [201, 204, 299, 600, 999])
def test_what_is_neither_an_answer_nor_an_error(status: int) -> None:
    """A client that got the status would take the error for its answer."""
    error = refused(status, anthropic("api_error", "Odd."))
    assert (error.status, error.kind, error.should_retry) == (502, "api_error", False)
    assert str(status) in error.message


def test_a_number_of_any_length() -> None:
    """It is no number of tokens, and the prompt is too long all the same."""
    many = "9" * 5000
    error = refused(400, anthropic("x", f"context length is {many}, but 8 input tokens; {many}"))
    assert (error.status, error.message) == (400, "Prompt is too long")
    error = refused(400, anthropic("x", f"context length is 8, but {many} input tokens"))
    assert (error.status, error.message) == (400, "Prompt is too long")
