"""
Whether it stays up: real calls of four clients, and a fault every few seconds.

``python -m bench.soak [--minutes 30] [--every 20] [--seed N] [--folder DIR]`` starts a gateway with
both embedded servers as its children.  A fault is a signal to one of them, KILL or STOP, or a HUP
to the gateway with another configuration.  No call may be lost, no permit, no process.

A call that loses its server twice counts as poison and is refused, and rightly so.  So a server is
spared while a call is under way that has lost one already.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Final

import attrs
import orjson
import psutil

from bench.house import House, Size
from bench.people import Person, a_turn
from bench.persistent import Call, Ended, Outcome, ask
from bench.waiting import show
from tests.e2e.clients import eventually
from tests.e2e.stack import SMOLLM, TWISTD, free_port, start

Json = Any

CLIENTS: Final = 4
TIERS: Final = ("main", "small")

#: Seconds without progress after which a server counts as stuck; a batch of 128 tokens takes one.
STALL: Final = 6

#: Seconds between two looks at ``/status``.
LOOK: Final = 0.25

#: Seconds that the last calls get to end, and then the slots to be idle, and the gateway to stop.
LAST_CALLS: Final = 400
IDLE: Final = 60
STOP: Final = 90


def main() -> int:
    """A table; 0 if nothing was lost."""
    options = argparse.ArgumentParser(prog="python -m bench.soak")
    options.add_argument("--minutes", type=float, default=30)
    options.add_argument("--every", type=float, default=20, help="seconds between two faults")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--folder", type=Path, help="keeps state and logs")
    given = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="claudegw-soak-") as name:
        folder = given.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        house = Troubled.started(folder)
        try:
            soak = Soak(house, random.Random(given.seed))
            soak.run(60 * given.minutes, given.every)
        finally:
            status = house.gateway.stop(STOP)
        return soak.report(status)


# --- the gateway ----------------------------------------------------------------------------------


@attrs.define(eq=False)
class Troubled(House):
    """
    A gateway whose configuration changes.

    Attributes:
        config: its file.
        ports: of the gateway and of the servers.
        reloads: how often it was told to read its file again.
        env: a number for each server; another one makes it be started anew.
    """

    config: Path
    ports: tuple[int, ...]
    reloads: int = 0
    env: Counter[str] = attrs.field(factory=Counter)

    @classmethod
    def started(cls, folder: Path) -> Troubled:
        """One that is up, with its servers."""
        ports = (free_port(), free_port(), free_port())
        config = folder / "gw.toml"
        config.write_text(configuration(folder, ports, 0, Counter()))
        command = [str(TWISTD), "-n", "--pidfile=", "claudegw", "--config", str(config)]
        house = cls(start(command, ports[0], folder / "gateway.log"), config, ports)
        try:
            house.gateway.wait("/healthz", 120)
            assert eventually(house.is_up, 300), house.log()[-2000:]
        except BaseException:
            house.gateway.stop(STOP)
            raise
        return house

    def reload(self, renewed: str = "") -> None:
        """Change a route and a bound, and the environment of the server `renewed`."""
        self.reloads += 1
        if renewed:
            self.env[renewed] += 1
        new = self.config.with_suffix(".new")
        new.write_text(configuration(self.config.parent, self.ports, self.reloads, self.env))
        new.rename(self.config)
        self.gateway.process.send_signal(signal.SIGHUP)


def configuration(folder: Path, ports: tuple[int, ...], reloads: int, env: Counter[str]) -> str:
    """The file after so many reloads."""
    door, *servers = ports
    parts = [f'[gateway]\nlisten = "tcp:{door}:interface=127.0.0.1"\nstate_dir = "{folder}"']
    for name, port in zip(TIERS, servers, strict=True):
        flags = (*SMOLLM, "--ctx-size", "8192", "--batch-size", "128", "--cache-ram", "256")
        command = orjson.dumps(["python", "-m", "gateway.llama.embedded", *flags]).decode()
        parts += [
            f'[tier.{name}]\nurl = "http://127.0.0.1:{port}"\nslots = 2\nstall = {STALL}',
            f"ageing = {60 + reloads % 2}\nmax_waiting = {64 + reloads % 3}",
            f"[tier.{name}.server]\nmax_restarts = 1000\ncommand = {command}",
            f'env = {{ RENEWED = "{env[name]}" }}',
        ]
    parts.append(f'[[route]]\nmodel = "*haiku*"\ntier = "{TIERS[1 - reloads % 2]}"')
    return "\n".join(parts)


# --- what is done to it ---------------------------------------------------------------------------


@attrs.define(eq=False)
class Watch:
    """
    What is seen of a gateway from outside.

    Attributes:
        house: the gateway.
        resent: the calls that it sent again by itself, and how often.
        born: when each process that it ever had was started.
        took: seconds from each fault of a server to the next one that is ready, by the signal.
        unasked: ends of servers that were no fault of ours.
        suspects: tiers with a call that has lost its server once.
    """

    house: Troubled
    resent: dict[str, int] = attrs.field(factory=dict, init=False)
    born: dict[int, float] = attrs.field(factory=dict, init=False)
    took: dict[str, list[float]] = attrs.field(factory=dict, init=False)
    unasked: list[str] = attrs.field(factory=list, init=False)
    suspects: set[str] = attrs.field(factory=set, init=False)
    _pids: dict[str, int] = attrs.field(factory=dict, init=False)
    _hit: dict[str, tuple[float, int, str]] = attrs.field(factory=dict, init=False)

    def look(self) -> None:
        """See what has become of it."""
        status = self.house.status()
        self.suspects = {call["tier"] for call in status["calls"] if call["resent"]}
        for call in (*status["calls"], *status["last"]):
            if call["resent"]:
                self.resent[call["id"]] = call["resent"]
        for name, tier in status["tiers"].items():
            process = tier["process"]
            if process["pid"] is not None:
                self._sees(name, process)

    def _sees(self, name: str, process: Json) -> None:
        pid, before = process["pid"], self._pids.get(name)
        if pid != before:
            with suppress(psutil.NoSuchProcess):
                self.born[pid] = psutil.Process(pid).create_time()
            self._pids[name] = pid
            if before is not None and name not in self._hit:
                self.unasked.append(f"{name}: {process['reason']}")
        if name in self._hit and process["state"] == "ready":
            at, hit, by = self._hit[name]
            if pid != hit:
                self.took.setdefault(by, []).append(time.monotonic() - at)
                del self._hit[name]

    def can_be_hit(self, name: str) -> int | None:
        """The process of a tier, unless it is in trouble still, or has done enough harm."""
        return None if name in self._hit or name in self.suspects else self._pids.get(name)

    def hits(self, name: str, pid: int, by: str) -> None:
        """The server of a tier is about to be in trouble."""
        self._hit[name] = time.monotonic(), pid, by

    @property
    def is_whole(self) -> bool:
        """Whether every fault is over."""
        return not self._hit

    def left(self) -> list[int]:
        """Processes that it had and that still run."""
        found = []
        for pid, born in self.born.items():
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).create_time() == born:
                    found.append(pid)
        return found


@attrs.define(eq=False)
class Soak:
    """
    One run.

    Attributes:
        house: the gateway.
        dice: decides which fault comes next.
    """

    house: Troubled
    dice: random.Random
    watch: Watch = attrs.field(init=False)
    ended: list[Ended] = attrs.field(factory=list, init=False)
    faults: Counter[str] = attrs.field(factory=Counter, init=False)
    sizes: list[Size] = attrs.field(factory=list, init=False)
    busy: dict[str, int] = attrs.field(factory=dict, init=False)
    spared: int = attrs.field(default=0, init=False)
    unended: int = attrs.field(default=0, init=False)
    _again: set[int] = attrs.field(factory=set, init=False)
    _over: Event = attrs.field(factory=Event, init=False)
    _lock: Lock = attrs.field(factory=Lock, init=False)

    def __attrs_post_init__(self) -> None:
        self.watch = Watch(self.house)

    def run(self, seconds: float, every: float) -> None:
        """So many seconds of faults; then the last calls end."""
        people = [Person(n, random.Random(self.dice.random())) for n in range(1, CLIENTS + 1)]
        for person in people:  # what every gateway needs once is no leak
            for call in (person.title(), person.haiku(), a_turn(person.turn())):
                self._ask(person, call)
        self.ended.clear()
        self.sizes.append(Size.of(self.house.gateway))
        threads = [Thread(target=self._live, args=(person,), daemon=True) for person in people]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        try:
            self._trouble(began, seconds, every)
        finally:
            self._over.set()
        self._wait_for(threads)
        eventually(self.house.is_idle, IDLE, LOOK)
        self.watch.look()
        self.busy = self.house.busy()
        self.sizes.append(Size.of(self.house.gateway))

    def _live(self, person: Person) -> None:
        while not self._over.is_set():
            person.ask(partial(self._ask, person))
            self._over.wait(person.dice.uniform(0, 1.5))

    def _ask(self, person: Person, call: Call) -> Ended:
        again = partial(self._again.add, person.number)
        ended = ask(self.house.gateway.port, person.headers, call, again)
        self._again.discard(person.number)
        if ended.outcome is Outcome.LOST:
            print(f"LOST after {ended.seconds:.1f} s: {call.kind}: {ended.why}", flush=True)
            print(f"  sent again because: {'; '.join(ended.again) or 'never'}", flush=True)
        with self._lock:
            self.ended.append(ended)
        return ended

    def _trouble(self, began: float, seconds: float, every: float) -> None:
        """A fault every so often, and a line every minute."""
        next_fault, next_line = began + every / 2, began + 60
        while (now := time.monotonic()) < began + seconds:
            self.watch.look()
            if now >= next_fault:
                next_fault += every
                self._fault()
            if now >= next_line:
                next_line += 60
                self.sizes.append(Size.of(self.house.gateway))
                minute, calls = (now - began) / 60, len(self.ended)
                print(f"minute {minute:.0f}: {calls} calls, {self.sizes[-1]}", flush=True)
            time.sleep(LOOK)

    def _fault(self) -> None:
        """One at random, of those that there is a process for."""
        faults: dict[str, Callable[[], None]] = {
            "HUP, another route and bound": self.house.reload,
        }
        for name in TIERS:
            pid = None if self._again else self.watch.can_be_hit(name)
            if pid is None:
                self.spared += 1
            else:
                for number in (signal.SIGKILL, signal.SIGSTOP):
                    hit = partial(self._signal, name, pid, number)
                    faults[f"{number.name.removeprefix('SIG')} {name}"] = hit
                faults[f"HUP, another command of {name}"] = partial(self._renew, name, pid)
        which = self.dice.choice(sorted(faults))
        self.faults[which] += 1
        faults[which]()

    def _signal(self, name: str, pid: int, number: signal.Signals) -> None:
        self.watch.hits(name, pid, number.name.removeprefix("SIG"))
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def _renew(self, name: str, pid: int) -> None:
        self.watch.hits(name, pid, "HUP")
        self.house.reload(name)

    def _wait_for(self, threads: list[Thread]) -> None:
        """Until the clients have what they asked for, and the servers are well."""

        def is_over() -> bool:
            self.watch.look()
            self.unended = sum(thread.is_alive() for thread in threads)
            return not self.unended and self.watch.is_whole

        eventually(is_over, LAST_CALLS, LOOK)

    def report(self, status: int) -> int:
        """The table; `status` is what the gateway ended with."""
        outcomes = Counter(ended.outcome for ended in self.ended)
        again = [_in_short(why) for ended in self.ended for why in ended.again]
        reloads = self.house.log().count("reloaded /")
        cries = self.house.cries()
        left = self.watch.left()
        lost = outcomes[Outcome.LOST] + self.unended
        waits = [each.seconds for each in self.ended if each.outcome is Outcome.RIGHT]
        show("calls", f"{len(self.ended)}: {_counts(each.call.kind for each in self.ended)}")
        for outcome in Outcome:
            show(f"  {outcome.value}", str(outcomes[outcome]))
        show("  not ended", str(self.unended))
        show("seconds to an answer", _middle_and_most(waits))
        show("sent again by clients", f"{len(again)}: {_counts(again)}")
        resent = self.watch.resent.values()
        show("sent again beneath", f"{sum(resent)}, for {len(resent)} calls")
        show("faults", f"{self.faults.total()}: {_counts(self.faults.elements())}")
        show("  servers spared when one was chosen", str(self.spared))
        for by, took in sorted(self.watch.took.items()):
            show(f"seconds from {by} to a server that is ready", _middle_and_most(took))
        show("faults that are not over", str(0 if self.watch.is_whole else "some"))
        show(
            "ends of servers for no fault of ours",
            f"{len(self.watch.unasked)} {self.watch.unasked}",
        )
        show("reloads, of those asked for", f"{reloads} of {self.house.reloads}")
        for when, size in zip(("start", "end"), (self.sizes[0], self.sizes[-1]), strict=True):
            show(f"gateway at the {when}", str(size))
        show("at the end", ", ".join(f"{what} {many}" for what, many in self.busy.items()))
        show("tracebacks and the like in its log", str(len(cries)))
        show("its exit status, its processes that are left", f"{status}, {len(left)}")
        is_good = (
            not (lost or left or cries or status or self.watch.unasked or any(self.busy.values()))
            and self.watch.is_whole
            and reloads == self.house.reloads
        )
        show("all is well", "yes" if is_good else "NO")
        return 0 if is_good else 1


def _counts(kinds: Iterable[str]) -> str:
    return ", ".join(f"{kind} {many}" for kind, many in sorted(Counter(kinds).items()))


def _middle_and_most(figures: list[float]) -> str:
    return f"p50 {statistics.median(figures):.1f}, max {max(figures):.1f}" if figures else "none"


def _in_short(why: str) -> str:
    """The part of a reason that is the same for all calls."""
    return re.split(r" \{|: ", why.removeprefix("broken: "))[0]


if __name__ == "__main__":
    sys.exit(main())
