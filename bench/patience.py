"""
Whether the real Claude Code waits: a prefill of 1 300 s, and 900 s in line behind another call.

``python -m bench.patience [--prefill S] [--line S] [VERSION ...]`` runs each Claude Code (as
``bin/get-clients`` installs them) with its own timers, not those that `claudegw settings` would
give it, on a llama-server whose model is a script.  It must ask once and show the one answer.
All runs go side by side; together they take as long as the longest one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any, Final

import orjson

from tests.e2e.clients import VERSIONS, Client, eventually
from tests.e2e.scripted_llama import Block, ScriptedLlama, Text
from tests.e2e.stack import Running, start_gateway

Json = Any

ANSWER: Final = "seven gates"

#: What `claudegw settings` prints so that no timer of the client's ends a long prefill.
TIMERS: Final = ("API_TIMEOUT_MS", "API_FORCE_IDLE_TIMEOUT", "CLAUDE_STREAM_IDLE_TIMEOUT_MS")

#: A call that is in the slot when the client comes.
OTHER: Final = {
    "model": "any",
    "max_tokens": 10,
    "stream": True,
    "messages": [{"role": "user", "content": "I was here first."}],
}


def main() -> int:
    """A table, a row each run; 0 if every client asked once and showed the answer."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--prefill", type=float, default=1300)
    options.add_argument("--line", type=float, default=900)
    options.add_argument("versions", nargs="*", default=VERSIONS)
    given = options.parse_args()
    runs: list[tuple[str, Callable[[str, float, Path], bool], float]] = []
    for version in given.versions:
        runs += [(version, in_prefill, given.prefill), (version, in_line, given.line)]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(runs)) as pool:
        places = [Path(name) / str(number) for number in range(len(runs))]
        ended = [
            pool.submit(run, version, seconds, place)
            for (version, run, seconds), place in zip(runs, places, strict=True)
        ]
        return 0 if min(each.result() for each in ended) else 1


def says(_: Json) -> Sequence[Block]:
    """The answer to everything."""
    return [Text(ANSWER)]


def in_prefill(version: str, seconds: float, place: Path) -> bool:
    """One prompt, evaluated for so long."""
    with ScriptedLlama(says, prefill=seconds).serving() as llama:
        gateway = begin(llama, place)
        try:
            return ask(version, f"{seconds:.0f} s of prefill", llama, gateway, place, others=0)
        finally:
            gateway.stop()


def in_line(version: str, seconds: float, place: Path) -> bool:
    """One prompt, behind another call that takes so long."""
    with ScriptedLlama(says, prefill=seconds).serving() as llama:
        gateway = begin(llama, place)
        try:
            other = Thread(target=first, args=(gateway,), daemon=True)
            other.start()
            assert eventually(lambda: llama.processing, 60)
            llama.prefill = 5
            return ask(version, f"{seconds:.0f} s in line", llama, gateway, place, others=1)
        finally:
            gateway.stop()


def first(gateway: Running) -> None:
    """The other call; nobody reads its answer to the end."""
    connection = HTTPConnection("127.0.0.1", gateway.port, timeout=7200)
    connection.request("POST", "/v1/messages", orjson.dumps(OTHER))
    connection.getresponse().read()
    connection.close()


def begin(llama: ScriptedLlama, place: Path) -> Running:
    """A gateway in front of `llama`."""
    (place / "gateway").mkdir(parents=True)
    return start_gateway(place / "gateway", {"main": {"url": llama.url, "slots": 1}})


def ask(
    version: str, what: str, llama: ScriptedLlama, gateway: Running, place: Path, others: int
) -> bool:
    """Let the client ask, and say what came of it."""
    client = Client.of(version, gateway, place)
    settings = orjson.loads(client.settings.read_bytes())
    for name in TIMERS:
        del settings["env"][name]
    client.settings.write_bytes(orjson.dumps(settings))
    began = time.monotonic()
    said = client.say("How many gates?", seconds=7200)
    asked = len(llama.asked) - others
    good = said.status == 0 and said.answer.strip() == ANSWER and asked == 1
    took = time.monotonic() - began
    print(
        f"{version:<10} {what:<20} asked {asked} time(s), exit {said.status},"
        f" {said.answer.strip()!r} after {took:.1f} s: {'good' if good else said.errors[:300]}",
        flush=True,
    )
    return good


if __name__ == "__main__":
    sys.exit(main())
