"""
Calls that come while a server loads.

The small server is one that takes a minute to come; it is the gateway's own child, so that before
it listens nobody answers, and then it loads.  Every call is answered, and none is sent twice.
"""

from __future__ import annotations

import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import orjson
import pytest

from tests.e2e.stack import SMOLLM, Running, free_port, start_gateway

Json = Any

figures = logging.getLogger(__name__)

pytestmark = pytest.mark.server

#: Seconds before the server is even started.
SLEEP: Final = 60

#: Seconds after the gateway's start at which calls come.
ARRIVALS: Final = (0, 1, 15, 30, 45, 59)


def a_late_server(port: int) -> str:
    """The part of a configuration that starts a server after a minute."""
    command = [sys.executable, "-m", "gateway.llama.embedded", "--port", str(port), *SMOLLM]
    late = f"import os, time; time.sleep({SLEEP}); os.execv({command[0]!r}, {command!r})"
    command = [sys.executable, "-c", late]
    return f"\n\n[tier.main.server]\ncommand = {orjson.dumps(command).decode()}"


def ask(gateway: Running, began: float, at: float, *, stream: bool) -> tuple[float, str]:
    """Ask at a time; when the answer was there, and what it was."""
    time.sleep(max(0, began + at - time.monotonic()))
    body = {
        "model": "any",
        "max_tokens": 5,
        "stream": stream,
        "messages": [{"role": "user", "content": f"Hello, it is {at}."}],
    }
    if not stream:
        status, answer = gateway.ask("/v1/messages", body)
        assert status == 200, answer
        return time.monotonic() - began, str(answer["stop_reason"])
    status, raw = gateway.ask_raw("/v1/messages", body)
    assert status == 200, raw
    return time.monotonic() - began, stop_reason(raw)


def stop_reason(raw: bytes) -> str:
    """How a stream of ours ended."""
    events = [orjson.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: ")]
    (ending,) = [event for event in events if event["type"] == "message_delta"]
    assert events[-1]["type"] == "message_stop"
    assert sum(event["type"] == "message_start" for event in events) == 1
    return str(ending["delta"]["stop_reason"])


def test_calls_wait_for_a_server_that_takes_a_minute(tmp_path: Path) -> None:
    """Streams and others, from the first second on: each is answered once."""
    port = free_port()
    main = {"url": f"http://127.0.0.1:{port}", "slots": 1}
    began = time.monotonic()  # before the minute does
    gateway = start_gateway(tmp_path, {"main": main}, a_late_server(port))
    try:
        with ThreadPoolExecutor(2 * len(ARRIVALS)) as pool:
            calls = [
                pool.submit(ask, gateway, began, at, stream=stream)
                for at in ARRIVALS
                for stream in (True, False)
            ]
            answers = [call.result() for call in calls]
        figures.info("answered after %s s", [round(after, 1) for after, _ in answers])
        last = gateway.ask("/status")[1]["last"]
    finally:
        gateway.stop()
    assert all(after > SLEEP for after, _ in answers)
    assert {reason for _, reason in answers} <= {"end_turn", "max_tokens"}
    assert [call["outcome"] for call in last] == ["answered"] * len(calls)
