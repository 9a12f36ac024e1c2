"""
Whether it stays whole: half an hour of what clients do, on two real models, without a fault.

``python -m bench.load [--minutes 30] [--seed N] [--json FILE] [--folder DIR]`` starts a gateway
with both embedded servers as its children.  Sessions come, go on with their conversations, send
side calls and leave for good.  Beside them clients leave at each stage of a call, read slowly,
send what is malformed, and watch the page, ``/status`` and ``/metrics``.

The exit status is 0 if every budget below is met: no call lost, and all that was taken given back.
A call is lost if its client stayed and got neither a complete answer nor a refusal that is
documented for it.  `bench.soak` does the same with faults.
"""

from __future__ import annotations

import argparse
import math
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from select import select
from threading import Event, Lock, Thread
from typing import Any, Final

import attrs
import orjson

from bench.client import LAST_CHUNK, Client, request, unchunked
from bench.house import House, Size
from bench.persistent import Call, Ended, Outcome, ask, told
from bench.report import GATEWAY, Budget, Results, table
from bench.sessions import Deck, Session, unfinished
from bench.waiting import show
from tests.e2e.clients import eventually
from tests.e2e.stack import GEMMA, SMOLLM, free_port, start_gateway
from tests.e2e.test_malformed_live import throw
from tests.web.test_malformed import KINDS, Kind, check

Json = Any

#: Sessions at once: more than there are slots, so that there is a line.
SESSIONS: Final = 6

#: Seconds between two looks at the gateway's memory, and between two lines of the report.
LOOK: Final = 1.0
LINE: Final = 60.0

#: Seconds that the last calls get to end; looks for which a gateway at rest stays the same; and
#: seconds after which it is taken as it is.
LAST_CALLS: Final = 400
STILL: Final = 10
REST: Final = 300
STOP: Final = 90

#: Where clients leave, in the order in which a call gets there.
STAGES: Final = ("before the status", "in line", "in prefill", "mid-stream")

#: The gateway of `bench.load` has no token and takes long bodies.
MALFORMED: Final = tuple(kind for kind in KINDS if kind.status not in (401, 413))


def most(what: str, bound: float) -> Budget:
    """A budget for the row `what`."""
    return Budget(what, bound, lambda results: results.of(what))


BUDGETS: Final = (
    most("calls lost", 0),
    most("calls not ended", 0),
    most("kinds of calls without an answer", 0),
    most("permits out at the end", 0),
    most("records open at the end", 0),
    most("file descriptors left", 0),
    most("timers left", 0),
    most("children left", 0),
    most("threads more", 8),  # Twisted's pool begins its ten when they are needed
    most("memory grows, MB", 20),
    most("servers started anew", 0),
    most("tracebacks and the like in the log", 0),
    most("exit status", 0),
)


def main() -> int:
    """A table; 0 if all budgets are met."""
    options = argparse.ArgumentParser(prog="python -m bench.load")
    options.add_argument("--minutes", type=float, default=30)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--json", type=Path, help="where the figures go as JSON, too")
    options.add_argument("--folder", type=Path, help="an empty one; keeps state and logs")
    given = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="claudegw-load-") as name:
        folder = given.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        house = started(folder)
        try:
            load = Load(house, random.Random(given.seed))
            load.run(60 * given.minutes)
        finally:
            status = house.gateway.stop(STOP)
        return report(load, status, folder, given.json)


def started(folder: Path) -> House:
    """A gateway that is up, with two models, each of them its child."""
    tiers = {}
    for name, model in (("main", GEMMA), ("small", SMOLLM)):
        flags = (*model, "--ctx-size", "8192", "--batch-size", "128", "--cache-ram", "256")
        command = ["python", "-m", "gateway.llama.embedded", *flags]
        url = f"http://127.0.0.1:{free_port()}"
        tiers[name] = {"url": url, "slots": 2, "server": {"command": command}}
    route = '\n\n[[route]]\nmodel = "*haiku*"\ntier = "small"'
    house = House(start_gateway(folder, tiers, route))
    if not eventually(house.is_up, 300):
        house.gateway.stop(STOP)
        raise AssertionError(house.log()[-2000:])
    return house


# --- what others do -------------------------------------------------------------------------------


def leave(house: House, body: Json, wanted: str) -> str:
    """Call, and leave at the stage `wanted`, or at the next one that is seen; which one it was."""
    with Client.calling(house.gateway.port, body) as client:
        if wanted == "before the status":
            return wanted
        while wanted != "mid-stream":
            has_answer = bool(select([client.connection], (), (), 0.1)[0])
            stage = stage_of(house.status(), body["model"])
            if stage and STAGES.index(stage) >= STAGES.index(wanted):
                return stage
            if has_answer and stage is None:
                return "after the answer"
        client.read_until(b"content_block_delta")
        return wanted


def stage_of(status: Json, model: str) -> str | None:
    """How far the one call for `model` is; None where there is none."""
    for call in status["calls"]:
        if call["model"] == model:
            if call["outcome"] == "waiting":
                return "in line"
            return "in prefill" if call["first"] is None else "mid-stream"
    return None


def read_slowly(house: House, body: Json) -> None:
    """A whole answer, in small pieces with pauses."""
    with Client.calling(house.gateway.port, body) as client:
        client.connection.settimeout(300)
        while not client.read.endswith(LAST_CHUNK):
            data = client.connection.recv(64)
            assert data, f"cut: {bytes(client.read[-200:])!r}"
            client.read.extend(data)
            time.sleep(0.01)
    assert client.read.startswith(b"HTTP/1.1 200 "), bytes(client.read[:300])
    assert not unfinished(told(unchunked(bytes(client.read))))


def send_wrongly(house: House, kind: Kind) -> None:
    """A malformed request, and the refusal that it must get."""
    check(kind, *throw(house.gateway.port, kind.raw))


def send_too_much(house: House) -> None:
    """A prompt that does not fit, and the words that Claude Code compacts on."""
    words = "gate " * 6000
    body = {"model": "any", "max_tokens": 9, "messages": [{"role": "user", "content": words}]}
    status, _, raw = throw(house.gateway.port, request(body))
    assert (status, b"prompt is too long: " in raw) == (400, True), raw[:300]


def look_at(house: House, path: str) -> None:
    """What is watched."""
    status, raw = house.gateway.ask_raw(path)
    assert status == 200, f"{status} {raw[:200]!r}"
    assert raw


def keep_page_open(house: House, is_over: Callable[[], bool]) -> None:
    """The page's events until then; it is never silent for a minute."""
    with Client.connected(house.gateway.port) as client:
        client.connection.sendall(b"GET /page/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        client.read_until(b"data: ")
        assert client.read.startswith(b"HTTP/1.1 200 "), bytes(client.read[:300])
        while not is_over():
            client.receive()
            client.read.clear()


def is_past(end: float) -> bool:
    """Whether that time is over."""
    return time.monotonic() > end


# --- the run --------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Load:
    """
    One run.

    Attributes:
        house: the gateway.
        dice: decides what everybody does.
        ended: what became of the calls.
        sizes: of the gateway, at rest, then every minute, then at rest.
        peak: the most memory that was seen, in MB.
        unended: clients that were not through.
        pids: of the servers at the start.
        status: what ``/status`` said at the end.
        missing: kinds of calls that had no answer.
        seconds: how long the clients were there.
        sessions: how many there were.
    """

    house: House
    dice: random.Random
    ended: list[Ended] = attrs.field(factory=list, init=False)
    sizes: list[Size] = attrs.field(factory=list, init=False)
    peak: float = attrs.field(default=0.0, init=False)
    unended: int = attrs.field(default=0, init=False)
    pids: set[int] = attrs.field(factory=set, init=False)
    status: Json = attrs.field(default=None, init=False)
    missing: set[str] = attrs.field(factory=set, init=False)
    seconds: float = attrs.field(default=0.0, init=False)
    sessions: int = attrs.field(default=0, init=False)
    _deck: Deck = attrs.field(init=False)
    _over: Event = attrs.field(factory=Event, init=False)
    _lock: Lock = attrs.field(factory=Lock, init=False)

    def __attrs_post_init__(self) -> None:
        self._deck = Deck(random.Random(self.dice.random()))

    def run(self, seconds: float) -> None:
        """So many seconds of clients; then the last calls end, and the gateway comes to rest."""
        kinds = self._warm_up()
        self.sizes.append(self._rest())
        self.pids = {tier["process"]["pid"] for tier in self.house.status()["tiers"].values()}
        show("gateway at the start", str(self.sizes[0]))
        doing: list[Callable[[random.Random], None]] = [self._sit] * SESSIONS
        doing += [self._pass_by, self._pass_by, self._blunder, self._watch, self._peep, self._stay]
        threads = [
            Thread(target=do, args=(random.Random(self.dice.random()),), daemon=True)
            for do in doing
        ]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        try:
            self._look(began, seconds)
        finally:
            self._over.set()

        def is_over() -> bool:
            self.unended = sum(thread.is_alive() for thread in threads)
            return not self.unended

        eventually(is_over, LAST_CALLS, LOOK)
        self.seconds = time.monotonic() - began
        self.sizes.append(self._rest(self.sizes[0]))
        self.status = self.house.status()
        answered = {each.call.kind for each in self.ended if each.outcome is Outcome.RIGHT}
        self.missing = kinds - answered

    def _warm_up(self) -> set[str]:
        """Each kind once, for what every gateway needs once is no leak; the kinds."""
        first = self._session(random.Random(self.dice.random()))
        for call in first.every():
            self._ask(first, None, call)
        dice = random.Random(self.dice.random())
        self._try("slow reader", partial(read_slowly, self.house, self._streamed(dice)))
        self._try("malformed, refused", partial(send_wrongly, self.house, MALFORMED[0]))
        self._try("too long, refused", partial(send_too_much, self.house))
        for path in WATCHED:
            self._try(f"watch {path}", partial(look_at, self.house, path))
        self._try("page kept open", partial(keep_page_open, self.house, lambda: True))
        wrong = [each for each in self.ended if each.outcome is not Outcome.RIGHT]
        assert not wrong, wrong
        kinds = {each.call.kind for each in self.ended}
        self.ended.clear()
        return kinds

    def _look(self, began: float, seconds: float) -> None:
        """The most memory that is taken, and a line every minute."""
        next_line = began + LINE
        while (now := time.monotonic()) < began + seconds:
            size = Size.of(self.house.gateway)
            self.peak = max(self.peak, size.memory)
            if now >= next_line:
                next_line += LINE
                self.sizes.append(size)
                minute, calls = (now - began) / 60, len(self.ended)
                print(f"minute {minute:.0f}: {calls} calls, {size}", flush=True)
            time.sleep(LOOK)

    def _rest(self, before: Size | None = None) -> Size:
        """What the gateway takes once that is the same, and no more than `before`."""
        end = time.monotonic() + REST
        looks: list[Size] = []
        while True:
            looks.append(Size.of(self.house.gateway))
            earlier, now = looks[-2 * STILL : -STILL], least(looks[-STILL:])
            is_still = len(earlier) == STILL and least([*earlier, looks[-1]]) == now
            has_given_back = before is None or (
                now.files <= before.files and now.timers <= before.timers
            )
            is_at_rest = is_still and has_given_back and self.house.is_idle()
            if is_at_rest or time.monotonic() > end:
                return now
            time.sleep(LOOK)

    # --- clients ----------------------------------------------------------------------------------

    def _sit(self, dice: random.Random) -> None:
        """One session after the other, on a connection that is kept or on one for each call."""
        while not self._over.is_set():
            session = self._session(dice)
            kept = None
            if dice.random() < 0.5:
                kept = HTTPConnection("127.0.0.1", self.house.gateway.port, timeout=300)
            for _ in range(dice.randint(3, 15)):
                session.ask(partial(self._ask, session, kept))
                if self._over.wait(dice.uniform(0, 2)):
                    break
            if kept is not None:
                kept.close()
            self._over.wait(dice.uniform(0, 4))

    def _pass_by(self, dice: random.Random) -> None:
        """Clients that leave, and one that reads slowly."""
        while not self._over.wait(dice.uniform(0, 4)):
            body = self._streamed(dice)
            if dice.random() < 0.2:
                self._try("slow reader", partial(read_slowly, self.house, body))
            else:
                leaves = partial(leave, self.house, body, dice.choice(STAGES))
                self._try("leaves", leaves, leaves=True)

    def _blunder(self, dice: random.Random) -> None:
        """Requests that are refused."""
        while not self._over.wait(dice.uniform(0, 2)):
            if dice.random() < 0.05:
                self._try("too long, refused", partial(send_too_much, self.house))
            else:
                wrong = partial(send_wrongly, self.house, dice.choice(MALFORMED))
                self._try("malformed, refused", wrong)

    def _watch(self, dice: random.Random) -> None:
        """Somebody who looks at everything."""
        while not self._over.wait(dice.uniform(0, 1)):
            path = dice.choice(WATCHED)
            self._try(f"watch {path}", partial(look_at, self.house, path))

    def _peep(self, dice: random.Random) -> None:
        """Pages that are opened and closed."""
        while not self._over.wait(dice.uniform(0, 2)):
            end = time.monotonic() + dice.uniform(0, 10)
            looks = partial(keep_page_open, self.house, partial(is_past, end))
            self._try("page kept open", looks)

    def _stay(self, _dice: random.Random) -> None:
        """A page that stays open."""
        self._try("page kept open", partial(keep_page_open, self.house, self._over.is_set))

    def _session(self, dice: random.Random) -> Session:
        with self._lock:
            self.sessions += 1
            return Session(self.sessions, dice, deck=self._deck)

    def _streamed(self, dice: random.Random) -> Json:
        """A turn of a session that nobody goes on with; every other one has a long new text."""
        session = self._session(dice)
        body = {**session.next(), "stream": True, "model": f"walker {session.number}"}
        if dice.random() < 0.5:
            body["system"] = " ".join(f"Wall {session.number} {n} is high." for n in range(150))
        return body

    def _ask(self, session: Session, kept: HTTPConnection | None, call: Call) -> Ended:
        ended = ask(self.house.gateway.port, session.headers, call, kept=kept)
        self._note(ended)
        return ended

    def _try(self, kind: str, do: Callable[[], str | None], *, leaves: bool = False) -> None:
        """Do it, and note what became of it; where one `leaves`, `do` says at which stage."""
        began, outcome, why = time.monotonic(), Outcome.RIGHT, ""
        try:
            stage = do()
        except Exception as error:  # noqa: BLE001  # whatever it is, it is no answer
            outcome, why = Outcome.LOST, f"{type(error).__name__}: {error}"
        else:
            if leaves:
                kind, outcome = f"leaves {stage}", Outcome.LEFT
        self._note(Ended(Call(kind, None), outcome, (), time.monotonic() - began, why))

    def _note(self, ended: Ended) -> None:
        if ended.outcome is Outcome.LOST:
            print(f"LOST after {ended.seconds:.1f} s: {ended.call.kind}: {ended.why}", flush=True)
            print(f"  sent again because: {'; '.join(ended.again) or 'never'}", flush=True)
        with self._lock:
            self.ended.append(attrs.evolve(ended, call=Call(ended.call.kind, None), answer=None))


#: What is watched.
WATCHED: Final = ("/status", "/metrics", "/", "/page/page.js", "/healthz")


# --- what is said of it ---------------------------------------------------------------------------


def least(looks: Sequence[Size]) -> Size:
    """
    The least of each figure, and the last of memory.

    Each look has a connection itself, and a gateway asks its servers now and then.
    """
    files, threads, children, timers = (
        min(getattr(look, name) for look in looks)
        for name in ("files", "threads", "children", "timers")
    )
    return Size(looks[-1].memory, files, threads, children, timers)


def results(load: Load, status: int) -> Results:
    """The figures that `BUDGETS` are for; `status` is what the gateway ended with."""
    start, *_, end = load.sizes
    outcomes = Counter(each.outcome for each in load.ended)
    tiers = load.status["tiers"].values()
    found = Results()
    for what, figure in {
        "calls lost": outcomes[Outcome.LOST],
        "calls not ended": load.unended,
        "kinds of calls without an answer": len(load.missing),
        "permits out at the end": sum(
            tier[where] for tier in tiers for where in ("running", "waiting", "settling")
        ),
        "records open at the end": len(load.status["calls"]),
        "file descriptors left": end.files - start.files,
        "timers left": end.timers - start.timers,
        "children left": end.children - start.children,
        "threads more": end.threads - start.threads,
        "memory grows, MB": end.memory - start.memory,
        "servers started anew": len(load.pids - {tier["process"]["pid"] for tier in tiers}),
        "tracebacks and the like in the log": len(load.house.cries()),
        "exit status": abs(status),
    }.items():
        found.add(what, GATEWAY, figure)
    return found


def calls(ended: Sequence[Ended]) -> dict[str, dict[str, float]]:
    """For each kind how many calls, what became of them, and the seconds of those answered."""
    rows: dict[str, dict[str, float]] = {}
    for kind in sorted({each.call.kind for each in ended}):
        those = [each for each in ended if each.call.kind == kind]
        outcomes = Counter(each.outcome for each in those)
        row: dict[str, float] = {"calls": len(those)}
        row |= {each.value: outcomes[each] for each in Outcome if outcomes[each]}
        row |= {"sent again": again} if (again := sum(len(each.again) for each in those)) else {}
        took = sorted(each.seconds for each in those if each.outcome is Outcome.RIGHT)
        if took:
            row["p50, s"] = statistics.median(took)
            row["p95, s"] = took[math.ceil(0.95 * len(took)) - 1]
        rows[kind] = row
    return rows


def report(load: Load, status: int, folder: Path, file: Path | None) -> int:
    """The tables; 0 if all budgets are met."""
    kinds, found = calls(load.ended), results(load, status)
    size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()) / 1e6
    columns = list(dict.fromkeys(name for row in kinds.values() for name in row))
    columns.sort(key=lambda name: name in ("p50, s", "p95, s"))
    print(table({k: {n: [v] for n, v in row.items()} for k, row in kinds.items()}, columns))
    show("calls, sessions, minutes", f"{len(load.ended)}, {load.sessions}, {load.seconds / 60:.1f}")
    for minute, each in enumerate(load.sizes[1:-1], 1):
        show(f"gateway after {minute} min", str(each))
    show("gateway at the start", str(load.sizes[0]))
    show("gateway at the end", str(load.sizes[-1]))
    show("most memory", f"{load.peak:.1f} MB")
    show("state folder", f"{size:.1f} MB")
    show("kinds without an answer", ", ".join(sorted(load.missing)) or "none")
    verdicts = [budget.judged(found) for budget in BUDGETS]
    print(*verdicts, sep="\n")
    is_good = all(verdict.is_met for verdict in verdicts)
    show("all is well", "yes" if is_good else "NO")
    if file is not None:
        said = {
            "minutes": load.seconds / 60,
            "calls": kinds,
            "sizes": [attrs.asdict(each) for each in load.sizes],
            "peak": load.peak,
            "state_mb": size,
            "budgets": [verdict.json() for verdict in verdicts],
            "all_is_well": is_good,
        }
        file.write_bytes(orjson.dumps(said, option=orjson.OPT_INDENT_2))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
