"""SIGHUP while clients call without a pause: what changes, what does not, and no call is lost."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final

import attrs
import psutil
import pytest

from tests.e2e import scripted_server
from tests.e2e.callers import ANSWERED, Caller
from tests.e2e.clients import eventually
from tests.e2e.stack import SMOLLM, Running, configure, free_port, start_gateway

Json = Any

figures = logging.getLogger(__name__)

pytestmark = pytest.mark.server

#: Seconds for anything that must come to pass.
PATIENCE: Final = 60

#: What each client asks for.
MODELS: Final = ("any", "any", "claudegw-small", "claudegw-vision")

SPECIAL: Final = '\n\n[[route]]\nmodel = "special"\ntier = "small"\n'


def embedded(port: int, *flags: str) -> dict[str, Any]:
    """A tier whose server is ours."""
    words = [sys.executable, "-m", "gateway.llama.embedded", *SMOLLM, "--ctx-size", "4096"]
    server = {"command": [*words, "--port", str(port), *flags]}
    return {"url": f"http://127.0.0.1:{port}", "server": server}


@attrs.define(eq=False)
class Load:
    """
    Clients that call without a pause, while `calling` is on.

    Attributes:
        calls: all that there were.
    """

    port: int
    calls: list[Caller] = attrs.field(factory=list)
    _enough: Event = attrs.field(factory=Event, init=False)
    _clients: list[Thread] = attrs.field(factory=list, init=False)

    def start(self) -> None:
        for number, model in enumerate(MODELS):
            client = Thread(target=self._call, args=(number, model), daemon=True)
            client.start()
            self._clients.append(client)

    def stop(self) -> None:
        self._enough.set()
        for client in self._clients:
            client.join(PATIENCE)

    def _call(self, number: int, model: str) -> None:
        turn = 0
        while not self._enough.is_set():
            turn += 1
            words = f"I am client {number}, this is turn {turn}. Say hello."
            body = {
                "model": model,
                "max_tokens": 8,
                "stream": turn % 2 == 0,
                "messages": [{"role": "user", "content": words}],
            }
            caller = Caller.calling(self.port, body)
            self.calls.append(caller)
            caller.over()


@attrs.define(eq=False)
class Stand:
    """A gateway with servers of its own, under load."""

    folder: Path
    gateway: Running
    load: Load

    @property
    def tiers(self) -> Json:
        return self.gateway.ask("/status")[1]["tiers"]

    @property
    def log(self) -> str:
        return self.gateway.log.read_text()

    def pid(self, tier: str) -> int:
        return int(self.tiers[tier]["process"]["pid"])

    def until_ready(self, *tiers: str) -> None:
        def ready() -> bool:
            found = self.tiers
            return all(found[name]["process"]["state"] == "ready" for name in tiers)

        assert eventually(ready, PATIENCE), self.log[-3000:]

    def reads(self, tiers: dict[str, Any], more: str = "", *, says: str = "reloaded") -> None:
        """SIGHUP, with this configuration, until the log says what came of it."""
        before = self.log.count(says)
        configure(self.folder, self.gateway.port, tiers, more)
        self.gateway.process.send_signal(signal.SIGHUP)
        assert eventually(lambda: self.log.count(says) > before, PATIENCE), self.log[-3000:]
        self.go_on()

    def go_on(self) -> None:
        """Until the clients have asked some more."""
        wanted = len(self.load.calls) + len(MODELS)
        assert eventually(lambda: len(self.load.calls) >= wanted, PATIENCE), self.log[-3000:]

    def place(self, model: str) -> str:
        """The tier that answers calls of this name."""
        content = [{"role": "user", "content": "Say hello."}]
        body = {"model": model, "max_tokens": 4, "messages": content}
        caller = Caller.calling(self.gateway.port, body).over()
        assert caller.saw == [ANSWERED]
        return caller.headers["x-claudegw-tier"]


@pytest.fixture
def main() -> dict[str, Any]:
    return embedded(free_port())


@pytest.fixture
def small() -> dict[str, Any]:
    return embedded(free_port())


@pytest.fixture
def stand(tmp_path: Path, main: dict[str, Any], small: dict[str, Any]) -> Iterator[Stand]:
    """Two tiers, whose servers are up, and four clients."""
    gateway = start_gateway(tmp_path, {"main": main, "small": small})
    load = Load(gateway.port)
    stand = Stand(tmp_path, gateway, load)
    try:
        stand.until_ready("main", "small")
        load.start()
        stand.go_on()
        yield stand
    finally:
        load.stop()
        gateway.stop()


def test_sighup_under_load(stand: Stand, main: dict[str, Any], small: dict[str, Any]) -> None:
    """Each change takes effect where it should, and every call has its answer."""
    pids = {name: stand.pid(name) for name in ("main", "small")}

    # A valid file: bounds and times.
    stand.reads({"main": {**main, "max_waiting": 20, "stall": 60}, "small": small})
    assert {name: stand.pid(name) for name in pids} == pids

    # An invalid one: all stays as it was, and the log says why.
    stand.reads({"main": {**main, "slots": 0}, "small": small}, SPECIAL, says="all stays as it was")
    assert "tier.main.slots: expected between 1 and 256, got 0" in stand.log
    assert {name: stand.pid(name) for name in pids} == pids
    assert stand.place("special") == "main"

    # A route.
    stand.reads({"main": main, "small": small}, SPECIAL)
    assert stand.place("special") == "small"

    # A server's command: that one alone is started anew.
    port = int(small["url"].rpartition(":")[2])
    small = embedded(port, "--alias", "renamed")
    stand.reads({"main": main, "small": small}, SPECIAL)
    assert eventually(lambda: stand.tiers["small"]["process"]["pid"] != pids["small"], PATIENCE)
    stand.until_ready("small")
    assert "renamed" in psutil.Process(stand.pid("small")).cmdline()
    assert not psutil.pid_exists(pids["small"])
    assert stand.pid("main") == pids["main"]
    assert stand.tiers["small"]["process"]["restarts"] == 0
    assert stand.place("claudegw-small") == "small"
    assert stand.tiers["small"]["server"]["alias"] == "renamed"

    # A tier that comes, with its server, and goes again.
    vision_port = free_port()
    server = {"command": scripted_server.command(vision_port)}
    vision = {"url": f"http://127.0.0.1:{vision_port}", "server": server}
    assert stand.place("claudegw-vision") == "main"
    stand.reads({"main": main, "small": small, "vision": vision}, SPECIAL)
    stand.until_ready("vision")
    assert stand.place("claudegw-vision") == "vision"
    stand.go_on()
    gone = stand.pid("vision")
    stand.reads({"main": main, "small": small}, SPECIAL)
    assert eventually(lambda: "tier vision: removed" in stand.log, PATIENCE)
    assert not psutil.pid_exists(gone)
    assert stand.place("claudegw-vision") == "main"

    stand.go_on()
    stand.load.stop()
    calls = stand.load.calls
    again = [call.saw for call in calls if call.saw != [ANSWERED]]
    figures.info("%d calls, %d of them asked for more than once: %s", len(calls), len(again), again)
    assert [call for call in calls if call.is_lost or call.saw[-1] != ANSWERED] == []
    assert stand.pid("main") == pids["main"]
    assert stand.gateway.ask("/status")[1]["calls"] == []
