"""
Every fault at every stage of a call, on a real server that the gateway keeps running.

A fault strikes the server of a gateway while it is idle, while calls are in line, in prefill, mid
stream, after a client has left, and while the gateway drains.  Those that are about a start strike
as an end: the server is killed there, and its next start is the faulty one.  No call may be lost:
each is answered within the tries that its client makes by itself.  The table is logged:
``pytest --log-cli-level=INFO`` shows it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPException
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final

import attrs
import psutil
import pytest

from tests.e2e import scripted_server
from tests.e2e.callers import ANSWERED, CUT, CUT_BEFORE, OVERLOADED, REFUSED, Caller
from tests.e2e.clients import eventually
from tests.e2e.recorder import Heard, Recorder
from tests.e2e.stack import SMOLLM, Running, free_port, run_gateway, start_gateway

Json = Any

figures = logging.getLogger(__name__)

pytestmark = pytest.mark.server

#: Seconds without progress after which the server counts as stuck.
STALL: Final = 8

#: Starts after which a stand is made anew: the pauses between them grow.
MANY: Final = 3

#: Seconds for anything that must come to pass.
PATIENCE: Final = 90

_numbers = count()


# --- what is struck -------------------------------------------------------------------------------


@attrs.define(eq=False)
class Stand:
    """
    A gateway whose main server can be made faulty.

    Attributes:
        folder: of the gateway.
        gateway: as it runs now.
        server_port: where the server listens.
        between: what the gateway takes for its server.
        hangs: whether the server leaves who asks for its slots without an answer.
    """

    folder: Path
    gateway: Running
    server_port: int
    between: Recorder
    hangs: bool = False

    @classmethod
    @contextmanager
    def standing(cls, folder: Path, *, observed: bool = False) -> Iterator[Stand]:
        """One whose server is up; `observed`, if something is to stand before the server."""
        folder.mkdir()
        port = free_port()
        with Recorder(port).listening() as between:
            url = f"http://127.0.0.1:{between.port if observed else port}"
            flags = ("--ctx-size", "4096", "--batch-size", "32", "--cache-ram", "0")
            server = [sys.executable, "-m", "tests.e2e.faulty_server", str(folder / "orders")]
            command = [*server, "--port", str(port), *SMOLLM, *flags]
            main = {
                "url": url,
                "stall": STALL,
                "startup_patience": PATIENCE,
                "server": {"command": command, "max_restarts": 100, "stop_grace": 2},
            }
            gateway = start_gateway(folder, {"main": main}, "grace = 12")
            stand = cls(folder, gateway, port, between)
            between.before = stand.is_passed_on
            try:
                stand.until(lambda: stand.is_ready)
                yield stand
            finally:
                stand.hangs = False
                stand.gateway.stop()

    def is_passed_on(self, heard: Heard) -> bool:
        asks = heard.method == "GET" and heard.path.startswith("/slots")
        return not (self.hangs and asks)

    # --- what it says of itself -------------------------------------------------------------------

    @property
    def status(self) -> Json:
        """What the gateway says of itself; nothing while there is none."""
        with suppress(OSError, HTTPException):
            return self.gateway.ask("/status")[1]
        return None

    @property
    def main(self) -> Json:
        status = self.status
        return {"process": {}} if status is None else status["tiers"]["main"]

    @property
    def process(self) -> Json:
        return self.main["process"]

    @property
    def is_ready(self) -> bool:
        return bool(self.process.get("state") == "ready")

    @property
    def is_at_rest(self) -> bool:
        """Whether no call is under way and every permit is back."""
        main = self.main
        return [main.get(key) for key in ("running", "settling", "waiting")] == [0, 0, 0]

    def has_said(self, words: str) -> bool:
        """Whether the server's output had this lately; its log may have been rotated."""
        for path in self.folder.glob("main.log*"):
            with suppress(FileNotFoundError):  # it is being rotated
                if words.encode() in path.read_bytes()[-4096:]:
                    return True
        return False

    def until(self, holds: Callable[[], Any]) -> None:
        assert eventually(lambda: bool(holds()), PATIENCE, 0.05), (
            self.status,
            self.gateway.log.read_text()[-3000:],
        )

    # --- what is done with it ---------------------------------------------------------------------

    def order(self, what: str) -> None:
        """What the server does at its next start."""
        (self.folder / "orders").write_text(what)

    def ask(self, words: str, tokens: int, *, stream: bool = True) -> Caller:
        """A call that is like none before: what took a server with it twice is not sent again."""
        text = f"This is call {next(_numbers)}. {words}"
        body = {
            "model": "any",
            "max_tokens": tokens,
            "temperature": 0,
            "stream": stream,
            "messages": [{"role": "user", "content": text}],
        }
        return Caller.calling(self.gateway.port, body)

    def a_short_one(self, *, stream: bool = True) -> Caller:
        return self.ask("Say hello.", 8, stream=stream)

    def a_long_answer(self) -> Caller:
        """One whose content has begun, and goes on for seconds."""
        caller = self.ask("Tell a long story of an old city and its seven gates.", 80)
        assert caller.spoke.wait(PATIENCE), self.status
        return caller

    def a_long_prompt(self) -> Caller:
        """One whose prompt is being evaluated, and is for seconds."""
        caller = self.ask(" ".join(f"Gate {number} is open." for number in range(60)), 8)
        self.until(lambda: self.main.get("running") == 1)
        time.sleep(0.3)  # a batch or two
        assert not caller.spoke.is_set()
        return caller

    def restart(self) -> None:
        """As whoever keeps the gateway running does it."""
        self.gateway = run_gateway(self.folder, self.gateway.port)


# --- the faults -----------------------------------------------------------------------------------

#: Whether a server is well again.
Well = Callable[[], bool]


@attrs.frozen
class Fault:
    """
    Something that happens to a server.

    Attributes:
        name: in the table.
        strike: makes it happen to the process with this id.
        ends: whether an answer under way is over with it.
    """

    name: str
    strike: Callable[[Stand, int], Well]
    ends: bool = True


def another(stand: Stand, pid: int) -> Well:
    """Whether another process is ready."""

    def well() -> bool:
        process = stand.process
        return bool(process.get("state") == "ready" and process["pid"] != pid)

    return well


def sends(number: int) -> Callable[[Stand, int], Well]:
    def strike(stand: Stand, pid: int) -> Well:
        os.kill(pid, number)
        return another(stand, pid)

    return strike


def starts_with(order: str) -> Callable[[Stand, int], Well]:
    """It is killed, and its next start is done by this order."""

    def strike(stand: Stand, pid: int) -> Well:
        stand.order(order)
        os.kill(pid, signal.SIGKILL)
        return another(stand, pid)

    return strike


def port_taken(stand: Stand, pid: int) -> Well:
    """It is killed, and somebody else listens there until a start has failed for it."""
    taken = Event()

    def squat() -> None:
        with socket.socket() as squatter:
            squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            squatter.settimeout(0.1)
            assert eventually(lambda: _is_bound(squatter, stand.server_port), PATIENCE, 0.01)
            taken.set()
            while "status 1" not in str(stand.process.get("reason")):
                with suppress(TimeoutError):
                    squatter.accept()[0].close()

    os.kill(pid, signal.SIGKILL)
    Thread(target=squat, daemon=True).start()
    assert taken.wait(PATIENCE)
    return another(stand, pid)


def _is_bound(squatter: socket.socket, port: int) -> bool:
    try:
        squatter.bind(("127.0.0.1", port))
    except OSError:
        return False
    squatter.listen()
    return True


def slots_hang(stand: Stand, pid: int) -> Well:
    """Its slots are not told any more, until another server is started in its place."""
    stand.hangs = True

    def watch() -> None:
        eventually(lambda: stand.process.get("pid") not in (pid, None), PATIENCE, 0.05)
        stand.hangs = False

    Thread(target=watch, daemon=True).start()
    return another(stand, pid)


def shouts(stand: Stand, pid: int) -> Well:
    """It says ten megabytes without a newline, and goes on as if nothing were."""
    words = f"that was shout {next(_numbers)}"
    stand.order(words)
    os.kill(pid, signal.SIGUSR1)
    return lambda: stand.is_ready and stand.has_said(words)


FAULTS: Final = (
    Fault("SIGKILL", sends(signal.SIGKILL)),
    Fault("SIGSEGV", sends(signal.SIGSEGV)),
    Fault("SIGSTOP", sends(signal.SIGSTOP)),
    Fault("exit 1 while loading", starts_with("exit")),
    Fault("port taken", port_taken),
    Fault("slow load", starts_with("slow")),
    Fault("hung /slots", slots_hang, ends=False),
    Fault("10 MB without a newline", shouts, ends=False),
)


# --- the stages -----------------------------------------------------------------------------------


@attrs.frozen
class Cell:
    """
    One fault at one stage.

    Attributes:
        calls: those that were there, by what they are to the fault.
        recovery: seconds from the fault until a server was ready, and nothing wrong with it.
    """

    calls: dict[str, Caller]
    recovery: float

    @property
    def lost(self) -> int:
        return sum(call.is_lost or call.saw[-1] != ANSWERED for call in self.calls.values())

    @property
    def saw(self) -> str:
        return "; ".join(f"{name}: {', '.join(call.saw)}" for name, call in self.calls.items())


def struck(stand: Stand, fault: Fault, calls: dict[str, Caller], *, call: bool = False) -> Cell:
    """The fault strikes while `calls` are under way; then another one may come at once."""
    at = time.monotonic()
    well = fault.strike(stand, stand.process["pid"])
    if call:
        calls = {**calls, "next": stand.a_short_one()}
    stand.until(well)
    recovery = time.monotonic() - at
    for each in calls.values():
        each.over()
    stand.until(lambda: stand.is_at_rest)
    return Cell(calls, recovery)


def idle(stand: Stand, fault: Fault) -> Cell:
    """Nobody calls; the next call comes at once."""
    return struck(stand, fault, {}, call=True)


def in_line(stand: Stand, fault: Fault) -> Cell:
    """Two calls wait behind one that is being answered."""
    calls = {"running": stand.a_long_answer()}
    calls["waiting"] = stand.a_short_one()
    calls["waiting, not streamed"] = stand.a_short_one(stream=False)
    stand.until(lambda: stand.main.get("waiting") == 2)
    return struck(stand, fault, calls)


def in_prefill(stand: Stand, fault: Fault) -> Cell:
    """The prompt of a call is being evaluated."""
    return struck(stand, fault, {"in prefill": stand.a_long_prompt()})


def mid_stream(stand: Stand, fault: Fault) -> Cell:
    """A part of an answer has come."""
    return struck(stand, fault, {"running": stand.a_long_answer()})


def after_a_cancellation(stand: Stand, fault: Fault) -> Cell:
    """A client has left in prefill, its slot is not idle yet, and the next call comes at once."""
    stand.a_long_prompt().leave()
    return struck(stand, fault, {}, call=True)


def draining(stand: Stand, fault: Fault) -> Cell:
    """
    The gateway was told to end, with an answer under way and a call in line.

    It is started anew as soon as it has ended, as launchd and systemd do it.
    """
    calls = {"running": stand.a_long_answer(), "waiting": stand.a_short_one()}
    stand.until(lambda: stand.main.get("waiting") == 1)
    pid = stand.process["pid"]
    stand.gateway.process.send_signal(signal.SIGTERM)
    stand.until(lambda: stand.status is None)
    at = time.monotonic()
    well = fault.strike(stand, pid)
    assert stand.gateway.process.wait(60) == 0
    assert not psutil.pid_exists(pid)
    stand.hangs = False
    stand.gateway = run_gateway(stand.folder, stand.gateway.port)
    stand.until(well)
    recovery = time.monotonic() - at
    for each in calls.values():
        each.over()
    return Cell(calls, recovery)


STAGES: Final = {
    "idle": idle,
    "in line": in_line,
    "in prefill": in_prefill,
    "mid-stream": mid_stream,
    "after a cancellation": after_a_cancellation,
    "while draining": draining,
}


# --- what is shown --------------------------------------------------------------------------------

#: What a running answer's client sees of a server that ends, and what others see of a gateway that
#: ends: those whose stream had begun are cut off.
_BROKEN: Final = [CUT, ANSWERED]
_SENT_AWAY: Final = {"503", CUT_BEFORE, OVERLOADED}


def assert_seen(stage: str, fault: Fault, cell: Cell) -> None:
    """Each client saw what it should: only who had content, or came to the end, tries again."""
    for name, call in cell.calls.items():
        tries = [saw for saw in call.saw if saw != REFUSED]
        if stage == "while draining":
            if name == "waiting":
                assert tries[0] in _SENT_AWAY, cell.saw
                assert tries[1:] == [ANSWERED], cell.saw
            else:
                assert tries == (_BROKEN if fault.ends else [ANSWERED]), cell.saw
        else:
            assert REFUSED not in call.saw, cell.saw
            assert tries == (_BROKEN if name == "running" and fault.ends else [ANSWERED]), cell.saw


def row(fault: Fault, folder: Path) -> dict[str, Cell]:
    """A fault at every stage."""
    cells: dict[str, Cell] = {}
    left = list(STAGES.items())
    while left:
        place = folder / f"from {left[0][0]}"
        with Stand.standing(place, observed=fault.strike is slots_hang) as stand:
            while left and stand.process["restarts"] < MANY:
                stage, strikes = left.pop(0)
                cells[stage] = strikes(stand, fault)
    return cells


@pytest.fixture(scope="module")
def rows(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[dict[str, Cell]]]]:
    """The table, as far as it is asked for; two rows at a time, since most of it is waiting."""
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    faults = [found.params["fault"] for found in chosen if found and "fault" in found.params]
    with ThreadPoolExecutor(2) as pool:
        yield {each.name: pool.submit(row, each, tmp_path_factory.mktemp("row")) for each in faults}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_at_every_stage(fault: Fault, rows: dict[str, Future[dict[str, Cell]]]) -> None:
    """No call is lost to it, and a server is well again."""
    cells = rows[fault.name].result()
    for stage, cell in cells.items():
        shown = (fault.name, stage, cell.recovery, cell.lost, cell.saw)
        figures.info("%-23s | %-20s | %5.1f s | %d lost | %s", *shown)
    assert list(cells) == list(STAGES)
    for stage, cell in cells.items():
        assert cell.lost == 0, (stage, cell.saw)
        assert_seen(stage, fault, cell)


def test_poison(tmp_path: Path) -> None:
    """A call that ends the server is refused after two ends; ten others wait and are answered."""
    port = free_port()
    server = {"command": scripted_server.command(port, prefill=0.2), "max_restarts": 100}
    main = {"url": f"http://127.0.0.1:{port}", "server": server}
    gateway = start_gateway(tmp_path, {"main": main})

    def ask(words: str, *, stream: bool = True) -> Caller:
        content = [{"role": "user", "content": words}]
        body = {"model": "any", "max_tokens": 50, "stream": stream, "messages": content}
        return Caller.calling(gateway.port, body)

    def tier() -> Json:
        return gateway.ask("/status")[1]["tiers"]["main"]

    try:
        assert eventually(lambda: tier()["process"]["state"] == "ready", PATIENCE)
        others = [ask("Hello, who runs?")]
        poison = ask(f"What is {scripted_server.POISON}?")
        others += [ask(f"Hello, who waits? {number}", stream=number < 2) for number in range(4)]
        for number in range(5):
            time.sleep(0.7)
            others.append(ask(f"Hello, who comes? {number}"))
        poison.over()
        for other in others:
            other.over()
        figures.info("poison: %s; others: %s", poison.saw, [other.saw for other in others])
        assert [other.saw for other in others] == [[ANSWERED]] * 10
        assert all(other.text == scripted_server.ANSWER for other in others)
        # A stream that has begun cannot have a status: it is asked for again, and then has one.
        assert poison.saw[-1] == "500"
        assert poison.headers["x-should-retry"] == "false"
        assert len(poison.saw) <= 2
        assert tier()["process"]["restarts"] == 2

        again = ask(f"What is {scripted_server.POISON}?", stream=False).over()
        assert again.saw == ["500"]
        assert tier()["process"]["restarts"] == 2
        (refused,) = tier()["refused"]
        assert f"{refused} is refused" in gateway.log.read_text()
    finally:
        gateway.stop()
