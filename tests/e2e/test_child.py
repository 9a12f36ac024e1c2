"""
The child on real processes: small Python programs that serve, hang, shout or will not end.

One gateway is killed here; the next one ends what it left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import attrs
import orjson
import psutil
import pytest
import pytest_twisted
from twisted.logger import LogEvent, LogLevel

from gateway.llama.child import Child, Limits
from gateway.llama.client import LlamaClient
from tests.e2e.clients import eventually
from tests.e2e.observer import reactor, until
from tests.e2e.stack import ROOT, free_port
from tests.llama.test_launcher import is_gone

pytestmark = pytest.mark.server

#: A server that answers each request with one status, as llama-server does on /health.
SERVER: Final = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""

#: A gateway that keeps a child, without the help of the kernel, and says when it is ready.
GATEWAY: Final = """
import sys
from pathlib import Path
import gateway.llama.child as room
from gateway.llama.client import LlamaClient
from twisted.internet import reactor
room.launched = lambda command, env: list(command)
port, folder, *command = sys.argv[1:]
client = LlamaClient.at(reactor, "main", f"http://127.0.0.1:{port}", None)
child = room.Child("main", command, {}, Path(folder), client.health, reactor)
child.on_state = lambda state: print(state.value, child.pid, flush=True)
reactor.callWhenRunning(child.startService)
reactor.run()
"""

MIB: Final = 1024 * 1024


@attrs.define(eq=False)
class Scene:
    """A child on the real reactor, and where it lives."""

    child: Child
    folder: Path
    port: int
    states: list[str] = attrs.field(factory=list)

    async def until(self, state: str) -> None:
        await until(lambda: self.child.state.value == state)

    def runs(self, code: str) -> None:
        """What the child is."""
        self.child.command = [sys.executable, "-c", code, str(self.port)]


@pytest_twisted.async_yield_fixture
async def scene(tmp_path: Path, logged: list[LogEvent]) -> AsyncIterator[Scene]:
    """A child that is not started yet, and is ended after the test."""
    port = free_port()
    client = LlamaClient.at(reactor, "main", f"http://127.0.0.1:{port}", None)
    limits = Limits(stop_grace=1.0)
    child = Child("main", [], {}, tmp_path, client.health, reactor, limits)
    scene = Scene(child, tmp_path, port)
    child.on_state = lambda state: scene.states.append(state.value)
    scene.runs(SERVER)
    yield scene
    await child.stopService()
    assert not (tmp_path / "main.child").exists()
    # That it was stuck, or ended, is an error in the log; a failure is none that was meant.
    meant = [event for event in logged if event.get("log_failure") is None]
    logged[:] = [
        event for event in logged if event not in meant or event["log_level"] < LogLevel.error
    ]


async def test_a_server_comes_up_and_goes(scene: Scene) -> None:
    """It is one process on record, ready when it answers, and gone after a stop."""
    scene.child.startService()
    await scene.until("ready")
    pid = scene.child.pid
    assert pid is not None
    assert psutil.Process(pid).cmdline() == scene.child.command
    assert psutil.Process(pid).children() == []
    assert orjson.loads((scene.folder / "main.child").read_bytes())["pid"] == pid
    await scene.child.stopService()
    assert not psutil.pid_exists(pid)
    assert scene.states == ["starting", "ready", "draining", "stopped"]


async def test_a_stopped_server_is_ended_and_comes_back(scene: Scene) -> None:
    """SIGSTOP takes TERM from it; it is killed, and another one is ready soon."""
    scene.child.startService()
    await scene.until("ready")
    pid = scene.child.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    scene.child.stuck("it was stopped")
    await until(lambda: scene.child.pid not in (pid, None))
    assert not psutil.pid_exists(pid)
    await scene.until("ready")
    assert scene.states == ["starting", "ready", "unwell", "starting", "ready"]
    assert scene.child.status()["reason"] == "it was stuck: it was stopped"


async def test_a_deaf_server_is_killed(scene: Scene) -> None:
    """One that ignores TERM is gone after the grace."""
    scene.runs(f"import signal; signal.signal(15, signal.SIG_IGN)\n{SERVER}")
    scene.child.startService()
    await scene.until("ready")
    pid = scene.child.pid
    await scene.child.stopService()
    assert not psutil.pid_exists(pid or 0)


async def test_ten_megabytes_without_a_newline(scene: Scene) -> None:
    """They are read as fast as they come, written down, and do not stay in memory."""
    shout = f"import sys; sys.stderr.write('x' * {10 * MIB}); sys.stderr.flush()\n{SERVER}"
    scene.runs(shout)
    before = psutil.Process().memory_info().rss
    scene.child.startService()
    await scene.until("ready")
    written = sum(path.stat().st_size for path in scene.folder.glob("main.log*"))
    assert written >= 10 * MIB
    assert psutil.Process().memory_info().rss - before < 5 * MIB


async def test_a_child_of_the_child_holds_up_nothing(scene: Scene) -> None:
    """Who was left behind with its pipes does not keep us from seeing its end."""
    code = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import signal;"
    scene.runs(f"{code} signal.pause()']); print(p.pid, flush=True)")
    heard: list[str] = []
    scene.child.on_line = heard.append
    scene.child.startService()
    await scene.until("backoff")
    os.kill(int(heard[0]), signal.SIGKILL)
    assert scene.child.status()["reason"] == "it ended with status 0"


async def test_a_program_that_is_not_there(scene: Scene) -> None:
    """The start of the service raises nothing, and the reason says what is missing."""
    scene.child.command = [str(scene.folder / "llama-server")]
    scene.child.startService()
    await scene.until("backoff")
    assert "llama-server" in str(scene.child.status()["reason"])


def left_behind(scene: Scene) -> int:
    """The process that a gateway left behind when it was killed."""
    words: list[Any] = [sys.executable, "-c", GATEWAY, scene.port, scene.folder]
    gateway = subprocess.Popen(
        [str(word) for word in [*words, *scene.child.command]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert gateway.stdout is not None
    ready = next(line for line in gateway.stdout if line.startswith("ready"))
    gateway.kill()
    gateway.communicate()
    return int(ready.split()[1])


async def test_the_next_start_ends_what_a_killed_gateway_left(scene: Scene) -> None:
    """The orphan holds the port; it is ended first, and ours is the one that answers."""
    orphan = left_behind(scene)
    assert not is_gone(orphan)
    scene.child.startService()
    await scene.until("ready")
    assert is_gone(orphan)
    assert scene.child.pid != orphan
    assert scene.states == ["starting", "ready"]


async def test_a_server_of_somebody_else_is_left_alone(scene: Scene) -> None:
    """Ours ends since the port is taken, is never taken to be ready, and starts when it is free."""
    orphan = left_behind(scene)
    (scene.folder / "main.child").unlink()
    try:
        scene.child.startService()
        await scene.until("backoff")
        assert not is_gone(orphan)
        assert scene.child.status()["reason"] == "it ended with status 1"
        assert "Address already in use" in str(scene.child.status()["last_words"])
        assert "ready" not in scene.states
    finally:
        os.kill(orphan, signal.SIGKILL)
    assert eventually(lambda: is_gone(orphan), 30)
    scene.child.retry()
    await scene.until("ready")
