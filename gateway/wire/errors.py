"""
Everything that can be wrong with a call, as one exception and one table.

`ApiError` is the only exception that is meant for a client.  `STATUSES` is the one place where a
kind of error meets an HTTP status.  The wording of a context overflow matters: Claude Code
compacts the conversation when it reads ``prompt is too long: N tokens > M maximum``, and gives up
on any other (docs/protocol.md, "Errors").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs
import orjson

#: Kind of error -> HTTP status, as the Messages API has them; 502 and 503 are a gateway's own.
STATUSES: Final[Mapping[str, int]] = {
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

_LONGEST_MESSAGE = 600

#: Letters of a server's message with which nobody can do anything.
_SHORTEST_MESSAGE = 10


@attrs.frozen(auto_exc=True)
class ApiError(Exception):
    """
    A call that cannot be answered, said in a way that a client understands.

    Attributes:
        kind: one of `STATUSES`.
        message: a sentence that a person can act on.
        status: the HTTP status, where it is not the usual one of its kind.
        retry_after: seconds after which trying again makes sense.
        should_retry: False tells the Anthropic SDKs and Claude Code not to try again, True to do
            so; None leaves it to the status.
    """

    kind: str
    message: str
    status: int = attrs.field(kw_only=True)
    retry_after: int | None = attrs.field(default=None, kw_only=True)
    should_retry: bool | None = attrs.field(default=None, kw_only=True)

    @status.default
    def _usual_status(self) -> int:
        return STATUSES[self.kind]

    def __str__(self) -> str:
        return f"{self.status} {self.kind}: {self.message}"

    @property
    def is_transient(self) -> bool:
        """Whether the same call may well succeed a little later."""
        return self.status >= 500 and self.should_retry is not False

    def envelope(self, request_id: str) -> dict[str, Any]:
        """The body, as the Messages API wraps it."""
        return {
            "type": "error",
            "error": {"type": self.kind, "message": self.message},
            "request_id": request_id,
        }

    def headers(self) -> dict[str, str]:
        """The headers that go with it (the `request-id` is the answer's own)."""
        found = {}
        if self.retry_after is not None:
            found["retry-after"] = str(self.retry_after)
        if self.should_retry is not None:
            found["x-should-retry"] = "true" if self.should_retry else "false"
        return found


def invalid(message: str) -> ApiError:
    """The request itself is wrong: 400."""
    return ApiError("invalid_request_error", message)


def prompt_too_long(tokens: int, window: int) -> ApiError:
    """
    The prompt of `tokens` tokens does not fit a context of `window` tokens.

    llama-server needs one free place for the answer, so the longest prompt is ``window - 1``.
    """
    return invalid(f"prompt is too long: {tokens} tokens > {window - 1} maximum")


@attrs.frozen(auto_exc=True)
class Unavailable(ApiError):
    """The model's server is down or loading, and the same call will do once it is up."""


def unavailable(message: str) -> Unavailable:
    """The model's server is down or loading: 503, to be tried again, by us if that makes sense."""
    return Unavailable("api_error", message, status=503, retry_after=5)


def stopping() -> ApiError:
    """The gateway is on its way out: 503, to be tried again by the client."""
    return down("The gateway is stopping; try again.")


def down(message: str, *, should_retry: bool | None = None) -> ApiError:
    """Nobody is there to answer, however long one waits here: 503."""
    soon = None if should_retry is False else 5
    return ApiError("api_error", message, status=503, retry_after=soon, should_retry=should_retry)


def poisonous(message: str) -> ApiError:
    """The call itself ends the model's server: 500, never to be tried again."""
    return ApiError("api_error", message, should_retry=False)


def overloaded(message: str, retry_after: int) -> ApiError:
    """There is no more room in a line: 529, to be tried again after `retry_after` seconds."""
    return ApiError("overloaded_error", message, retry_after=retry_after)


def from_upstream(status: int, body: bytes, tier: str) -> ApiError:
    """
    What llama-server's refusal means to our client.

    llama-server says ``{"error": {"code", "message", "type"}}`` whatever the endpoint
    (llama.cpp `tools/server/server-common.cpp`, `format_error_response`).

    Args:
        status: the upstream's HTTP status.
        body: its body, of any shape.
        tier: the name of the tier, for the sentence.
    """
    try:
        error = orjson.loads(body)["error"]
        kind, message = str(error["type"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        error, kind, message = {}, "", ""
    return from_upstream_error(status, kind, message, error, tier)


def from_upstream_error(
    status: int, kind: str, message: str, error: Mapping[str, Any], tier: str
) -> ApiError:
    """As `from_upstream`, from an error object that is already parsed (an SSE ``error`` event)."""
    said = message[:_LONGEST_MESSAGE]
    if len(said) < _SHORTEST_MESSAGE:
        no_more = f"no more than {said!r}" if said else "nothing"
        said = f"The model server of tier {tier!r} says {no_more} (HTTP status {status})."
    if kind == "exceed_context_size_error":
        tokens, window = error.get("n_prompt_tokens"), error.get("n_ctx")
        if isinstance(tokens, int) and isinstance(window, int):
            return prompt_too_long(tokens, window)
        return invalid("Prompt is too long")
    if status in (429, 529):
        return ApiError(kind if kind in STATUSES else "overloaded_error", said, status=status)
    if "image input is not supported" in message:
        return invalid(f"The model of tier {tier!r} takes no images.")
    if status == 503:
        return unavailable(f"The model of tier {tier!r} is not ready: {said}")
    if status in (401, 403):
        return ApiError(
            "api_error",
            f"The model server of tier {tier!r} refused the gateway's key;"
            f" set api_key in [tier.{tier}].",
            status=502,
            should_retry=False,
        )
    if status in (404, 405):
        return ApiError(
            "api_error",
            f"The server of tier {tier!r} has no such endpoint: is it a llama-server of"
            " build 11434 or newer?",
            status=502,
            should_retry=False,
        )
    if status == 501 or 400 <= status < 500:
        return invalid(said)
    return ApiError("api_error", f"The model server of tier {tier!r} failed: {said}")
