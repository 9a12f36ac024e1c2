"""What a child says, and what is made of it; no process is started here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.error import ProcessDone, ProcessTerminated
from twisted.internet.task import Clock
from twisted.logger import LogEvent
from twisted.python.failure import Failure

from gateway.llama.loglines import LONGEST
from gateway.llama.output import Output

MIB = 1024 * 1024


@attrs.define(eq=False)
class Pipes:
    """What stands beneath an output."""

    closed: bool = False

    def loseConnection(self) -> None:  # Twisted calls it by name
        self.closed = True


@attrs.define(eq=False)
class Scene:
    """An output, and who listens."""

    path: Path
    clock: Clock = attrs.field(factory=Clock)
    pipes: Pipes = attrs.field(factory=Pipes)
    heard: list[str] = attrs.field(factory=list)
    gone: list[str] = attrs.field(factory=list)
    output: Output = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.output = Output(self.path, self.heard.append, self.gone.append, self.clock)

    def begin(self) -> None:
        self.output.makeConnection(self.pipes)

    def end(self, reason: Exception | None = None) -> None:
        self.output.processExited(Failure(reason or ProcessDone(0)))
        self.output.processEnded(Failure(reason or ProcessDone(0)))


@given(st.lists(st.binary(max_size=40) | st.just(b"\n") | st.just(b"x" * 3000), max_size=12))
def test_however_it_comes_it_is_told_by_lines_and_its_end_is_kept(pieces: list[bytes]) -> None:
    """What is heard is the lines of all that was said; of that the last bytes are kept, no more."""
    heard: list[str] = []
    output = Output(Path("/nowhere"), heard.append, lambda _: None, Clock())
    for piece in pieces:
        output.outReceived(piece)
        assert len(output._last) <= 2000
    said = b"".join(pieces)
    assert output._last == said[-2000:]
    lines = [line.decode("utf-8", "replace") for line in said.split(b"\n")]
    assert [line.removesuffix("\r") for line in lines[:-1]] == heard


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """An output that has begun."""
    scene = Scene(tmp_path / "main.log")
    scene.begin()
    return scene


def failures(events: list[LogEvent]) -> list[Any]:
    """What went wrong and was logged, and is meant."""
    found = [event["log_failure"].value for event in events if "log_failure" in event]
    events[:] = [event for event in events if "log_failure" not in event]
    return found


def test_it_is_written_down_for_its_owner_alone(scene: Scene) -> None:
    """Both outputs go to one file, which the next process goes on with."""
    scene.output.errReceived(b"loading\n")
    scene.output.outReceived(b"ready\n")
    assert scene.path.read_bytes() == b"loading\nready\n"
    assert scene.path.stat().st_mode & 0o777 == 0o600
    scene.end()
    again = Scene(scene.path)
    again.begin()
    again.output.errReceived(b"back\n")
    again.end()
    assert scene.path.read_bytes() == b"loading\nready\nback\n"


def test_it_is_heard_line_by_line(scene: Scene) -> None:
    """Each output is cut into lines of its own; the last one needs no end."""
    scene.output.errReceived(b"slot 0\nslot")
    scene.output.outReceived(b"ready\n")
    scene.output.errReceived(b" 1 \xff\r\nlast words")
    assert scene.heard == ["slot 0", "ready", "slot 1 \N{REPLACEMENT CHARACTER}"]
    scene.end()
    assert scene.heard[3:] == ["last words"]


def test_ten_megabytes_without_a_newline_are_borne(scene: Scene) -> None:
    """All of it is written down; what is kept of it has its bounds."""
    chunk = b"x" * (64 * 1024)
    for _ in range(10 * MIB // len(chunk)):
        scene.output.errReceived(chunk)
    assert scene.heard == []
    assert len(scene.output.last_words) == 2000
    scene.output.errReceived(b"\n")
    scene.end()
    assert [len(line) for line in scene.heard] == [LONGEST]
    assert sum(path.stat().st_size for path in scene.path.parent.iterdir()) == 10 * MIB + 1


def test_old_logs_go(scene: Scene) -> None:
    """Beside the log there are three old ones of 10 MiB, however much is said."""
    for _ in range(60):
        scene.output.errReceived(b"x" * MIB)
    scene.end()
    names = sorted(path.name for path in scene.path.parent.iterdir())
    assert names == ["main.log", "main.log.1", "main.log.2", "main.log.3"]


def test_a_listener_that_fails_does_not_stop_the_reading(
    scene: Scene, logged: list[LogEvent]
) -> None:
    """What goes wrong with a line is logged, and the pipe is read on."""

    def fail(line: str) -> None:
        raise ValueError(line)

    scene.output.heard = fail
    scene.output.errReceived(b"one\ntwo\n")
    scene.output.errReceived(b"three\n")
    assert [str(error) for error in failures(logged)] == ["one", "two", "three"]
    assert scene.path.read_bytes() == b"one\ntwo\nthree\n"
    scene.end()


def test_a_log_that_cannot_be_opened_does_not_stop_the_reading(
    tmp_path: Path, logged: list[LogEvent]
) -> None:
    """The server runs without one, and that is said."""
    scene = Scene(tmp_path / "nowhere" / "main.log")
    scene.begin()
    assert len(failures(logged)) == 1
    scene.output.errReceived(b"heard\n")
    scene.end()
    assert scene.heard == ["heard"]
    assert scene.gone == ["it ended with status 0"]


def test_a_full_disk_does_not_stop_the_reading(
    scene: Scene, logged: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, and what is heard goes on."""

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("twisted.python.logfile.LogFile.write", full)
    scene.output.errReceived(b"one\n")
    scene.output.errReceived(b"two\n")
    assert [error.errno for error in failures(logged)] == [28]
    assert scene.heard == ["one", "two"]
    scene.end()


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (lambda: ProcessDone(0), "it ended with status 0"),
        (lambda: ProcessTerminated(127, None), "it ended with status 127"),
        (lambda: ProcessTerminated(None, 6), "it was ended by SIGABRT"),
        (lambda: ProcessTerminated(None, 63), "it was ended by signal 63"),
    ],
)
def test_how_it_ended_is_told_in_words(
    scene: Scene, reason: Callable[[], Exception], words: str
) -> None:
    """A status, or the name of a signal, once."""
    scene.end(reason())
    assert scene.gone == [words]
    assert scene.clock.getDelayedCalls() == []


def test_pipes_that_others_hold_are_let_go(scene: Scene) -> None:
    """A second after the process is gone nobody else's output is awaited any more."""
    scene.output.processExited(Failure(ProcessDone(0)))
    scene.output.errReceived(b"its last words\n")
    scene.clock.advance(0.9)
    assert not scene.pipes.closed
    scene.clock.advance(0.2)
    assert scene.pipes.closed
    scene.output.processEnded(Failure(ProcessDone(0)))
    assert scene.gone == ["it ended with status 0"]
    assert scene.heard == ["its last words"]
