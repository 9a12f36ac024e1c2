"""One table of errors: kinds, statuses, headers, and what an upstream's refusal means."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.errors import (
    STATUSES,
    ApiError,
    from_upstream,
    from_upstream_error,
    invalid,
    overloaded,
    prompt_too_long,
    unavailable,
)


def test_the_table_is_the_apis_own() -> None:
    """Each kind has the status that the Messages API gives it."""
    assert STATUSES == {
        "invalid_request_error": 400,
        "authentication_error": 401,
        "permission_error": 403,
        "not_found_error": 404,
        "request_too_large": 413,
        "rate_limit_error": 429,
        "api_error": 500,
        "timeout_error": 504,
        "overloaded_error": 529,
    }
    for kind, status in STATUSES.items():
        assert ApiError(kind, "x").status == status


def test_an_unknown_kind_is_a_mistake_of_ours() -> None:
    """A kind that is not in the table cannot be raised by accident."""
    with pytest.raises(KeyError):
        ApiError("some_error", "x")


def test_the_envelope() -> None:
    """An error is wrapped as the Messages API wraps it."""
    assert ApiError("not_found_error", "No.").envelope("req_1") == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "No."},
        "request_id": "req_1",
    }


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (invalid("x"), {}),
        (overloaded("x", 7), {"retry-after": "7"}),
        (unavailable("x"), {"retry-after": "5"}),
        (ApiError("api_error", "x", should_retry=False), {"x-should-retry": "false"}),
        (ApiError("api_error", "x", should_retry=True), {"x-should-retry": "true"}),
        (
            ApiError("api_error", "x", retry_after=0, should_retry=False),
            {"retry-after": "0", "x-should-retry": "false"},
        ),
    ],
)
def test_headers(error: ApiError, headers: dict[str, str]) -> None:
    """Only what is known is said."""
    assert error.headers() == headers


@pytest.mark.parametrize(
    ("error", "is_transient"),
    [
        (invalid("x"), False),
        (ApiError("rate_limit_error", "x"), False),
        (ApiError("api_error", "x"), True),
        (unavailable("x"), True),
        (overloaded("x", 1), True),
        (ApiError("timeout_error", "x"), True),
        (ApiError("api_error", "x", should_retry=False), False),
    ],
)
def test_what_may_pass(error: ApiError, is_transient: bool) -> None:
    """What is the server's fault may pass, unless it is known not to."""
    assert error.is_transient is is_transient


def test_an_error_as_text() -> None:
    """For the log: status, kind and message."""
    assert str(overloaded("Later.", 1)) == "529 overloaded_error: Later."


def test_an_overflow_in_the_words_that_compact() -> None:
    """The longest prompt leaves one place for the answer."""
    error = prompt_too_long(5000, 4096)
    assert (error.status, error.kind) == (400, "invalid_request_error")
    assert error.message == "prompt is too long: 5000 tokens > 4095 maximum"


def refused(status: int, kind: str = "", message: str = "", **more: Any) -> ApiError:
    body = {"error": {"code": status, "type": kind, "message": message, **more}}
    return from_upstream(status, orjson.dumps(body), "main")


def test_an_overflow_of_llama_server() -> None:
    """Its numbers come back in our words; without numbers in the shorter ones."""
    kind = "exceed_context_size_error"
    error = refused(400, kind, "too long", n_prompt_tokens=5000, n_ctx=4096)
    assert str(error) == str(prompt_too_long(5000, 4096))
    error = refused(400, kind, "too long", n_prompt_tokens="many")
    assert (error.status, error.message) == (400, "Prompt is too long")


@pytest.mark.parametrize("status", [400, 409, 415, 422, 501])
def test_what_the_client_did_is_said_to_the_client(status: int) -> None:
    """An upstream's 4xx, and what it does not support, is a 400 with its words."""
    error = refused(status, "invalid_request_error", "Roles must alternate.")
    assert (error.status, error.kind) == (400, "invalid_request_error")
    assert error.message == "Roles must alternate."


def test_a_server_that_loads() -> None:
    """503 stays 503, and says when to come back."""
    error = refused(503, "unavailable_error", "Loading model")
    assert (error.status, error.kind, error.retry_after) == (503, "api_error", 5)
    assert error.is_transient
    assert "'main'" in error.message
    assert "Loading model" in error.message


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_ours_to_mend(status: int) -> None:
    """The client's own key is not at fault: no 401 for it, and the config's key is named."""
    error = refused(status, "authentication_error", "Invalid API Key: s3cr3t")
    assert (error.status, error.should_retry) == (502, False)
    assert "[tier.main]" in error.message
    assert "s3cr3t" not in error.message


@pytest.mark.parametrize("status", [404, 405])
def test_a_server_that_knows_no_such_endpoint(status: int) -> None:
    """It is not the client's path that is unknown, and asking again does not help."""
    error = refused(status, "not_found_error", "File Not Found")
    assert (error.status, error.kind, error.should_retry) == (502, "api_error", False)
    assert "'main'" in error.message


@pytest.mark.parametrize("status", [500, 502, 504, 302, 204])
def test_a_server_that_fails(status: int) -> None:
    """Everything else is the server's failure, to be tried again."""
    error = refused(status, "server_error", "Compute error.")
    assert (error.status, error.kind) == (500, "api_error")
    assert error.is_transient
    assert "Compute error." in error.message


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"null", b'{"error":"x"}', b'{"error":{}}', b"\xff"]
)
def test_a_body_of_any_shape(body: bytes) -> None:
    """What does not look like llama-server's error is at least its status."""
    error = from_upstream(500, body, "main")
    assert (error.status, error.kind) == (500, "api_error")
    assert "HTTP status 500" in error.message


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
_WRONG = st.fixed_dictionaries(
    {},
    optional={
        "type": _JSON | st.sampled_from([*STATUSES, "exceed_context_size_error"]),
        **dict.fromkeys(("message", "code", "n_prompt_tokens", "n_ctx"), _JSON),
    },
)


@given(
    st.integers(100, 999),
    st.binary() | _JSON.map(orjson.dumps) | _WRONG.map(lambda each: orjson.dumps({"error": each})),
)
def test_whatever_a_server_refuses_with(status: int, body: bytes) -> None:
    """Any status with any body becomes an error of the table: a short sentence, JSON, headers."""
    error = from_upstream(status, body, "main")
    assert error.kind in STATUSES
    assert error.status in (400, 429, 500, 502, 503, 529)
    assert error.message.strip()
    assert len(error.message) < 700
    assert orjson.loads(orjson.dumps(error.envelope("req_1")))["error"]["message"] == error.message
    assert all(value.isalnum() for value in error.headers().values())


def test_a_long_message_is_shortened() -> None:
    """An upstream's error may quote a whole prompt; the client gets its beginning."""
    error = refused(400, "invalid_request_error", "x" * 100_000)
    assert len(error.message) == 600


@pytest.mark.parametrize("said", ["", "m"])
def test_a_message_that_says_nothing_gets_a_sentence(said: str) -> None:
    """Whoever reads it knows at least who said it."""
    message = refused(529, "overloaded_error", said).message
    assert "'main'" in message
    assert "529" in message


def test_an_error_that_is_parsed_already() -> None:
    """An error object from within a stream means the same as the same one as a body."""
    said = {"code": 500, "type": "server_error", "message": "Compute error."}
    error = from_upstream_error(500, "server_error", "Compute error.", said, "main")
    assert str(error) == str(refused(500, "server_error", "Compute error."))
