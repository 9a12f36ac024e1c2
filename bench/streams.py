"""
What the gateway adds to a stream, and how fast it lets go of one.

``python -m bench.streams`` prints a table and then the same figures as JSON.  What is compared is
measured through the gateway and directly, in turns, on the same fake server (`bench.fast_llama`).
"""

from __future__ import annotations

import re
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import orjson

from bench.fast_llama import FastLlama
from tests.e2e.stack import Running, start_gateway

Json = Any
T = TypeVar("T")

MB: Final = 1_000_000

#: What the upstream offers to a client that does not read.
OFFERED: Final = 400 * MB

#: Where a call can be when its client leaves: the order that brings it there, and what the client
#: has read by then.
STAGES: Final = {
    "before the status": ("silence", b""),
    "in prefill": ("prefill", b"HTTP/1.1 200"),
    "mid-stream": ("drip", b"content_block_delta"),
    "stalled": (f"flood {OFFERED}", b"content_block_delta"),
}

LEAVING_RUNS: Final = 20
STREAM_RUNS: Final = 60
PACED_EVENTS: Final = 25
BURST_RUNS: Final = 11
BURST_EVENTS: Final = 5000


# --- a client -------------------------------------------------------------------------------------


@attrs.frozen
class Client:
    """
    A client that reads when it is told to, and at no other time.

    Attributes:
        connection: to the gateway, or to a server.
        read: all that it has read.
    """

    connection: socket.socket
    read: bytearray = attrs.field(factory=bytearray, init=False)

    @classmethod
    @contextmanager
    def calling(cls, port: int, body: Json) -> Iterator[Client]:
        """One that has sent a call, and leaves when the block does."""
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            client = cls(connection)
            client.send(body)
            yield client

    def send(self, body: Json) -> None:
        """Send a call."""
        raw = orjson.dumps(body)
        head = (
            "POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n"
            "user-agent: claude-cli/2.1.330 (external, cli)\r\n"
            f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        self.connection.sendall(head.encode() + raw)

    def receive(self) -> bytes:
        """What has come since, at least one byte; raises EOFError at the end."""
        data = self.connection.recv(256 * 1024)
        if not data:
            raise EOFError(bytes(self.read[-200:]))
        self.read.extend(data)
        return data

    def read_until(self, mark: bytes) -> None:
        """All up to `mark`; raises EOFError if it does not come."""
        unseen = 0
        while self.read.find(mark, unseen) < 0:
            unseen = max(0, len(self.read) - len(mark))
            self.receive()

    def leave(self) -> float:
        """Close the connection; the time of that."""
        now = time.monotonic()
        self.connection.close()
        return now


def call(order: str, **more: Json) -> dict[str, Json]:
    """A streamed call that `bench.fast_llama` understands."""
    messages = [{"role": "user", "content": order}]
    return {"model": "m", "max_tokens": 100, "stream": True, "messages": messages, **more}


def large(order: str) -> dict[str, Json]:
    """`order` in a body of 60 KB with 20 tools."""
    prose = "The quick brown fox jumps over the lazy dog. "
    field = {"type": "string", "description": prose * 4}
    schema = {"type": "object", "properties": {"path": field, "text": field}, "required": ["path"]}
    tools = [
        {"name": f"tool_{n}", "description": prose * 32, "input_schema": schema} for n in range(20)
    ]
    rest = 60_000 - len(orjson.dumps(tools))
    system = [{"type": "text", "text": (prose * 2000)[:rest]}]
    return call(order, tools=tools, system=system)


# --- what is looked at ----------------------------------------------------------------------------


def until(look: Callable[[], T | None], seconds: float = 30) -> T:
    """What `look` finds, once it finds something."""
    end = time.monotonic() + seconds
    while (found := look()) is None:
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)
    return found


def resident(pid: int) -> float | None:
    """The memory of a process, in MB; None where there is no /proc."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return None
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
    return int(found[1]) * 1024 / MB if found else None


def stands_still(llama: FastLlama, number: int, seconds: float = 1.0) -> int:
    """The bytes that call `number` was let write, once there were no more of them for so long."""
    seen, since = -1, time.monotonic()

    def look() -> int | None:
        nonlocal seen, since
        entry = llama.journal()[number]
        if entry["accepted"] != seen or not entry["paused"]:
            seen, since = entry["accepted"], time.monotonic()
        return seen if time.monotonic() - since > seconds else None

    return until(look)


def seen_leaving(llama: FastLlama, number: int) -> float:
    """When the upstream saw that the client of call `number` was gone."""
    left: float = until(lambda: llama.journal()[number]["left"])
    return left


# --- the figures ----------------------------------------------------------------------------------


def leaving(llama: FastLlama, port: int, stage: str) -> dict[str, float]:
    """Milliseconds from a client's leaving until the upstream knows, at one stage."""
    order, mark = STAGES[stage]
    took: list[float] = []
    for _ in range(LEAVING_RUNS):
        number = len(llama.journal())
        with Client.calling(port, call(order)) as client:
            until(partial(llama.entry, number))
            client.read_until(mark)
            if stage == "stalled":
                stands_still(llama, number, 0.1)
            at = client.leave()
            took.append(seen_leaving(llama, number) - at)
    return {"p50 ms": _p50(took), "max ms": max(took) * 1000}


def stalled(llama: FastLlama, gateway: Running) -> dict[str, float | None]:
    """What a client that does not read costs, while the upstream offers 400 MB."""
    before, number = resident(gateway.process.pid), len(llama.journal())
    with Client.calling(gateway.port, call(f"flood {OFFERED}")) as client:
        client.read_until(b"content_block_delta")
        accepted = stands_still(llama, number)
        after = resident(gateway.process.pid)
    return {"accepted MB": accepted / MB, "RSS before MB": before, "RSS after MB": after}


def first_byte(port: int) -> float:
    """Seconds from the sending of a body of 60 KB with 20 tools to the answer's first byte."""
    body = large("hello")
    with socket.create_connection(("127.0.0.1", port)) as connection:
        client, begun = Client(connection), time.monotonic()
        client.send(body)
        client.receive()
        took = time.monotonic() - begun
        client.read_until(b"message_stop")
    return took


def per_event(port: int) -> float:
    """Seconds from the upstream's writing of an event to the client's reading, at p50."""
    took: list[float] = []
    with Client.calling(port, large(f"paced {PACED_EVENTS}")) as client:
        while len(took) < PACED_EVENTS:
            data, now = client.receive(), time.monotonic()
            took += [now - float(at) for at in re.findall(rb'"text":"(\d+\.\d+)"', data)]
        client.read_until(b"message_stop")
    return statistics.median(took)


def burst(port: int) -> float:
    """Events a second of 5 000 at once, from the sending of the call to the last byte."""
    begun = time.monotonic()
    with Client.calling(port, call(f"burst {BURST_EVENTS}")) as client:
        client.read_until(b"message_stop")
        took = time.monotonic() - begun
    assert client.read.count(b"event: content_block_delta") == BURST_EVENTS
    return BURST_EVENTS / took


def compared(
    measure: Callable[[int], float], runs: int, direct: int, through: int
) -> tuple[float, float]:
    """The p50 of `measure` on two ports, in turns."""
    figures: dict[int, list[float]] = {direct: [], through: []}
    for _ in range(runs):
        for port, found in figures.items():
            found.append(measure(port))
    return statistics.median(figures[direct]), statistics.median(figures[through])


def _p50(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1000


def _added(pair: tuple[float, float]) -> dict[str, float]:
    direct, through = (seconds * 1000 for seconds in pair)
    return {"direct ms": direct, "gateway ms": through, "added ms": through - direct}


def figures(llama: FastLlama, gateway: Running) -> dict[str, dict[str, float | None]]:
    """All of them."""
    direct, through = llama.running.port, gateway.port
    compared(first_byte, 5, direct, through)  # the first calls pay for what comes after them
    first = compared(first_byte, STREAM_RUNS, direct, through)
    paced = compared(per_event, STREAM_RUNS // 3, direct, through)
    bursts = compared(burst, BURST_RUNS, direct, through)
    found: dict[str, dict[str, float | None]] = {
        "first byte of a 60 KB call": dict(_added(first)),
        "one event, paced": dict(_added(paced)),
        f"burst of {BURST_EVENTS}": {"direct events/s": bursts[0], "gateway events/s": bursts[1]},
        "client does not read": dict(stalled(llama, gateway)),
    }
    for stage in STAGES:
        found[f"client leaves {stage}"] = dict(leaving(llama, through, stage))
    return found


def main() -> None:
    """Measure, and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llama = FastLlama.started(folder, slots=64)
        gateway = start_gateway(folder, {"main": {"url": llama.url, "slots": 64}})
        try:
            found = figures(llama, gateway)
        finally:
            gateway.stop()
            llama.stop()
    for what, columns in found.items():
        shown = (f"{key} {value:,.3f}" for key, value in columns.items() if value is not None)
        print(f"{what:28} {'   '.join(shown)}")
    print(orjson.dumps(found).decode())


if __name__ == "__main__":
    main()
