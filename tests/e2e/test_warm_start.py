"""A gateway that keeps what its server's slot holds: what comes back after each kind of end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import orjson
import pytest

from tests.e2e.recorder import Heard, Recorder
from tests.e2e.stack import GLM_ORDER, SMOLLM, Running, free_port, start_gateway
from tests.e2e.test_snapshots import body

Json = Any

pytestmark = pytest.mark.server

#: Some two thousand tokens whose answer no model is in doubt of.
ASKED = body(165)


@attrs.define(eq=False)
class House:
    """A gateway with a server of its own, and somebody between them."""

    folder: Path
    between: Recorder
    gateway: Running = attrs.field(init=False)

    def begin(self) -> None:
        command = [
            *("python", "-m", "gateway.llama.embedded", *SMOLLM, *GLM_ORDER, "--threads", "2"),
            *("--port", str(self.between.behind), "--ctx-size", "8192"),
        ]
        main = {
            "url": f"http://127.0.0.1:{self.between.port}",
            "slots": 1,
            "snapshot_idle": 0.5,
            "snapshot_min_tokens": 500,
        }
        server = f"\n\n[tier.main.server]\ncommand = {orjson.dumps(command).decode()}\n"
        self.gateway = start_gateway(self.folder, {"main": main}, server)

    def at_first(self, word: str, then: Callable[[], None]) -> None:
        """Do this when such a path is asked for the first time, before the server hears of it."""
        pending = [then]

        def before(heard: Heard) -> bool:
            if word in heard.path and pending:
                pending.pop()()
            return True

        self.between.before = before

    def ask(self) -> tuple[str, int, int]:
        """What is answered, the tokens that were evaluated, and those that were cached."""
        status, message = self.gateway.ask("/v1/messages", {**ASKED, "model": "m"})
        assert status == 200, message
        usage = message["usage"]
        text = "".join(block["text"] for block in message["content"])
        return text, usage["input_tokens"], usage["cache_read_input_tokens"]

    @property
    def main(self) -> Json:
        return self.gateway.ask("/status")[1]["tiers"]["main"]

    @property
    def pid(self) -> int:
        return int(self.main["process"]["pid"])

    def until(self, holds: Callable[[Json], bool]) -> None:
        """Until the main tier is as wanted."""
        end = time.monotonic() + 300
        while not holds(self.main):
            assert time.monotonic() < end, self.main
            time.sleep(0.1)

    def until_saved(self) -> None:
        self.until(lambda main: main["cache"]["snapshots"] == 1)

    def files(self) -> list[str]:
        return sorted(path.suffix for path in (self.folder / "slots").iterdir())


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with Recorder(free_port()).listening() as between:
        house = House(tmp_path, between)
        house.begin()
        yield house
        house.gateway.stop()


def test_a_turn_after_a_restart_is_warm(house: House) -> None:
    """After the death of the server, and after a stop of everything: the same answer, at once."""
    cold, evaluated, cached = house.ask()
    assert evaluated > 1800
    assert cached == 0
    house.until_saved()
    os.kill(house.pid, signal.SIGKILL)
    for restarts in (False, True):
        if restarts:
            house.gateway.stop()
            house.begin()
        warm, evaluated, cached = house.ask()
        assert warm == cold
        assert cached / (evaluated + cached) >= 0.99
    assert house.main["cache"]["ineffective_restores_total"] == 0
    assert house.gateway.stop() == 0
    assert house.files() == [".json", ".kv"]


@pytest.mark.parametrize("action", ["save", "restore"])
def test_a_server_that_is_killed_meanwhile_costs_a_prefill_at_most(
    house: House, action: str
) -> None:
    """The answer is the cold one, and nothing half-made is left over."""

    def kill() -> None:
        os.kill(house.pid, signal.SIGKILL)

    if action == "save":
        house.at_first("action=save", kill)
    cold, _, _ = house.ask()
    if action == "restore":
        house.until_saved()
        house.at_first("action=restore", kill)
        kill()
    house.until(lambda main: main["process"]["restarts"] == (1 if action == "save" else 2))
    assert house.ask()[0] == cold
    house.until_saved()
    assert house.gateway.stop() == 0
    assert house.files() == [".json", ".kv"]


def test_a_gateway_that_is_killed_while_it_saves_leaves_nothing(house: House) -> None:
    """The next one removes what is half-made, ends the old server and answers as before."""
    house.at_first("action=save", house.gateway.process.kill)
    cold, _, _ = house.ask()
    house.gateway.process.wait(60)
    house.begin()
    assert house.ask()[0] == cold
    house.until_saved()
    assert house.gateway.stop() == 0
    assert house.files() == [".json", ".kv"]
