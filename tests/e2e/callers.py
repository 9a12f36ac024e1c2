"""
Calls of a client that does not give up: what each of its tries saw.

It tries again where the Anthropic SDKs and Claude Code do (docs/protocol.md, "Errors"): refused,
cut off, a status of 5xx or 429 without ``x-should-retry: false``, an error in the stream: after
``overloaded_error`` as before, after any other without a stream.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse
from threading import Event, Thread
from typing import Any, Final

import attrs
import orjson

Json = Any

#: How often Claude Code tries, and the longest pause between two tries here, in seconds.
TRIES: Final = 11
PAUSE: Final = 4.0

ANSWERED: Final = "answered"
CUT: Final = "cut after content"
CUT_BEFORE: Final = "cut before content"
REFUSED: Final = "refused"
OVERLOADED: Final = "overloaded_error"
LEFT: Final = "left"


@attrs.define(eq=False)
class Caller:
    """
    One call, and its tries.

    Attributes:
        port: of the gateway.
        body: what is asked for; streamed if it says so.
        saw: what came of each try so far.
        heads: the headers that came with each try, names in lower case.
        text: what the last try said.
        spoke: set once content has come.
        is_lost: the client gave up.
    """

    port: int
    body: Mapping[str, Json]
    saw: list[str] = attrs.field(factory=list, init=False)
    heads: list[dict[str, str]] = attrs.field(factory=list, init=False)
    text: str = attrs.field(default="", init=False)
    spoke: Event = attrs.field(factory=Event, init=False)
    is_lost: bool = attrs.field(default=False, init=False)
    _left: bool = attrs.field(default=False, init=False)
    _connection: HTTPConnection | None = attrs.field(default=None, init=False)
    _calling: Thread = attrs.field(init=False)

    @classmethod
    def calling(cls, port: int, body: Mapping[str, Json]) -> Caller:
        """One whose first try is on its way."""
        self = cls(port, body)
        self._calling = Thread(target=self._call, daemon=True)
        self._calling.start()
        return self

    @property
    def headers(self) -> dict[str, str]:
        """Those of the last try."""
        return self.heads[-1]

    def over(self, seconds: float = 120) -> Caller:
        """Wait until it is answered, or given up."""
        self._calling.join(seconds)
        if self._calling.is_alive():
            raise AssertionError(f"no end after {seconds} s: {self.saw}")
        return self

    def leave(self) -> None:
        """Close the connection, and do not come again."""
        self._left = True
        connection = self._connection
        if connection is not None and connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)
        self.over()

    def _call(self) -> None:
        for number in range(TRIES):
            if number:
                time.sleep(min(0.5 * 2 ** (number - 1), PAUSE))
            self.saw.append(self._try())
            if self.saw[-1] == ANSWERED or self._left:
                return
            if self.saw[-1].endswith("_error") and self.saw[-1] != OVERLOADED:
                self.body = {**self.body, "stream": False}
            if self.headers.get("x-should-retry") == "false":
                break
        self.is_lost = True

    def _try(self) -> str:
        self.text = ""
        self.heads.append({})
        connection = self._connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            raw = orjson.dumps(self.body)
            connection.request("POST", "/v1/messages", raw, {"content-type": "application/json"})
            answer = connection.getresponse()
            self.heads[-1] = {name.lower(): value for name, value in answer.getheaders()}
            if answer.status != 200:
                answer.read()
                return str(answer.status)
            return self._read(answer) if self.body.get("stream") else self._read_whole(answer)
        except ConnectionRefusedError:
            return REFUSED
        except (OSError, HTTPException):
            return LEFT if self._left else CUT if self.text else CUT_BEFORE
        finally:
            connection.close()

    def _read_whole(self, answer: HTTPResponse) -> str:
        message = orjson.loads(answer.read())
        self.text = "".join(block["text"] for block in message["content"])
        return ANSWERED

    def _read(self, answer: HTTPResponse) -> str:
        """A stream; asserts that it is one message."""
        kinds: list[str] = []
        # `readline` takes what is cut for what has ended, `read1` does not.
        rest = b""
        while data := answer.read1():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: "):
                    continue
                event = orjson.loads(line[6:])
                kinds.append(event["type"])
                if event["type"] == "error":
                    return str(event["error"]["type"])
                if event["type"] == "content_block_delta":
                    self.text += event["delta"].get("text", "")
                    self.spoke.set()
        if not kinds or kinds[-1] != "message_stop":
            return CUT if self.text else CUT_BEFORE
        assert kinds.count("message_start") == 1, kinds
        return ANSWERED
