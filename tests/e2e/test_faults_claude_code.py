"""
A server that is killed under the real Claude Code.

The server is a scripted one, so that the right answer is known; its process and its end are real.
The figures are logged: ``pytest --log-cli-level=INFO`` shows them.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from tests.e2e import scripted_server
from tests.e2e.clients import VERSIONS, Client, eventually
from tests.e2e.scripted_llama import ScriptedLlama, Text
from tests.e2e.stack import Running, free_port, start_gateway

Json = Any

figures = logging.getLogger(__name__)

pytestmark = [pytest.mark.client, pytest.mark.server]

#: Seconds that the server takes for a prompt, and for a token of the answer.
PREFILL: Final = 3.0
PACE: Final = 0.2

#: Seconds for anything that must come to pass.
PATIENCE: Final = 300


@attrs.frozen
class Stand:
    """A gateway with a server of its own."""

    gateway: Running

    @property
    def process(self) -> Json:
        return self.gateway.ask("/status")[1]["tiers"]["main"]["process"]

    @property
    def turn(self) -> Json:
        """The turn that is under way, if its time in the slot has come."""
        calls = self.gateway.ask("/status")[1]["calls"]
        turns = [call for call in calls if call["kind"] == "turn" and call["outcome"] == "running"]
        return turns[0] if turns else None

    def turns(self) -> list[Json]:
        """Those that are over, in the order in which they were."""
        last = self.gateway.ask("/status")[1]["last"]
        return [call for call in reversed(last) if call["kind"] == "turn"]

    def until_it_has_run(self, seconds: float) -> None:
        """Until the turn has had the slot for so long."""

        def has() -> bool:
            turn = self.turn
            return turn is not None and turn["took"] >= seconds

        assert eventually(has, PATIENCE, 0.05), self.gateway.log.read_text()[-3000:]

    def kill(self) -> float:
        """The server, now; the time of it."""
        os.kill(self.process["pid"], signal.SIGKILL)
        return time.monotonic()


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    """Main is a server of the gateway's own, small one that says nothing of interest."""
    folder = tmp_path / "gateway"
    folder.mkdir()
    port = free_port()
    command = scripted_server.command(port, PREFILL, PACE)
    with ScriptedLlama(
        lambda _: [Text("<filepaths>\n</filepaths>")], n_ctx=8192
    ).serving() as small:
        tiers: dict[str, dict[str, Any]] = {
            "main": {"url": f"http://127.0.0.1:{port}", "server": {"command": command}},
            "small": {"url": small.url},
        }
        gateway = start_gateway(folder, tiers)
        try:
            stand = Stand(gateway)
            assert eventually(lambda: stand.process["state"] == "ready", PATIENCE)
            yield stand
        finally:
            gateway.stop()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("stage", ["in prefill", "mid-stream"])
def test_a_server_is_killed(version: str, stage: str, stand: Stand, tmp_path: Path) -> None:
    """The turn ends with the right answer, and the user sees it once and nothing else."""
    client = Client.of(version, stand.gateway, tmp_path)
    with client.session() as session:
        session.type("How many gates are there?")
        stand.until_it_has_run(PREFILL / 3 if stage == "in prefill" else PREFILL + 5 * PACE)
        killed = stand.kill()

        def is_over() -> bool:
            answered = [turn for turn in stand.turns() if turn["outcome"] == "answered"]
            return bool(answered) and "esc to interrupt" not in session.screen

        assert eventually(is_over, PATIENCE), session.screen
        figures.info("%s, %s: over %.1f s later", version, stage, time.monotonic() - killed)
        session.wait_for(lambda screen: scripted_server.ANSWER in screen)
        screen = session.screen
    assert screen.count("There are") == 1, screen
    assert "Error" not in screen, screen
    assert stand.process["restarts"] == 1
    turns = [(turn["outcome"], turn["resent"]) for turn in stand.turns()]
    if stage == "in prefill":
        # The gateway sent it again beneath the same answer; the client never knew.
        assert turns == [("answered", 1)]
    else:
        # The answer was cut off, and the client asked again.
        assert turns == [("broken: api_error", 0), ("answered", 0)]
