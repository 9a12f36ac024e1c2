"""
A client that does not give up: it sends a call again as Claude Code does, and judges the answer.

What Claude Code does (docs/protocol.md, "Errors"): it sends a call up to ten times more, after
0.5 s, 1 s, 2 s and so on, when the status says that this may help, when the connection breaks, or
when the stream says ``overloaded_error``.  On any other error in a stream it sends the call again
without one.  ``retry-after`` and ``x-should-retry`` go before all that.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from http.client import HTTPConnection, HTTPException
from typing import Any, Final

import attrs
import orjson

from gateway.wire.sse import SSEParser

Json = Any

#: How often a call is sent again, and the longest pause before that, in seconds.
MOST: Final = 10
LONGEST_PAUSE: Final = 32.0

#: Seconds without a byte after which a connection counts as broken.
SILENCE: Final = 300.0


class Outcome(Enum):
    """What became of a call."""

    RIGHT = "answered"
    LEFT = "left by their client"
    DONE_WITHOUT = "refused for good, and done without"
    LOST = "lost"


@attrs.frozen
class Call:
    """
    What a client asks.

    Attributes:
        kind: what it is, in words.
        body: of the request; None for a GET.
        path: where it goes.
        headers: those of another client; None for those that it has anyway.
        reads: what a stream says; None for `told`.
        fault: what is wrong with an answer; "" if nothing is.
        is_dispensable: whether the client does without the answer where it is refused for good.
        leaves: seconds after which the client goes away; None for never.
    """

    kind: str
    body: Json
    path: str = "/v1/messages"
    headers: Mapping[str, str] | None = None
    reads: Callable[[bytes], Json] | None = None
    fault: Callable[[Json], str] = lambda _: ""
    is_dispensable: bool = False
    leaves: float | None = None


@attrs.frozen
class Ended:
    """
    What became of a call.

    Attributes:
        call: the call.
        outcome: what became of it.
        again: why it was sent again, each time.
        seconds: from its first sending to its end.
        why: what is wrong, where something is.
        answer: the answer, where it is right.
    """

    call: Call
    outcome: Outcome
    again: tuple[str, ...]
    seconds: float
    why: str = ""
    answer: Json = None


class Again(Exception):
    """
    The call is to be sent again.

    Attributes:
        after: seconds that the gateway wants it to wait; None if it says nothing.
        whole: it is to be sent without a stream.
    """

    def __init__(self, why: str, after: float | None = None, *, whole: bool = False) -> None:
        super().__init__(why)
        self.after, self.whole = after, whole


class Refused(Exception):
    """The call is refused for good."""


class Wrong(Exception):
    """The answer makes no sense."""


class _Left(Exception):
    """The client has gone away."""


def ask(
    port: int,
    headers: Mapping[str, str],
    call: Call,
    again: Callable[[], None] = lambda: None,
    kept: HTTPConnection | None = None,
) -> Ended:
    """
    Ask until there is an answer, as often as Claude Code does.

    Args:
        port: of the gateway.
        headers: what the client sends with every call.
        call: what is asked.
        again: told of each time that it is sent again.
        kept: a connection that is kept alive for the next call; None for a new one each time.
    """
    began = time.monotonic()
    until = None if call.leaves is None else began + call.leaves
    body, reasons = call.body, list[str]()

    def ended(outcome: Outcome, why: str = "", answer: Json = None) -> Ended:
        return Ended(call, outcome, tuple(reasons), time.monotonic() - began, why, answer)

    for sent in itertools.count():
        try:
            asking = kept or HTTPConnection("127.0.0.1", port, timeout=SILENCE)
            asked = attrs.evolve(call, body=body)
            answer = _once(asking, asked, headers, until, keeps=kept is not None)
            fault = call.fault(answer)
        except _Left:
            return ended(Outcome.LEFT)
        except Refused as refused:
            spared = call.is_dispensable and str(refused).startswith("503 ")
            return ended(Outcome.DONE_WITHOUT if spared else Outcome.LOST, str(refused))
        except (Wrong, LookupError, TypeError, ValueError, AttributeError) as wrong:
            return ended(Outcome.LOST, f"wrong: {wrong!r}")
        except Again as wanted:
            if sent == MOST:
                return ended(Outcome.LOST, f"sent {sent} times again: {wanted}")
            reasons.append(str(wanted))
            again()
            if wanted.whole:
                body = {**body, "stream": False}
            pause = min(0.5 * 2**sent, LONGEST_PAUSE) if wanted.after is None else wanted.after
            if until is not None and time.monotonic() + pause > until:
                return ended(Outcome.LEFT)
            time.sleep(pause)
        else:
            return ended(Outcome.LOST if fault else Outcome.RIGHT, fault, answer)
    raise AssertionError


def _once(
    connection: HTTPConnection,
    call: Call,
    headers: Mapping[str, str],
    until: float | None,
    *,
    keeps: bool,
) -> Json:
    """The answer, if there is one; raises Again, Refused, Wrong or _Left."""
    raw, answer, is_kept = b"", None, False
    body = None if call.body is None else orjson.dumps(call.body)
    try:
        if connection.sock is None:
            connection.connect()
        socket = connection.sock

        def be_patient() -> None:
            left = SILENCE if until is None else until - time.monotonic()
            socket.settimeout(max(0.001, min(left, SILENCE)))

        be_patient()
        method = "GET" if body is None else "POST"
        sent = headers if call.headers is None else call.headers
        connection.request(method, call.path, body, dict(sent))
        answer = connection.getresponse()
        be_patient()
        while chunk := answer.read1():
            raw += chunk
            be_patient()
        is_kept = keeps
    except (OSError, HTTPException) as error:
        if until is not None and time.monotonic() >= until:
            raise _Left from None
        if answer is None or answer.status != 200 or not (call.body or {}).get("stream"):
            raise Again(f"broken: {type(error).__name__}") from None
    finally:
        if not is_kept:
            connection.close()
    return understood(answer.status, dict(answer.headers), raw, call.reads)


def understood(
    status: int,
    headers: Mapping[str, str],
    raw: bytes,
    reads: Callable[[bytes], Json] | None = None,
) -> Json:
    """
    What a whole answer says; `reads`, or `told`, says it of a stream.

    Raises:
        Again, Refused: it is none.
        Wrong: it makes no sense.
    """
    said = {name.lower(): value for name, value in headers.items()}
    if status != 200:
        may_help = status in (408, 409, 429) or status >= 500
        wanted = said.get("x-should-retry", "true" if may_help else "false")
        why = f"{status} {raw[:300].decode('utf-8', 'replace')}"
        if wanted == "false":
            raise Refused(why)
        raise Again(why, float(said["retry-after"]) if "retry-after" in said else None)
    if said.get("content-type", "").startswith("text/event-stream"):
        return (reads or told)(raw)
    try:
        return orjson.loads(raw)
    except ValueError:
        raise Again(f"{len(raw)} bytes that are no JSON") from None


def told(raw: bytes) -> Json:
    """
    The message that a stream tells.

    Raises:
        Again: it ends too soon, or says an error.
        Wrong: its events are not in the order that the Messages API has.
    """
    message: Json = None
    is_open = False
    for event in _events(raw):
        match event["type"]:
            case "ping":
                pass
            case "error":
                error = event["error"]
                whole = error["type"] != "overloaded_error"
                raise Again(f"in the stream: {error['type']}: {error['message']}", whole=whole)
            case "message_start" if message is None:
                message = event["message"]
            case "content_block_start" if message and not is_open:
                is_open = True
                if event["index"] != len(message["content"]):
                    raise Wrong(f"block {event['index']} after {len(message['content'])}")
                message["content"].append(event["content_block"])
            case "content_block_delta" if is_open:
                block, delta = message["content"][-1], event["delta"]
                if delta["type"] == "text_delta":
                    block["text"] += delta["text"]
            case "content_block_stop" if is_open:
                is_open = False
            case "message_delta" if message and not is_open:
                message["usage"] |= event.get("usage") or {}
                message |= event["delta"]
            case "message_stop" if message and not is_open and message["stop_reason"]:
                return message
            case other:
                raise Wrong(f"{other} out of order")
    raise Again("the stream ended before the message did")


def told_in_chunks(raw: bytes) -> Json:
    """
    The text, and why it ended, that a stream of OpenAI's API tells.

    Raises:
        Again: it ends too soon, or says an error.
    """
    text, reason = "", None
    for _, data in SSEParser().feed(raw):
        if data == b"[DONE]":
            if reason is None:
                break
            return {"text": text, "reason": reason}
        chunk = orjson.loads(data)
        if "error" in chunk:
            raise Again(f"in the stream: {chunk['error']}", whole=True)
        for choice in chunk["choices"]:
            text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            reason = choice["finish_reason"] or reason
    raise Again("the stream ended before the answer did")


def _events(raw: bytes) -> Iterator[Json]:
    for name, data in SSEParser().feed(raw):
        event = orjson.loads(data)
        if event["type"] != name:
            raise Wrong(f"{event['type']} in an event {name}")
        yield event
