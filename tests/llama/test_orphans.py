"""What a gateway that was killed has left running; the processes here are real and do nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import orjson
import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, formatEvent

from gateway.llama.orphans import Record, StillThere

pytestmark = pytest.mark.server

#: Says that it is there, and waits for ever; the second one does not take TERM.
QUIET = "print(flush=True); import signal; signal.pause()"
DEAF = "import signal; signal.signal(15, signal.SIG_IGN); " + QUIET

GRACE = 10.0


def command(code: str = QUIET) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, "--api-key", "secret"]


@attrs.define(eq=False)
class Scene:
    """A record, a clock, and the processes that were started."""

    record: Record
    clock: Clock
    started: list[subprocess.Popen[bytes]] = attrs.field(factory=list)

    def start(self, words: list[str] | None = None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(words or command(), stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        self.started.append(process)
        return process

    def note(self, process: subprocess.Popen[bytes], **otherwise: Any) -> None:
        """Put a process on record, as the child of a gateway that is gone, or `otherwise`."""
        words = process.args
        assert isinstance(words, list)
        self.record.write(process.pid, words)
        note = orjson.loads(self.record.path.read_bytes())
        self.record.path.write_bytes(orjson.dumps({**note, "parent": 1 << 30, **otherwise}))

    def end(self) -> list[BaseException | None]:
        """Begin to end the orphan; the list is filled once that is over."""
        over: list[BaseException | None] = []
        ending = Deferred.fromCoroutine(self.record.end_orphan(GRACE))
        ending.addCallbacks(over.append, lambda failure: over.append(failure.value))
        return over


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """Nothing on record yet; what is started is ended after the test."""
    clock = Clock()
    scene = Scene(Record("main", tmp_path / "main.child", clock), clock)
    yield scene
    for process in scene.started:
        process.kill()
        process.communicate()


@contextmanager
def held(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """What is sent to it meanwhile comes to it afterwards."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    yield
    process.send_signal(signal.SIGCONT)


def test_an_orphan_is_ended(scene: Scene, logged: list[LogEvent]) -> None:
    """It gets TERM, and is off the record once it is gone."""
    orphan = scene.start()
    scene.note(orphan)
    with held(orphan):
        over = scene.end()
        assert over == []
    assert orphan.wait() == -signal.SIGTERM
    scene.clock.advance(0.1)
    assert over == [None]
    assert not scene.record.path.exists()
    assert f"ending its server {orphan.pid}" in "".join(map(str, map(formatEvent, logged)))


def test_an_orphan_that_does_not_end_is_killed(scene: Scene) -> None:
    """After the grace TERM is followed by KILL."""
    orphan = scene.start(command(DEAF))
    scene.note(orphan)
    over = scene.end()
    scene.clock.pump([0.1] * 99)
    assert orphan.poll() is None
    scene.clock.pump([0.1] * 3)
    assert orphan.wait() == -signal.SIGKILL
    scene.clock.advance(0.1)
    assert over == [None]


def test_an_orphan_that_nothing_ends_is_an_error(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing may be started beside it, so it stays on record and the caller is told."""
    orphan = scene.start()
    scene.note(orphan)
    monkeypatch.setattr("psutil.Process.send_signal", lambda *_: None)
    over = scene.end()
    scene.clock.pump([0.1] * 200)
    (error,) = over
    assert isinstance(error, StillThere)
    assert str(orphan.pid) in str(error)
    assert scene.record.path.exists()


def test_a_process_that_nobody_collected_is_gone(scene: Scene) -> None:
    """Where no init reaps what is orphaned, a dead process is not waited for."""
    orphan = scene.start()
    scene.note(orphan)
    orphan.kill()
    os.waitid(os.P_PID, orphan.pid, os.WEXITED | os.WNOWAIT)
    assert scene.end() == [None]


@pytest.mark.parametrize(
    "otherwise",
    [
        {"command": ["llama-server", "--api-key", "***"]},
        {"command": [*command("pass")[:-1], "***"]},
        {"command": ["x"] * 20},
        {"command": []},
        {"started": 1_600_000_000.0},
        {"started": "yesterday"},
        {"parent": os.getpid()},
        {"pid": "1"},
        {"pid": -1},
        {"pid": 1 << 30},
    ],
    ids=str,
)
def test_another_process_is_left_alone(scene: Scene, otherwise: dict[str, Any]) -> None:
    """A reused id, a child of somebody who lives, a note that says nothing: nobody is ended."""
    process = scene.start()
    scene.note(process, **otherwise)
    assert scene.end() == [None]
    assert process.poll() is None


@pytest.mark.parametrize("note", [b"", b"no JSON", b"[]", b"{}", b"null", b"\xff"])
def test_a_record_that_cannot_be_read_holds_up_nothing(scene: Scene, note: bytes) -> None:
    """Whatever stands there, the next start goes on."""
    scene.record.path.write_bytes(note)
    assert scene.end() == [None]


def test_without_a_record_there_is_nothing_to_end(scene: Scene) -> None:
    """The usual case asks nobody."""
    assert scene.end() == [None]


def test_a_script_is_known_behind_its_interpreter(scene: Scene, tmp_path: Path) -> None:
    """What the system runs for a script has the interpreter before it."""
    script = tmp_path / "llama-server"
    script.write_text(f"#!{sys.executable} -S\n{QUIET}\n")
    script.chmod(0o700)
    orphan = scene.start([str(script), "--port", "1"])
    scene.note(orphan)
    over = scene.end()
    assert orphan.wait() == -signal.SIGTERM
    scene.clock.advance(0.1)
    assert over == [None]


def test_giving_up_ends_nothing_more(scene: Scene) -> None:
    """A start that is not wanted any more leaves no timer; the orphan is on record still."""
    orphan = scene.start(command(DEAF))
    scene.note(orphan)
    ending = Deferred.fromCoroutine(scene.record.end_orphan(GRACE)).addErrback(lambda _: None)
    ending.cancel()
    assert scene.clock.getDelayedCalls() == []
    assert orphan.poll() is None
    assert scene.record.path.exists()


def test_a_record_that_cannot_be_written_stops_nothing(
    tmp_path: Path, logged: list[LogEvent]
) -> None:
    """A server without a note is better than none, and it is said."""
    record = Record("main", tmp_path / "nowhere" / "main.child", Clock())
    record.write(1, ["llama-server"])
    record.remove()
    failed = [event for event in logged if "log_failure" in event]
    assert [event["log_failure"].type for event in failed] == [FileNotFoundError]
    logged.clear()


def test_a_record_is_for_its_owner_and_shows_no_key(scene: Scene) -> None:
    """The file has mode 0600 and a star where the key is."""
    scene.record.write(1, command())
    assert scene.record.path.stat().st_mode & 0o777 == 0o600
    assert b"secret" not in scene.record.path.read_bytes()
    assert [path.name for path in scene.record.path.parent.iterdir()] == ["main.child"]
