"""
What each abuse of the port gets, and what a normal call beside it pays.

``python -m bench.abuse [--seconds S]`` starts a gateway in front of a fake server
(`bench.fast_llama`), and a process that makes one normal call after another.  Each abuse goes on
for S seconds (`tests.web.test_abuse.ABUSES`, and here what needs time or many sockets).  It prints
a table and then the same as JSON, and ends with 1 if an abuse got something else than it should.

Ten thousand connections need ``ulimit -Hn`` of 12 000.
"""

from __future__ import annotations

import argparse
import resource
import select
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import orjson
import psutil

from bench.client import call, until
from bench.fast_llama import FastLlama
from bench.processes import cpu, resident
from tests.e2e.stack import ROOT, TWISTD, Running, configure, free_port, start, start_gateway
from tests.web.test_abuse import ABUSES, HEALTH, LIMIT, POST, Abuse, chunked, head, post

#: What the gateway is given, so that nobody has to wait for a minute.
HEAD: Final = 2
BODY: Final = 3
IDLE: Final = 4
UNREAD: Final = 12  # longer than it takes until a ping is written

#: Seconds until a client that reads nothing is cut: each ping may still find room in the system.
RESET: Final = 60

LIMITS: Final = (
    f"body_limit = {LIMIT}\nhead_timeout = {HEAD}\nbody_timeout = {BODY}\nidle_timeout = {IDLE}\n"
    f"unread_timeout = {UNREAD}\n"
)

#: Connections of the flood, and those of each source address.
FLOOD: Final = 10_000
SLOW: Final = 200

#: Descriptors of a gateway that has too few.
FEW: Final = 64

#: Seconds between two normal calls, and how long one may take.
PAUSE: Final = 0.005
PATIENCE: Final = 30.0

#: Seconds without an abuse before each.
QUIET: Final = 0.4

#: The prompt of a normal call.
WORDS: Final = "gate " * 800


# --- normal calls ---------------------------------------------------------------------------------


def beside(port: int) -> None:
    """Make normal calls until the end: a line for each, its start and the seconds that it took."""
    raw = post(orjson.dumps(call("hello", system=WORDS)))
    while True:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            connection.sendall(raw)
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):
                more = connection.recv(65536)
                if not more:
                    break
                answer += more
        whole = answer.startswith(b"HTTP/1.1 200") and b"message_stop" in answer
        print(began, time.monotonic() - began if whole else "lost", flush=True)
        time.sleep(PAUSE)


@attrs.frozen
class Beside:
    """The process that makes them."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    @contextmanager
    def calling(cls, folder: Path, port: int) -> Iterator[Beside]:
        log = folder / f"beside-{port}.log"
        command = [sys.executable, "-m", "bench.abuse", "--beside", str(port)]
        running = start(command, port, log)
        try:
            found = cls(running.process, log)
            until(lambda: found.calls(0.0) or None)
            time.sleep(0.5)  # the first ones pay for what comes after them
            yield found
        finally:
            running.process.kill()
            running.process.wait()

    def calls(self, since: float, to: float = float("inf")) -> list[float | None]:
        """The seconds of those that began in this time; None for one that was lost."""
        found: list[float | None] = []
        for line in self.log.read_text().splitlines():
            began, _, took = line.partition(" ")
            if took and since <= float(began) <= to:
                found.append(None if took == "lost" else float(took))
        return found


# --- what is thrown -------------------------------------------------------------------------------


@attrs.frozen
class Result:
    """
    One row.

    Attributes:
        abuse: its name.
        times: how often it was done.
        got: what it got.
        should: what it should have got.
        calls: of the normal calls beside it, the seconds.
        before: of those just before it.
    """

    abuse: str
    times: int
    got: str
    should: str
    calls: list[float | None]
    before: list[float | None] = attrs.field(factory=list)

    @property
    def is_right(self) -> bool:
        return self.got == self.should and None not in self.calls

    def figures(self) -> dict[str, Any]:
        """What is printed, times in ms."""
        before, beside = _ms(self.before), _ms(self.calls)
        return {
            "abuse": self.abuse,
            "times": self.times,
            "got": self.got,
            "right": self.is_right,
            "calls": len(self.calls),
            "lost": self.calls.count(None),
            "p50 before": statistics.median(before) if before else None,
            "max before": max(before, default=None),
            "p50 beside": statistics.median(beside) if beside else None,
            "max beside": max(beside, default=None),
        }


def _ms(calls: list[float | None]) -> list[float]:
    return [round(seconds * 1000, 2) for seconds in calls if seconds is not None]


def connect(port: int, number: int = 0) -> socket.socket:
    """A connection; on Linux from one of several addresses, whose ports are not soon used up."""
    source = (f"127.0.0.{2 + number % 8}", 0) if sys.platform == "linux" else None
    return socket.create_connection(("127.0.0.1", port), PATIENCE, source)


def thrown(raw: bytes, port: int) -> str:
    """These bytes alone, and what is answered before the client ends the connection."""
    with connect(port) as connection:
        with suppress(OSError):
            connection.sendall(raw)
        return statuses(connection)


def statuses(connection: socket.socket, quiet: float = 5.0) -> str:
    """The status of the first answer, and whether the connection ended with it."""
    connection.settimeout(quiet)
    answer = b""
    try:
        while b"\r\n\r\n" not in answer:
            more = connection.recv(65536)
            if not more:
                return "closed" if not answer else "cut"
            answer += more
        if b"connection: close" not in answer.lower():
            return answer[9:12].decode()
        while connection.recv(65536):
            pass
    except TimeoutError:
        return "nothing"
    except OSError:
        return "reset" if not answer else f"{answer[9:12].decode()}, reset"
    return f"{answer[9:12].decode()}, closed"


def dripped(raw: bytes, every: float, port: int) -> Counter[str]:
    """`SLOW` clients, each of which sends a byte each `every` seconds until it has an answer."""
    got: Counter[str] = Counter()
    clients = {connect(port, number): 0 for number in range(SLOW)}
    while clients:
        for connection, sent in list(clients.items()):
            with suppress(OSError):
                connection.sendall(raw[sent : sent + 1])
            clients[connection] = sent + 1
        time.sleep(every)
        for connection in _readable(clients):
            got[statuses(connection)] += 1
            connection.close()
            del clients[connection]
    return got


def held(raw: bytes, port: int, count: int = SLOW) -> Counter[str]:
    """So many clients, each of which sends this and then waits for what comes."""
    got: Counter[str] = Counter()
    clients = {}
    for number in range(count):
        connection = connect(port, number)
        connection.sendall(raw)
        clients[connection] = number
    while clients:
        for connection in _readable(clients, 10):
            got[statuses(connection)] += 1
            connection.close()
            del clients[connection]
    return got


def _readable(connections: Any, seconds: float = 0) -> list[socket.socket]:
    with selectors.DefaultSelector() as found:
        for connection in connections:
            found.register(connection, selectors.EVENT_READ)
        return [key.fileobj for key, _ in found.select(seconds)]  # type: ignore[misc]  # sockets alone


def pipelined(count: int, port: int) -> str:
    """So many requests in one segment, or as many as go into one."""
    with connect(port) as connection:
        connection.sendall(head(HEALTH) * (count - 1) + head(HEALTH, "connection: close"))
        answer = _all(connection)
    return f"{answer.count(b'HTTP/1.1 200')} x 200"


def streamed_and_more(port: int) -> str:
    """A stream, and a request behind it in the same segment."""
    stream = post(orjson.dumps(call("burst 10")))
    with connect(port) as connection:
        connection.sendall(stream + head(HEALTH, "connection: close"))
        first, _, second = _all(connection).partition(b"message_stop")
    whole = first.startswith(b"HTTP/1.1 200") and b'{"status":"ok"}' in second
    return "both, in order" if whole else "mixed"


def unread(port: int) -> str:
    """A thousand requests for the page, and nothing is read of the answers."""
    with connect(port) as connection:
        connection.setblocking(False)
        with suppress(BlockingIOError):
            connection.sendall(head("GET / HTTP/1.1") * 1000)
        time.sleep(0.3)
    return "closed by the client"


def unread_stream(port: int) -> str:
    """An answer of 64 MB of which nothing is read, until the connection is reset."""
    with connect(port) as connection:
        connection.sendall(post(orjson.dumps(call("flood 64000000"))))
        reset = select.poll()
        reset.register(connection, 0)  # no bytes are waited for, only its end
        return "cut" if reset.poll(1000 * RESET) else "kept"


def half_closed(raw: bytes, port: int) -> str:
    """A request, and then an end of the client's side alone."""
    with connect(port) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        answer = _all(connection)
    status = answer[9:12].decode() or "nothing"
    return f"{status}, ended" if b"message_stop" not in answer else f"{status}, whole"


def half_closed_later(port: int) -> str:
    """The same, in the middle of a stream."""
    with connect(port) as connection:
        connection.sendall(post(orjson.dumps(call("drip"))))
        answer = b""
        while b"content_block_delta" not in answer:
            answer += connection.recv(65536)
        connection.shutdown(socket.SHUT_WR)
        answer += _all(connection)
    return "ended" if b"0\r\n\r\n" not in answer[-5:] else "whole"


def of_http_1_0(port: int) -> str:
    """A stream for a client that knows no chunks."""
    with connect(port) as connection:
        connection.sendall(post(orjson.dumps(call("burst 10")), version="1.0"))
        answer = _all(connection)
    plain = b"chunked" not in answer.lower() and answer.startswith(b"HTTP/1.0 200")
    return "200, whole" if plain and answer.endswith(b'"message_stop"}\n\n') else "broken"


def expecting(port: int) -> str:
    """A client that asks whether it may send."""
    body = orjson.dumps(call("burst 10"))
    with connect(port) as connection:
        lines = ("expect: 100-continue", f"content-length: {len(body)}", "connection: close")
        connection.sendall(head(POST, *lines))
        may = connection.recv(65536)
        connection.sendall(body)
        answer = _all(connection)
    return f"{may[9:12].decode()}, {answer[9:12].decode()}"


def endless(port: int) -> str:
    """A body that is said to be short enough, in chunks without end."""
    with connect(port) as connection:
        connection.sendall(head(POST, "transfer-encoding: chunked"))
        with suppress(OSError):
            for _ in range(100_000):
                connection.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
                if _readable([connection]):
                    break
        return statuses(connection)


def _all(connection: socket.socket) -> bytes:
    answer = b""
    with suppress(ConnectionResetError):
        while more := connection.recv(65536):
            answer += more
    return answer


def over_and_over(
    seconds: float, do: Callable[[int], str], port: int, pause: float = 0.001
) -> Counter[str]:
    """The same for so many seconds."""
    got: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        got[do(port)] += 1
        time.sleep(pause)
    return got


def expected(abuse: Abuse) -> str:
    """What it should get."""
    return f"{abuse.status}, closed" if abuse.ends else f"{abuse.status}"


def everything(seconds: float) -> Iterator[tuple[str, str, Callable[[int], Counter[str]]]]:
    """Each abuse: its name, what it should get, and how it is done."""

    def repeated(do: Callable[[int], str]) -> Callable[[int], Counter[str]]:
        return partial(over_and_over, seconds, do)

    for abuse in ABUSES:
        yield abuse.name, expected(abuse), repeated(partial(thrown, abuse.raw))
    stream, slow = post(orjson.dumps(call("drip"))), "408, closed"
    waiting = post(orjson.dumps(call("silence")))
    yield "a stream over HTTP/1.0", "200, whole", repeated(of_http_1_0)
    yield "Expect", "100, 200", repeated(expecting)
    yield "a body without end", "413, closed", repeated(endless)
    yield "100 requests in a segment", "100 x 200", repeated(partial(pipelined, 100))
    yield "a stream and a request", "both, in order", repeated(streamed_and_more)
    yield "1000 answers that are not read", "closed by the client", repeated(unread)
    yield "a stream that is not read", "cut", repeated(unread_stream)
    yield "half-closed, answered", "200, ended", repeated(partial(half_closed, head(HEALTH)))
    yield "half-closed in a body", "400, ended", repeated(partial(half_closed, stream[:-9]))
    # A slot whose client has left is not used again at once.
    now_and_then = partial(over_and_over, seconds, pause=0.05)
    yield "half-closed, waiting", "400, ended", partial(now_and_then, partial(half_closed, waiting))
    yield "half-closed in a stream", "ended", partial(now_and_then, half_closed_later)
    yield f"{SLOW} slow headers", slow, partial(dripped, head(HEALTH, "x: " + "y" * 999), 0.05)
    yield f"{SLOW} slow bodies", slow, partial(dripped, head(POST, "content-length: 9999"), 0.05)
    yield f"{SLOW} lengths too long", slow, partial(held, head(POST, "content-length: 9") + b"{}")
    yield f"{SLOW} sizes of 900 digits", slow, partial(held, chunked(b"f" * 900 + b"\r\n{}\r\n"))
    yield f"{SLOW} that say nothing", "closed", partial(held, b"")


# --- ten thousand ---------------------------------------------------------------------------------


def flood(beside: Beside, port: int, gateway: Running, most: int) -> Iterator[Result]:
    """Ten thousand connections that say nothing, at a limit of `most`."""
    quiet = time.monotonic()
    time.sleep(2)
    began = time.monotonic()
    idle = [connect(port, number) for number in range(FLOOD)]
    opened = time.monotonic()
    time.sleep(2)
    closed = len(_readable(idle))
    memory = resident(gateway.process.pid)
    files = _files(gateway)
    ended = time.monotonic()
    name = f"{FLOOD} idle, {most} allowed"
    left = max(0, FLOOD - closed)
    room = min(most, FLOOD)
    got = "as many as may stay" if room - 32 <= left <= room + 32 else f"{left} stay"
    before = beside.calls(quiet, began)
    while_opening, then = beside.calls(began, opened), beside.calls(opened, ended)
    yield Result(f"{name}: coming", FLOOD, got, "as many as may stay", while_opening, before)
    yield Result(f"{name}: there", FLOOD, "open", "open", then, before)
    print(f"# {left} stay; the gateway has {memory:.0f} MB and {files} files open", flush=True)
    for connection in idle:
        connection.close()
    until(lambda: _files(gateway) < 200 or None)


def too_few_files(folder: Path, llama: FastLlama) -> Iterator[Result]:
    """More connections than the gateway may have files open; then none, and calls again."""
    port = free_port()
    configure(folder, port, {"main": {"url": llama.url, "slots": 8}}, LIMITS)
    command = [str(TWISTD), "-n", "--pidfile=", "claudegw", "--config", str(folder / "gw.toml")]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, FEW))

    gateway = start(command, port, folder / "gateway.log", preexec_fn=limited, cwd=ROOT)
    try:
        gateway.wait("/healthz")
        clients = [connect(port, number) for number in range(3 * FEW)]
        time.sleep(0.5)
        used = cpu(gateway.process.pid)
        time.sleep(2)
        spent = cpu(gateway.process.pid) - used
        for client in clients:
            client.close()
        time.sleep(0.5)
        status, _ = gateway.ask("/v1/messages", call("burst 10") | {"stream": False})
        got = f"{'rests' if spent < 0.5 else f'{spent:.1f} s of CPU in 2 s'}, then {status}"
        yield Result(f"{3 * FEW} connections, {FEW} files", 3 * FEW, got, "rests, then 200", [])
    finally:
        gateway.stop()


# --- the report -----------------------------------------------------------------------------------


def show(result: Result) -> None:
    """One row."""
    row = result.figures()
    right = "" if row["right"] else f"  WRONG: should be {result.should}, lost {row['lost']}"
    took = [row[f"{what} {when}"] for when in ("before", "beside") for what in ("p50", "max")]
    shown = " ".join("       -" if each is None else f"{each:8.1f}" for each in took)
    what = f"{row['abuse'][:34]:34} {row['times']:6} {row['got'][:21]:21}"
    print(f"{what} {row['calls']:5} {shown}{right}", flush=True)


def done(name: str, should: str, do: Callable[[], Counter[str]], calls: Beside) -> Result:
    """One abuse, after a moment without."""
    quiet = time.monotonic()
    time.sleep(QUIET)
    began = time.monotonic()
    got = do()
    ended = time.monotonic()
    said = " / ".join(got) if len(got) == 1 else " / ".join(f"{n} x {g}" for g, n in got.items())
    before = calls.calls(quiet, began - PAUSE)
    return Result(name, sum(got.values()), said, should, calls.calls(began, ended), before)


def measure(seconds: float, folder: Path) -> Iterator[Result]:
    """Every row, as it is had."""
    with ExitStack() as over:
        llama = FastLlama.started(folder, slots=64)
        over.callback(llama.stop)
        tiers = {"main": {"url": llama.url, "slots": 64}}
        gateway = start_gateway(folder, tiers, LIMITS)
        over.callback(gateway.stop)
        with Beside.calling(folder, gateway.port) as calls:
            before, files = resident(gateway.process.pid), _files(gateway)
            for name, should, do in everything(seconds):
                yield done(name, should, partial(do, gateway.port), calls)
            after = resident(gateway.process.pid)
            until(lambda: _files(gateway) <= files + 4 or None)
            print(f"# memory {before:.0f} MB before, {after:.0f} MB after; no file left open")
        for most in (2000, FLOOD + 500):
            place = folder / str(most)
            place.mkdir()
            keys = f"max_connections = {most}\nidle_timeout = 600\n"
            gateway = start_gateway(place, tiers, keys)
            over.callback(gateway.stop)
            with Beside.calling(folder, gateway.port) as calls:
                yield from flood(calls, gateway.port, gateway, most)
        (folder / "few").mkdir()
        yield from too_few_files(folder / "few", llama)
        for log in folder.rglob("gateway.log"):
            lines = log.read_text().splitlines()
            failures = sum("Traceback" in line for line in lines)
            print(f"# {log.parent.name}: {len(lines)} lines in the log, {failures} tracebacks")


def _files(gateway: Running) -> int:
    return psutil.Process(gateway.process.pid).num_fds()


def main(arguments: Sequence[str] | None = None) -> int:
    """A table; 0 if each abuse got what it should, and no normal call was lost."""
    options = argparse.ArgumentParser(prog="python -m bench.abuse")
    options.add_argument("--seconds", type=float, default=0.8, help="for each abuse")
    options.add_argument("--beside", type=int, metavar="PORT", help=argparse.SUPPRESS)
    given = options.parse_args(arguments)
    if given.beside:
        beside(given.beside)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    times = f"{'calls':>5} {'p50 ms':>8} {'max':>8} {'p50 ms':>8} {'max':>8}"
    print(f"{'':69} {'just before':>17} {'beside':>17}")
    print(f"{'abuse':34} {'times':>6} {'got':21} {times}")
    results = []
    with tempfile.TemporaryDirectory(prefix="claudegw-abuse-") as name:
        for result in measure(given.seconds, Path(name)):
            show(result)
            results.append(result)
    print(orjson.dumps([result.figures() for result in results]).decode())
    return 0 if all(result.is_right for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
