"""
What of a prompt is evaluated again: with the gateway, and without it.

``python -m bench.cache [--way gateway|direct] [--idle S] [VERSION]`` lets the real Claude Code (as
``bin/get-clients`` installs it) hold three sessions with a scripted model, one of which sends a
subagent, and then sends what it asked, call by call, to SmolLM2 with a window of 32K tokens: a
plain KV cache, as large models have it, and a template in GLM's order.  Each answer ends after one
token, so that its seconds are those to the first one.  A first prompt takes minutes here.

``direct`` is the same server with its own defaults and the client's own bodies.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final

import attrs
import orjson

from bench.second_session import WINDOW, with_window
from tests.e2e.clients import Client, eventually
from tests.e2e.recorder import Recorder
from tests.e2e.scripted_llama import ScriptedLlama
from tests.e2e.sessions import Author, furnish
from tests.e2e.stack import GLM_ORDER, Running, free_port, start_gateway, start_server

Json = Any

#: What is said to the client, a session each; the first one makes it send a subagent.
PROMPTS: Final = ("Please send an agent", "How many walls are there?", "And how many towers?")

#: Tokens that the first prompt must have.
LEAST: Final = 13_000

#: Seconds that a whole prompt may take.
PREFILL: Final = 3600.0

#: Headers that go with a call as the client sent it.
_KEPT: Final[tuple[str, ...]] = ("user-agent", "x-claude-code-session-id", "x-claude-code-agent-id")

_DROP_CACHES: Final = Path("/proc/sys/vm/drop_caches")


def main() -> int:
    """A table, a row each situation and way; the exit status."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--way", choices=("gateway", "direct"), action="append")
    options.add_argument("--idle", type=float, default=30.0, help="seconds before each restart")
    options.add_argument("version", nargs="?", default="newest")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calls = recorded(given.version, folder / "client")
        model = with_window(folder / "model.gguf")
        for way in given.way or ("gateway", "direct"):
            (folder / way).mkdir()
            with WAYS[way](folder / way, model) as house:
                measure(way, house, calls, given.idle)
    return 0


# --- what is asked --------------------------------------------------------------------------------


@attrs.frozen
class Call:
    """One call of a client."""

    body: Json
    headers: Mapping[str, str]


@attrs.frozen
class Calls:
    """
    What a client asked.

    Attributes:
        first: the first turn of a session.
        second: the second one, said by us: what comes of a short answer and a short question.
        subagent: the first call of its subagent.
        after: the turn with the subagent's result in it.
        sessions: the first turns of two more sessions in the same folder.
    """

    first: Call
    second: Call
    subagent: Call
    after: Call
    sessions: Sequence[Call]


def recorded(version: str, place: Path) -> Calls:
    """The calls of three sessions with a model that follows a script."""
    (place / "gateway").mkdir(parents=True)
    project = place / "project"
    with ScriptedLlama(Author(project, "https://127.0.0.1:9/gates")).serving() as llama:
        tiers = {"main": {"url": llama.url, "slots": 1}}
        gateway = start_gateway(place / "gateway", tiers)
        try:
            with Recorder(gateway.port).listening() as recorder:
                env = {"ANTHROPIC_BASE_URL": recorder.url}
                client = Client.of(version, gateway, place, env)
                furnish(client.folder)
                heard = [session(client, recorder, prompt) for prompt in PROMPTS]
        finally:
            gateway.stop()
    turns, subagents = heard[0]["turn"], heard[0]["subagent"]
    return Calls(
        first=turns[0],
        second=continued(turns[0]),
        subagent=subagents[0],
        after=turns[-1],
        sessions=[each["turn"][0] for each in heard[1:]],
    )


def session(client: Client, recorder: Recorder, prompt: str) -> dict[str, list[Call]]:
    """What a new session with this prompt asks, by the kinds of its calls."""
    before = len(recorder.messages)
    said = client.say(prompt, "--allowedTools", "Agent,Task,Bash,Glob", seconds=600)
    assert said.status == 0, said
    found: dict[str, list[Call]] = {}
    for each in recorder.messages[before:]:
        headers = {name: each.headers[name] for name in _KEPT if name in each.headers}
        if not each.body.get("tools"):
            continue  # what an older client asks beside its turns
        kind = each.answer["x-claudegw-call"]
        found.setdefault(kind, []).append(Call(each.body, headers))
    return found


def continued(call: Call) -> Call:
    """The turn after `call`."""
    body = deepcopy(call.body)
    body["messages"] += [
        {"role": "assistant", "content": [{"type": "text", "text": "There are seven gates."}]},
        {"role": "user", "content": [{"type": "text", "text": "And who counted them?"}]},
    ]
    return attrs.evolve(call, body=body)


# --- whom it is asked -----------------------------------------------------------------------------


@attrs.define(eq=False)
class House:
    """
    Somebody who answers.

    Attributes:
        door: who is asked.
        restart_server: ends the model's server, and comes back when there is one again.
        restart: likewise, with all that stands before it.
    """

    door: Running
    restart_server: Callable[[], None]
    restart: Callable[[], None]


@contextmanager
def with_gateway(folder: Path, model: Path) -> Iterator[House]:
    """A gateway that supervises the server."""
    port = free_port()
    command = [
        *("python", "-m", "gateway.llama.embedded", "--model", str(model), *GLM_ORDER),
        *("--ctx-size", str(WINDOW), "--threads", "2"),
    ]
    tiers = {"main": {"url": f"http://127.0.0.1:{port}", "slots": 1}}
    server = f"\n\n[tier.main.server]\ncommand = {orjson.dumps(command).decode()}\n"

    def begin() -> Running:
        gateway = start_gateway(folder, tiers, server)
        until_healthy(port)
        return gateway

    def restart_server() -> None:
        _, status = house.door.ask("/status")
        os.kill(status["tiers"]["main"]["process"]["pid"], signal.SIGKILL)
        time.sleep(1)
        until_healthy(port)

    def restart() -> None:
        house.door.stop()
        drop_caches()
        house.door = begin()

    house = House(begin(), restart_server, restart)
    try:
        yield house
    finally:
        house.door.stop()


@contextmanager
def directly(folder: Path, model: Path) -> Iterator[House]:
    """The server alone, as it is by default."""
    flags = ("--model", str(model), *GLM_ORDER, "--ctx-size", str(WINDOW), "--threads", "2")

    def restart() -> None:
        house.door.process.kill()
        house.door.process.wait()
        drop_caches()
        house.door = start_server(folder, "server", *flags)

    house = House(start_server(folder, "server", *flags), restart, restart)
    try:
        yield house
    finally:
        house.door.stop()


WAYS: Final = {"gateway": with_gateway, "direct": directly}


def until_healthy(port: int) -> None:
    """Until the server at `port` has loaded its model, and a moment for who waits for that too."""
    if not eventually(partial(is_healthy, port), 900):
        raise AssertionError("the server does not come")
    time.sleep(5)


def is_healthy(port: int) -> bool:
    """Whether the server at `port` is there."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def drop_caches() -> None:
    """As after a start of the machine, where we may."""
    os.sync()
    with suppress(OSError):
        _DROP_CACHES.write_text("3\n")


# --- the table ------------------------------------------------------------------------------------


def measure(way: str, house: House, calls: Calls, idle: float) -> None:
    """All situations, in an order in which each is what it is called."""
    print(
        f"{'way':<8} {'situation':<34} {'prompt':>7} {'evaluated':>10} {'cached':>8} {'seconds':>8}"
    )

    def row(situation: str, call: Call) -> float:
        prompt, evaluated, seconds = ask(house.door, call)
        cached = 1 - evaluated / prompt
        counted = f"{prompt:>7} {evaluated:>10} {cached:>8.2%} {seconds:>8.2f}"
        print(f"{way:<8} {situation:<34} {counted}", flush=True)
        assert prompt >= LEAST or call is calls.subagent, "too short a prompt to say anything"
        return seconds

    cold = row("first turn, cold", calls.first)
    row("second turn", calls.second)
    row("its subagent", calls.subagent)
    row("main after the subagent", calls.after)
    row("second session, same folder", calls.sessions[0])
    row("main after the second session", calls.after)
    time.sleep(idle)
    house.restart_server()
    warm = row("main after a restart of the server", calls.after)
    time.sleep(idle)
    house.restart()
    row("new session after a restart of all", calls.sessions[1])
    row("main after that", calls.after)
    print(f"{way:<8} first token after a restart: {cold / warm:.1f} times as fast as cold")


def ask(door: Running, call: Call) -> tuple[int, int, float]:
    """Tokens of the prompt, those that were evaluated, and the seconds to the first token."""
    body = orjson.dumps({**call.body, "max_tokens": 1, "stream": True})
    usage: dict[str, Json] = {}
    connection = HTTPConnection("127.0.0.1", door.port, timeout=PREFILL)
    began = time.monotonic()
    try:
        connection.request("POST", "/v1/messages", body, dict(call.headers))
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:  # pings of a gateway come before the first token too
            if line.startswith(b"data: "):
                event = orjson.loads(line.removeprefix(b"data: "))
                assert event["type"] != "error", event
                usage |= event.get("usage") or event.get("message", {}).get("usage") or {}
        seconds = time.monotonic() - began
    finally:
        connection.close()
    cached = usage.get("cache_read_input_tokens") or 0
    return usage["input_tokens"] + cached, usage["input_tokens"], seconds


if __name__ == "__main__":
    sys.exit(main())
