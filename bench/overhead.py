"""
What the gateway adds to a call, beside nothing at all, nginx and haproxy.

``python -m bench.overhead [--rounds 5] [--peers] [--json FILE]`` starts a fake server
(`bench.fast_llama`) and everything that may stand in front of it (`bench.contestants`), measures
each figure on all of them in turns, and begins anew with fresh processes in the next round.  It
prints the middle figure of all rounds with the least and the greatest one, then which budgets are
met.  It fails if a stream was not complete or if the fake server may be what limits the gateway.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import orjson

from bench.client import LAST_CHUNK, STAGES, Client, call, events, large, request, until
from bench.contestants import FILES, KINDS, PEER_KINDS, SINGLE, SLOTS, TIERS, Contestant, Kind
from bench.crowd import Crowd, crowd
from bench.fast_llama import FastLlama
from bench.processes import MB, cpu, resident
from bench.report import DIRECT, GATEWAY, Budget, Results, table
from bench.waiting import leave, waiting

Json = Any

ROUNDS: Final = 5

#: How much of everything there is in one round.
FIRST_TEXTS: Final = 100
PACED: Final = (20, 25)  # streams, and events of each
BURSTS: Final = (11, 5000)
BURSTS_AT_ONCE: Final = (24, 8)  # all, and at any time
CALLS_AT_ONCE: Final = (400, 16)
STREAMS: Final = (50, 200, 1000)
STREAM_EVENTS: Final = 10
LEAVING: Final = 12

#: Seconds after which an upstream that has not heard of a client's leaving never will.
NEVER: Final = 3.0

#: Seconds after which no further client leaves at a stage: some peers take that long to get there.
ENOUGH: Final = 3.0

#: Seconds after which a call that is not at its stage never will be: some peers send no status
#: before there is content, or stop answering once clients have left.
GETS_THERE: Final = 20.0

#: How much more the fake server must be able to do alone than it does behind the gateway.
FACTOR: Final = 2.0

# The rows of the table.
FIRST: Final = "first text of a 60 KB call, ms"
FIRST_P99: Final = "first text of a 60 KB call, p99, ms"
EVENT: Final = "one event, paced, ms"
BURST: Final = f"burst of {BURSTS[1]}, events/s"
MANY_BURSTS: Final = f"{BURSTS_AT_ONCE[1]} bursts at once, events/s"
EVENT_CPU: Final = "CPU an event, in a burst, us"
CALLS: Final = f"{CALLS_AT_ONCE[1]} clients with 60 KB calls, calls/s"
CALL_CPU: Final = "CPU a 60 KB call, ms"
FRESH: Final = "memory, fresh, MB"
USED: Final = "memory, after all this, MB"
TAKEN: Final = "a client stops reading: taken of 400 MB, MB"
GROWN: Final = "a client stops reading: memory grows, MB"
IN_LINE: Final = "in line"


def streams_row(count: int, what: str) -> str:
    """A row about so many streams at once."""
    return f"{count} streams at once, {what}"


def leaving_row(stage: str, what: str) -> str:
    """A row about a client that leaves."""
    return f"a client leaves {stage}, {what}, ms"


def added(row: str) -> Callable[[Results], Sequence[float]]:
    """What the gateway adds to the direct figure."""
    return lambda results: results.against(row, lambda figure, direct: figure - direct)


def itself(row: str) -> Callable[[Results], Sequence[float]]:
    """The gateway's figure."""
    return lambda results: results.of(row)


def times(row: str) -> Callable[[Results], Sequence[float]]:
    """How many times the direct figure the gateway's is."""
    return lambda results: results.against(row, lambda figure, direct: figure / direct)


def faster(row: str) -> Callable[[Results], Sequence[float]]:
    """How many times the gateway's figure the direct one is."""
    return lambda results: results.against(row, lambda figure, direct: direct / figure)


#: What the gateway may cost.  The last ones say that the fake server is not what is measured.
BUDGETS: Final = (
    Budget("first text of a 60 KB call: added, ms", 1.0, added(FIRST)),
    Budget("one event, paced: added, ms", 0.15, added(EVENT)),
    Budget(BURST, 50_000, itself(BURST), at_least=True),
    Budget(
        "1000 streams at once: complete", 1000, itself(streams_row(1000, "complete")), at_least=True
    ),
    Budget("1000 streams at once: times direct", 2.0, times(streams_row(1000, "s"))),
    Budget("1000 streams at once: memory, MB", 150, itself(streams_row(1000, "memory, MB"))),
    Budget(FRESH, 70, itself(FRESH)),
    *(
        Budget(leaving_row(stage, "p50"), 5.0, itself(leaving_row(stage, "p50")))
        for stage in (*STAGES, IN_LINE)
    ),
    Budget(GROWN, 5.0, itself(GROWN)),
)
PROOFS: Final = tuple(
    Budget(f"direct, times claudegw: {row}", FACTOR, faster(row), at_least=True)
    for row in (CALLS, MANY_BURSTS)
)


def main() -> int:
    """Measure, and print; 0 if the figures can be believed."""
    options = argparse.ArgumentParser(prog="python -m bench.overhead")
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--peers", action="store_true", help="also those of bin/get-peers")
    options.add_argument("--json", type=Path, help="a file for all figures")
    given = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    allow_files(2 * FILES)
    kinds, versions = [], {}
    for kind in (*KINDS, *(PEER_KINDS if given.peers else ())):
        version = kind.installed()
        if version is None:
            print(f"{kind.name} is not installed, and left out")
        else:
            kinds.append(kind)
            versions[kind.name] = version
    facts = machine() | {
        "rounds": given.rounds,
        "command": " ".join(sys.orig_argv),
        "versions": versions,
    }
    for what, fact in facts.items():
        print(f"{what}: {fact}")
    results = Results()
    began = time.monotonic()
    for number in range(given.rounds):
        one_round(kinds, results)
        print(f"round {number + 1} of {given.rounds}: {time.monotonic() - began:.0f} s", flush=True)
    print("\n" + table(results.rows, [DIRECT, *(kind.name for kind in kinds)]) + "\n")
    budgets = [budget.judged(results) for budget in BUDGETS]
    proofs = [proof.judged(results) for proof in PROOFS]
    for verdict in (*budgets, *proofs):
        print(verdict)
    if given.json:
        said = {
            "machine": facts,
            "rows": results.json(),
            "budgets": [verdict.json() for verdict in budgets],
            "proofs": [verdict.json() for verdict in proofs],
        }
        given.json.write_bytes(orjson.dumps(said, option=orjson.OPT_INDENT_2))
    if not all(proof.is_met for proof in proofs):
        print("The fake server may be what limits the gateway: these figures say nothing.")
        return 1
    complete = all(min(results.of(streams_row(count, "complete"))) == count for count in STREAMS)
    return 0 if complete else 1


def allow_files(wanted: int) -> None:
    """Let this process, and those that it starts, open so many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        sys.exit(f"bench.overhead needs {wanted} open files, and may have {hard}")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def machine() -> dict[str, Json]:
    """Where this is measured."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load before": [round(load, 2) for load in os.getloadavg()],
    }


# --- one round ------------------------------------------------------------------------------------


def one_round(kinds: Sequence[Kind], results: Results) -> None:
    """Everything, on fresh processes."""
    with tempfile.TemporaryDirectory() as name, contestants(Path(name), kinds) as (llama, all_):
        time.sleep(1)
        for contestant in all_[1:]:
            results.add(FRESH, contestant.name, resident(*contestant.pids))
        for contestant in all_ * 5:
            first_text(contestant.port)  # the first calls pay for what comes after them
        Round(llama, all_, results).run()
        for contestant in all_[1:]:
            results.add(USED, contestant.name, resident(*contestant.pids))


@contextmanager
def contestants(
    folder: Path, kinds: Sequence[Kind]
) -> Iterator[tuple[FastLlama, list[Contestant]]]:
    """The fake server, and every way to it."""
    llama = FastLlama.started(folder, SLOTS)
    started = [Contestant(DIRECT, llama.running.port)]
    try:
        for kind in kinds:
            place = folder / kind.name
            place.mkdir()
            started.append(kind.started(place, llama.running.port))
        yield llama, started
    finally:
        for contestant in reversed(started):
            contestant.stop()
        llama.stop()


@attrs.frozen
class Round:
    """
    One round.

    Attributes:
        llama: the fake server.
        contestants: the ways to it, the direct one first.
        results: where the figures go.
    """

    llama: FastLlama
    contestants: Sequence[Contestant]
    results: Results

    def run(self) -> None:
        """All of it; the memory is looked at before and after."""
        for name, figures in self.in_turns(first_text, FIRST_TEXTS).items():
            self.results.add(FIRST, name, 1000 * statistics.median(figures))
            self.results.add(FIRST_P99, name, 1000 * sorted(figures)[int(0.99 * len(figures))])
        for name, figures in self.in_turns(per_event, PACED[0]).items():
            self.results.add(EVENT, name, 1000 * statistics.median(figures))
        for name, figures in self.in_turns(burst, BURSTS[0]).items():
            self.results.add(BURST, name, statistics.median(figures))
        for contestant in self.contestants:
            self.bursts(contestant)
        for contestant in self.contestants:
            self.calls(contestant)
        for count in STREAMS:
            for contestant in self.contestants:
                self.streams(contestant, count)
        for stage in STAGES:
            for contestant in self.contestants:
                self.leaving(contestant, stage)
        for contestant in self.contestants[1:]:
            self.stalled(contestant)
            if contestant.name == GATEWAY and contestant.running is not None:
                left = [leave_line(contestant) for _ in range(LEAVING)]
                self._left(IN_LINE, GATEWAY, left)

    def in_turns(self, measure: Callable[[int], float], runs: int) -> dict[str, list[float]]:
        """What `measure` finds on each of them."""
        found: dict[str, list[float]] = {contestant.name: [] for contestant in self.contestants}
        for _ in range(runs):
            for contestant in self.contestants:
                found[contestant.name].append(measure(contestant.port))
        return found

    def bursts(self, contestant: Contestant) -> None:
        """Events a second to several clients at once, and what one of them costs."""
        calls, at_once = BURSTS_AT_ONCE
        written = calls * BURSTS[1]
        one = call(f"burst {BURSTS[1]}")
        ended, used = costing(contestant, one, calls=calls, at_once=at_once, events=BURSTS[1])
        self.results.add(MANY_BURSTS, contestant.name, written / ended.seconds)
        if contestant.pids:
            self.results.add(EVENT_CPU, contestant.name, 1e6 * used / written)

    def calls(self, contestant: Contestant) -> None:
        """Calls a second of several clients at once, and what one of them costs."""
        calls, at_once = CALLS_AT_ONCE
        one = large("hello")
        ended, used = costing(contestant, one, calls=calls, at_once=at_once, events=1)
        self.results.add(CALLS, contestant.name, calls / ended.seconds)
        if contestant.pids:
            self.results.add(CALL_CPU, contestant.name, 1000 * used / calls)

    def streams(self, contestant: Contestant, count: int) -> None:
        """So many streams at once, each with ten tokens a second."""
        pids, memory = contestant.pids, [0.0]
        ended = crowd(
            contestant.port,
            [request(call(f"steady {STREAM_EVENTS}", model=tier)) for tier in TIERS],
            calls=count,
            at_once=count,
            events=STREAM_EVENTS,
            look=lambda: memory.append(resident(*pids)),
        )
        self.results.add(streams_row(count, "complete"), contestant.name, ended.complete)
        self.results.add(streams_row(count, "s"), contestant.name, ended.seconds)
        if pids:
            self.results.add(streams_row(count, "memory, MB"), contestant.name, max(memory))

    def leaving(self, contestant: Contestant, stage: str) -> None:
        """From a client's leaving until the upstream knows, at one stage."""
        order, mark = STAGES[stage]
        took: list[float] = []
        end = time.monotonic() + ENOUGH
        while not took or (len(took) < LEAVING and time.monotonic() < end):
            number = self.llama.calls()
            with Client.calling(contestant.port, call(order)) as client:
                if not self.gets_to(client, mark, number):
                    took.append(float("inf"))
                    break
                if stage == "stalled":
                    self.still(number, 0.1)
                time.sleep(0.005)
                at = client.leave()
                time.sleep(0.005)
                took.append(self.known(number) - at)
        self._left(stage, contestant.name, took)

    def _left(self, stage: str, name: str, took: Sequence[float]) -> None:
        self.results.add(leaving_row(stage, "p50"), name, 1000 * statistics.median(took))
        self.results.add(leaving_row(stage, "longest"), name, 1000 * max(took))

    def gets_to(self, client: Client, mark: bytes, number: int) -> bool:
        """Whether call `number` comes to the upstream, and `mark` to its client, in good time."""
        client.connection.settimeout(GETS_THERE)
        try:
            until(partial(self.llama.entry, number), GETS_THERE)
            client.read_until(mark)
        except (TimeoutError, EOFError, ConnectionError):
            return False
        return True

    def known(self, number: int) -> float:
        """When the upstream saw that the client of call `number` was gone."""
        try:
            return self.llama.left(number, NEVER)
        except TimeoutError:
            return float("inf")

    def still(self, number: int, seconds: float) -> float:
        """The bytes of call `number` that were taken once no more of them are."""
        try:
            return self.llama.stands_still(number, seconds)
        except TimeoutError:
            return float("inf")

    def stalled(self, contestant: Contestant) -> None:
        """What a client costs that does not read, while the upstream offers 400 MB."""
        number = self.llama.calls()
        before = resident(*contestant.pids)
        order, mark = STAGES["stalled"]
        with Client.calling(contestant.port, call(order)) as client:
            if not self.gets_to(client, mark, number):
                return
            taken = self.still(number, 1.0)
            grown = resident(*contestant.pids) - before
        self.results.add(TAKEN, contestant.name, taken / MB)
        self.results.add(GROWN, contestant.name, grown)


# --- one measurement ------------------------------------------------------------------------------


def first_text(port: int) -> float:
    """Seconds from the sending of a body of 60 KB with 20 tools to the first text of its answer."""
    raw = request(large("hello"))
    with Client.connected(port) as client:
        began = time.monotonic()
        client.connection.sendall(raw)
        client.read_until(b"event: content_block_delta")
        took = time.monotonic() - began
        client.read_until(LAST_CHUNK)
    return took


def per_event(port: int) -> float:
    """Seconds from the upstream's writing of an event to the client's reading, at p50."""
    took: list[float] = []
    with Client.calling(port, large(f"paced {PACED[1]}")) as client:
        while len(took) < PACED[1]:
            data, now = client.receive(), time.monotonic()
            took += [now - float(at) for at in re.findall(rb'"text": ?"(\d+\.\d+)"', data)]
        client.read_until(LAST_CHUNK)
    return statistics.median(took)


def burst(port: int) -> float:
    """Events a second of 5 000 at once, from the sending of the call to the last byte."""
    raw = request(call(f"burst {BURSTS[1]}"))
    with Client.connected(port) as client:
        began = time.monotonic()
        client.connection.sendall(raw)
        client.read_until(LAST_CHUNK)
        took = time.monotonic() - began
    assert events(bytes(client.read)) == (BURSTS[1], True)
    return BURSTS[1] / took


def costing(
    contestant: Contestant, one: Json, *, calls: int, at_once: int, events: int
) -> tuple[Crowd, float]:
    """Many calls at once, and the seconds of CPU that they cost the contestant."""
    pids = contestant.pids
    before = cpu(*pids)
    ended = crowd(contestant.port, [request(one)], calls=calls, at_once=at_once, events=events)
    assert ended.complete == calls, f"{contestant.name}: {ended} of {calls}"
    return ended, cpu(*pids) - before


def leave_line(contestant: Contestant) -> float:
    """Seconds from the leaving of a client in line until the gateway shows its place as free."""
    gateway = contestant.running
    assert gateway is not None
    with Client.calling(contestant.port, call("prefill", model=SINGLE)) as first:
        first.read_until(b"HTTP/1.1 200")
        with Client.calling(contestant.port, call("hello", model=SINGLE)) as second:
            until(lambda: waiting(gateway, SINGLE) or None)
            return leave(gateway, second, SINGLE)


if __name__ == "__main__":
    sys.exit(main())
