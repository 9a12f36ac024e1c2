"""A gateway that is told to end, or killed, with calls under way and a server of its own."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from tests.e2e.callers import ANSWERED, CUT, CUT_BEFORE, REFUSED, Caller
from tests.e2e.clients import eventually
from tests.e2e.stack import SMOLLM, Running, free_port, run_gateway, start_gateway
from tests.llama.test_launcher import is_gone

Json = Any

figures = logging.getLogger(__name__)

pytestmark = pytest.mark.server

#: Seconds for anything that must come to pass.
PATIENCE: Final = 60


@attrs.define(eq=False)
class Stand:
    """A gateway with a server of its own, of one slot."""

    folder: Path
    gateway: Running
    server_port: int

    @property
    def main(self) -> Json:
        return self.gateway.ask("/status")[1]["tiers"]["main"]

    def until(self, **wanted: Any) -> None:
        """Until the gateway says so of its main tier."""
        assert eventually(lambda: wanted.items() <= self.main.items(), PATIENCE, 0.05), self.main

    def until_ready(self) -> int:
        """The id of the server's process."""
        assert eventually(lambda: self.main["process"]["state"] == "ready", PATIENCE), self.main
        return int(self.main["process"]["pid"])

    def ask(self, words: str, tokens: int = 8, *, stream: bool = True) -> Caller:
        body = {
            "model": "any",
            "max_tokens": tokens,
            "temperature": 0,
            "stream": stream,
            "messages": [{"role": "user", "content": words}],
        }
        return Caller.calling(self.gateway.port, body)

    def a_long_answer(self) -> Caller:
        """One that is in the middle of its answer."""
        caller = self.ask("Tell a long story of an old city and its seven gates.", 300)
        assert caller.spoke.wait(PATIENCE), self.main
        return caller

    def again(self) -> None:
        """Another gateway, as launchd and systemd start it."""
        self.gateway = run_gateway(self.folder, self.gateway.port)


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    port = free_port()
    words = [sys.executable, "-m", "gateway.llama.embedded", *SMOLLM, "--ctx-size", "4096"]
    server = {"command": [*words, "--port", str(port)]}
    main = {"url": f"http://127.0.0.1:{port}", "server": server}
    stand = Stand(tmp_path, start_gateway(tmp_path, {"main": main}), port)
    yield stand
    stand.gateway.stop()


def has_status(caller: Caller) -> bool:
    """Whether the head of its first answer has come."""
    return bool(caller.heads and caller.heads[0])


def is_free(port: int) -> bool:
    """Whether a server could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
        return True


def test_sigterm_with_an_answer_under_way_and_five_in_line(stand: Stand) -> None:
    """The answer comes to its end; the others are told to come again, and are answered then."""
    pid = stand.until_ready()
    running = stand.a_long_answer()
    begun = [stand.ask(f"Hello {number}.") for number in range(2)]
    whole = [stand.ask(f"Hello {number}.", stream=False) for number in range(2, 4)]
    stand.until(waiting=4)
    # After a second those that are streamed have their status, and a ping.
    assert eventually(lambda: all(map(has_status, begun)), PATIENCE, 0.02)
    young = stand.ask("Hello 4.")
    stand.until(waiting=5)
    assert running.saw == []

    began = time.monotonic()
    stand.gateway.process.send_signal(signal.SIGTERM)
    assert stand.gateway.process.wait(PATIENCE) == 0
    figures.info("ended %.1f s after SIGTERM", time.monotonic() - began)
    running.over()
    assert running.saw == [ANSWERED]
    assert is_gone(pid)
    assert is_free(stand.server_port)
    assert not (stand.folder / "main.child").exists()

    stand.again()
    for caller in (*begun, *whole, young):
        caller.over()
    figures.info("%s", [caller.saw for caller in (*begun, *whole, young)])
    # On a busy machine a second may pass before the gateway is told.
    streamed, refused = (begun, [*whole, young])
    if young.heads[0].get("content-type", "").startswith("text/event-stream"):
        streamed, refused = ([*begun, young], whole)
    for caller in refused:
        assert caller.saw[0] == "503"
        assert caller.heads[0]["retry-after"] == "5"
        assert "x-should-retry" not in caller.heads[0]
    for caller in streamed:
        assert caller.saw[0] == CUT_BEFORE
    for caller in (*begun, *whole, young):
        assert set(caller.saw[1:-1]) <= {REFUSED}
        assert caller.saw[-1] == ANSWERED


def test_sigkill_then_start(stand: Stand) -> None:
    """No server is left behind, its port is free, and the next gateway answers whoever called."""
    pid = stand.until_ready()
    running = stand.a_long_answer()
    waiting = stand.ask("Hello.", stream=False)
    stand.until(waiting=1)
    stand.gateway.process.kill()
    stand.gateway.process.wait()
    if sys.platform == "linux":  # elsewhere the next start does it
        assert eventually(lambda: is_gone(pid), PATIENCE)
        assert eventually(lambda: is_free(stand.server_port), PATIENCE)
    began = time.monotonic()
    stand.again()
    another = stand.until_ready()
    figures.info("ready %.1f s after the next start", time.monotonic() - began)
    assert another != pid
    assert is_gone(pid)
    for caller, first in ((running, CUT), (waiting, CUT_BEFORE)):
        caller.over()
        assert caller.saw[0] == first
        assert set(caller.saw[1:-1]) <= {REFUSED}
        assert caller.saw[-1] == ANSWERED
