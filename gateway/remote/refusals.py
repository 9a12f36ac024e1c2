"""What the refusals of servers elsewhere mean to our clients; values in, values out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import orjson

from gateway.wire.errors import STATUSES, ApiError, invalid, prompt_too_long, unavailable

Json = Any

_LONGEST_MESSAGE: Final = 600

#: Status -> kind, of what the Messages API has; a chat server's own words name none of them.
_KINDS: Final = {status: kind for kind, status in STATUSES.items()}

#: How chat servers say that a prompt is too long (vLLM, SGLang, OpenAI), and what of it is what.
_OVERFLOW: Final = re.compile(
    r"context length|context window|context size|context_length|too long", re.IGNORECASE
)
_TOKENS: Final = r"(?<!\d)(\d{1,12})(?!\d)"
_WINDOW: Final = re.compile(
    rf"(?:context (?:length|window|size)|model length)\D{{0,30}}?{_TOKENS}", re.IGNORECASE
)
_PROMPT: Final = re.compile(
    rf"{_TOKENS} (?:input tokens|(?:tokens )?(?:in|from) the (?:messages|input|prompt))",
    re.IGNORECASE,
)
_ANSWER: Final = re.compile(rf"{_TOKENS} (?:output tokens|in the completion)", re.IGNORECASE)


def read(status: int, body: bytes, header: Callable[[str], str], tier: str) -> ApiError:
    """
    The error that a client is told.

    Args:
        status: the server's HTTP status, not 200.
        body: its answer, of any shape.
        header: gives its header of a name, or "".
        tier: the name of the tier, for the sentence.
    """
    kind, message, error = _said(body)
    said = message[:_LONGEST_MESSAGE] or f"HTTP status {status}"
    wait = _seconds(header("retry-after"))
    if 300 <= status < 400:
        return _settled(f"The server of tier {tier!r} lives elsewhere; set url in [tier.{tier}].")
    if not 400 <= status < 600:
        return _settled(
            f"The server of tier {tier!r} answers with HTTP status {status}, which means neither"
            f" an answer nor an error; look at url and kind in [tier.{tier}]."
        )
    if status in (401, 403):  # its words may hold a part of the key
        return _settled(
            f"The server of tier {tier!r} refuses the gateway's key ({status});"
            f" look at api_key_env in [tier.{tier}]."
        )
    if status in (404, 405):
        return _settled(
            f"The server of tier {tier!r} has no such model or endpoint ({said});"
            f" look at url, kind and model in [tier.{tier}]."
        )
    if status == 503 and not wait:
        return unavailable(f"The server of tier {tier!r} is not ready: {said}")
    if status in (400, 413, 422) and (overflow := _overflow(message, error)):
        return overflow
    named = _KINDS.get(status) or (kind if kind.endswith("_error") and status < 500 else "")
    by_range = "invalid_request_error" if 400 <= status < 500 else "api_error"
    again = {"true": True, "false": False}.get(header("x-should-retry"))
    from_there = header("request-id") or header("x-request-id")
    if status >= 429:  # what is wrong with the request is the client's own business
        told = f", request-id {from_there[:100]}" if from_there else ""
        said = f"The server of tier {tier!r} says: {said} (HTTP status {status}{told})"
    if named in STATUSES and STATUSES[named] == status:
        return ApiError(named, said, retry_after=wait, should_retry=again)
    return ApiError(named or by_range, said, status=status, retry_after=wait, should_retry=again)


def _said(body: bytes) -> tuple[str, str, dict[str, Json]]:
    """Kind, message and the whole error object, whichever of the usual shapes it has."""
    try:
        said = orjson.loads(body)
    except ValueError:
        return "", "", {}
    if not isinstance(said, dict):
        return "", "", {}
    error = said.get("error") or said.get("detail") or said
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        return "", "", {}
    return str(error.get("type") or ""), str(error.get("message") or ""), error


def _overflow(message: str, error: dict[str, Json]) -> ApiError | None:
    """The overflow that a server speaks of, in the words on which Claude Code acts."""
    tokens, window = error.get("n_prompt_tokens"), error.get("n_ctx")
    if isinstance(tokens, int) and isinstance(window, int):
        return prompt_too_long(tokens, window)
    if message.lower().startswith("prompt is too long") or not _OVERFLOW.search(message):
        return None
    known = _WINDOW.search(message)
    asked, wanted = _PROMPT.search(message), _ANSWER.search(message)
    if known is None or asked is None:
        return invalid("Prompt is too long")
    limit, prompt = int(known[1]), int(asked[1])
    if prompt >= limit:
        return prompt_too_long(prompt, limit)
    if wanted is None:
        return None
    return invalid(
        f"input length and `max_tokens` exceed context limit: {prompt} + {wanted[1]} > {limit},"
        " decrease input length or `max_tokens` and try again"
    )


def _settled(message: str) -> ApiError:
    """Trying again changes nothing; somebody has to change something here."""
    return ApiError("api_error", message, status=502, should_retry=False)


def _seconds(text: str) -> int | None:
    """Of a ``retry-after``; one that is a date says nothing here."""
    try:
        return max(0, round(float(text)))
    except (ValueError, OverflowError):
        return None
