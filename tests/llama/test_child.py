"""A llama-server as a child process; no process is started here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import LogEvent, LogLevel, formatEvent
from twisted.python.failure import Failure

from gateway.config import Server, Tier
from gateway.llama.child import Child, command

STATE = Path("/state")

EMBEDDED = ("python", "-m", "gateway.llama.embedded", "--model", "m.gguf")


def line(
    *words: str, manage_flags: bool = True, url: str = "http://127.0.0.1:8081", **tier: Any
) -> list[str]:
    """The command line of a tier whose configured command is `words`."""
    server = Server(words, manage_flags=manage_flags)
    return command(Tier(url, server=server, **tier), server, STATE)


def flags(words: Sequence[str]) -> dict[str, str]:
    """Each flag with the word after it."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return {word: value for word, value in pairs if word.startswith("-")}


# --- the command line -----------------------------------------------------------------------------


def test_a_llama_server_gets_what_its_tier_needs() -> None:
    """What the configured command leaves open is added behind it."""
    given = ("llama-server", "--model", "m.gguf")
    assert line(*given, slots=2) == [
        *given,
        *("--host", "127.0.0.1"),
        *("--port", "8081"),
        *("--parallel", "2"),
        *("--slot-prompt-similarity", "0"),
        *("--slot-save-path", "/state/slots"),
        *("--sse-ping-interval", "5"),
    ]


def test_a_llama_server_is_known_by_its_name_anywhere() -> None:
    """A path to llama-server is llama-server."""
    found = line("/opt/llama/bin/llama-server", "-m", "m.gguf")
    assert found[0] == "/opt/llama/bin/llama-server"
    assert "--sse-ping-interval" in found


def test_the_embedded_server_runs_on_our_own_python() -> None:
    """``python -m gateway.llama.embedded`` is ours, whatever ``python`` means on the PATH."""
    found = line(*EMBEDDED)
    assert found[:5] == [sys.executable, *EMBEDDED[1:]]
    assert flags(found)["--port"] == "8081"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--host", "0.0.0.0"),
        ("--port", "9999"),
        ("--parallel", "7"),
        ("-np", "7"),
        ("--slot-prompt-similarity", "0.3"),
        ("-sps", "0.3"),
        ("--slot-save-path", "/elsewhere"),
        ("--sse-ping-interval", "9"),
        ("--api-key", "theirs"),
    ],
)
def test_a_flag_that_is_set_stays(flag: str, value: str) -> None:
    """A flag of the configured command is neither changed nor said twice."""
    names = {"-np": "--parallel", "-sps": "--slot-prompt-similarity"}
    found = line("llama-server", flag, value, slots=2, api_key="ours")
    assert found[1:3] == [flag, value]
    assert found.count(flag) == 1
    assert names.get(flag) not in found


def test_the_key_of_the_tier_is_the_key_of_its_server() -> None:
    """A server that we start is told the key that it will be shown."""
    assert flags(line("llama-server", api_key="secret"))["--api-key"] == "secret"


def test_a_tier_on_a_unix_socket_has_no_port() -> None:
    """llama-server listens on a socket file where its host is a path."""
    found = flags(line("llama-server", url="unix:/run/llama.sock"))
    assert found["--host"] == "/run/llama.sock"
    assert "--port" not in found


@pytest.mark.parametrize(
    "words",
    [
        ("vllm", "serve", "m"),
        ("python", "-m", "another.server"),
        ("/bin/sh", "-c", "llama-server"),
        ("llama-server-wrapper", "--model", "m.gguf"),
    ],
    ids=" ".join,
)
def test_another_command_stays_as_it_is(words: tuple[str, ...]) -> None:
    """What we do not know gets no flags."""
    assert line(*words, api_key="secret") == list(words)


def test_flags_are_not_managed_where_that_is_said() -> None:
    """With ``manage_flags = false`` a llama-server runs as it stands."""
    given = ("llama-server", "--model", "m.gguf")
    assert line(*given, manage_flags=False, api_key="secret") == list(given)


# --- the process ----------------------------------------------------------------------------------


@attrs.define(eq=False)
class FakeProcess:
    """A process that a test lets speak and end."""

    protocol: Any
    program: str
    words: Sequence[str]
    env: Mapping[str, str]
    signals: list[str] = attrs.field(factory=list)
    reaped: bool = False

    def signalProcess(self, name: str) -> None:  # noqa: N802  # Twisted calls it by name
        if self.reaped:
            raise ProcessExitedAlready
        self.signals.append(name)

    def says(self, text: bytes) -> None:
        self.protocol.errReceived(text)

    def ends(self, status: int = 0, signal: int | None = None) -> None:
        self.reaped = True
        done = status == 0 and signal is None
        reason = ProcessDone(0) if done else ProcessTerminated(status, signal)
        self.protocol.processEnded(Failure(reason))


class ProcessReactor(MemoryReactorClock):
    """A reactor with its own time that starts `FakeProcess`es."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[FakeProcess] = []

    def spawnProcess(  # noqa: N802  # Twisted calls it by name
        self,
        protocol: Any,
        executable: str,
        args: Sequence[str],
        env: Mapping[str, str],
    ) -> FakeProcess:
        process = FakeProcess(protocol, executable, args, env)
        self.started.append(process)
        protocol.makeConnection(process)
        return process


@attrs.frozen
class Nursery:
    """
    A child, its reactor, and what was logged.

    Attributes:
        heard: the lines that the child's listener was told.
        told: the errors that were logged and meant.
    """

    child: Child
    reactor: ProcessReactor
    log_file: Path
    events: list[LogEvent]
    heard: list[str]
    told: list[str] = attrs.field(factory=list)

    @property
    def process(self) -> FakeProcess:
        """The one that runs now."""
        return self.reactor.started[-1]

    @property
    def said(self) -> str:
        return "\n".join(formatEvent(event) for event in self.events)

    def crash(self, status: int = 0, signal: int | None = 11) -> float:
        """End the process unexpectedly; the seconds until it is started again."""
        self.process.ends(status, signal)
        (event,) = (event for event in self.events if event["log_level"] == LogLevel.error)
        self.events.remove(event)
        self.told.append(formatEvent(event))
        (call,) = self.reactor.getDelayedCalls()
        return float(call.getTime() - self.reactor.seconds())


@pytest.fixture
def nursery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[LogEvent]
) -> Iterator[Nursery]:
    """A child that was not started yet, and is stopped after the test."""
    monkeypatch.setenv("INHERITED", "yes")
    reactor, log_file = ProcessReactor(), tmp_path / "main.log"
    heard: list[str] = []
    words = ["llama-server", "--api-key", "secret", "--port", "8081"]
    child = Child("main", words, {"ADDED": "too"}, log_file, reactor, heard.append)
    yield Nursery(child, reactor, log_file, logged, heard)
    child.stopService()
    for process in reactor.started:
        if not process.reaped:
            process.ends()


def test_a_child_starts_with_the_service(nursery: Nursery) -> None:
    """The command is run as it stands, with our environment and what is added to it."""
    nursery.child.startService()
    (process,) = nursery.reactor.started
    assert process.program == "llama-server"
    assert process.words == ["llama-server", "--api-key", "secret", "--port", "8081"]
    assert process.env["INHERITED"] == "yes"
    assert process.env["ADDED"] == "too"


def test_the_log_shows_the_command_without_its_key(nursery: Nursery) -> None:
    """What is run stands in the log, but no key does."""
    nursery.child.startService()
    assert "tier main: starting llama-server --api-key '***' --port 8081" in nursery.said
    assert "secret" not in nursery.said


def test_its_output_goes_to_a_log_of_its_own(nursery: Nursery) -> None:
    """Both of its outputs are read and written down, for its owner alone."""
    nursery.child.startService()
    nursery.process.says(b"loading\n")
    nursery.process.protocol.outReceived(b"ready\n")
    assert nursery.log_file.read_bytes() == b"loading\nready\n"
    assert nursery.log_file.stat().st_mode & 0o777 == 0o600


def test_its_output_is_heard_line_by_line(nursery: Nursery) -> None:
    """Each of its outputs is cut into lines of its own, whatever the bytes are."""
    nursery.child.startService()
    nursery.process.says(b"slot 0\nslot")
    nursery.process.protocol.outReceived(b"ready\n")
    nursery.process.says(b" 1 \xff\r\nlast words")
    assert nursery.heard == ["slot 0", "ready", "slot 1 \N{REPLACEMENT CHARACTER}"]
    nursery.crash()
    assert nursery.heard[3:] == ["last words"]


def test_a_listener_that_fails_does_not_stop_the_reading(nursery: Nursery) -> None:
    """What goes wrong with a line is logged, and the pipe is read on."""

    def fail(line: str) -> None:
        raise ValueError(line)

    nursery.child.on_line = fail
    nursery.child.startService()
    nursery.process.says(b"one\ntwo\n")
    nursery.process.says(b"three\n")
    failed = [event for event in nursery.events if "log_failure" in event]
    assert [str(event["log_failure"].value) for event in failed] == ["one", "two", "three"]
    nursery.events.clear()
    assert nursery.log_file.read_bytes() == b"one\ntwo\nthree\n"


def test_a_child_is_asked_to_end(nursery: Nursery) -> None:
    """Stopping sends TERM, fires when the process is gone, and kills nobody later."""
    nursery.child.startService()
    stopped = fired(nursery.child.stopService())
    assert nursery.process.signals == ["TERM"]
    assert stopped == []
    nursery.process.ends()
    assert stopped == [None]
    nursery.reactor.advance(3600)
    assert nursery.process.signals == ["TERM"]
    assert len(nursery.reactor.started) == 1


def test_a_child_that_does_not_end_is_killed(nursery: Nursery) -> None:
    """After a grace of 10 seconds TERM is followed by KILL."""
    nursery.child.startService()
    stopped = fired(nursery.child.stopService())
    nursery.reactor.advance(9.9)
    assert nursery.process.signals == ["TERM"]
    nursery.reactor.advance(0.2)
    assert nursery.process.signals == ["TERM", "KILL"]
    assert stopped == []
    nursery.process.ends(signal=9)
    assert stopped == [None]


def test_a_child_that_ended_just_now_is_not_an_error(nursery: Nursery) -> None:
    """A process that is reaped but not yet reported may be signalled in vain."""
    nursery.child.startService()
    nursery.process.reaped = True
    stopped = fired(nursery.child.stopService())
    nursery.process.ends()
    assert stopped == [None]
    assert nursery.process.signals == []


def test_a_child_that_ends_by_itself_is_started_again(nursery: Nursery) -> None:
    """After a pause the same command runs again; its last words are in the log."""
    nursery.child.startService()
    nursery.process.says(b"out of memory\n")
    pause = nursery.crash()
    assert 0 < pause < 10
    (told,) = nursery.told
    assert told.startswith("tier main: its server ended (")
    assert f"starting it again in {pause:.0f} s. Its last words:\nout of memory" in told
    nursery.reactor.advance(pause * 0.99)
    assert len(nursery.reactor.started) == 1
    nursery.reactor.advance(pause * 0.02)
    assert [process.words for process in nursery.reactor.started] == [nursery.child.command] * 2
    assert nursery.log_file.read_bytes() == b"out of memory\n"
    nursery.process.says(b"back\n")
    assert nursery.log_file.read_bytes() == b"out of memory\nback\n"


def test_the_pause_grows_with_each_failure(nursery: Nursery) -> None:
    """A server that always ends again is started less and less often, up to a minute."""
    nursery.child.startService()
    pauses = []
    for _ in range(12):
        pauses.append(nursery.crash())
        nursery.reactor.advance(pauses[-1])
    assert len(nursery.reactor.started) == 13
    assert 4 * pauses[0] < 2 * pauses[4] < pauses[8]
    assert pauses[-1] <= 61


def test_an_end_without_an_error_is_unexpected_too(nursery: Nursery) -> None:
    """A server that ends with status 0 while it is wanted is started again."""
    nursery.child.startService()
    nursery.reactor.advance(nursery.crash(status=0, signal=None))
    assert len(nursery.reactor.started) == 2


def test_stopping_in_the_pause_cancels_the_restart(nursery: Nursery) -> None:
    """A service that is stopped starts nothing any more."""
    nursery.child.startService()
    nursery.crash()
    assert fired(nursery.child.stopService()) == [None]
    assert nursery.reactor.getDelayedCalls() == []
    nursery.reactor.advance(3600)
    assert len(nursery.reactor.started) == 1


def test_a_child_can_be_started_again_after_a_stop(nursery: Nursery) -> None:
    """A stop is not the end of the service."""
    nursery.child.startService()
    fired(nursery.child.stopService())
    nursery.process.ends()
    nursery.child.startService()
    assert len(nursery.reactor.started) == 2


def fired(deferred: Deferred[None]) -> list[None]:
    """A list that is no longer empty once `deferred` has fired."""
    results: list[None] = []
    deferred.addCallback(lambda _: results.append(None))
    return results
