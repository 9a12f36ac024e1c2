"""A llama-server as a child process, each step of its table; no process is started here."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import LogEvent, LogLevel, formatEvent
from twisted.python.failure import Failure

from gateway.llama.child import Child, Limits, State
from gateway.upstream import Health

#: A program that can be run, so that only the fake reactor decides whether it is.
WORDS = (sys.executable, "-m", "server", "--api-key", "secret", "--port", "8081")

#: More than any system counts its processes to.
_PIDS = count(10_000_000)


@attrs.define(eq=False)
class FakeProcess:
    """
    A process that a test lets speak and end.

    Attributes:
        reaped: it is gone, but perhaps nobody was told yet.
    """

    protocol: Any
    words: Sequence[str]
    env: Mapping[str, str]
    pid: int = attrs.field(factory=lambda: next(_PIDS))
    signals: list[str] = attrs.field(factory=list)
    reaped: bool = False

    def signalProcess(self, name: str) -> None:
        if self.reaped:
            raise ProcessExitedAlready
        self.signals.append(name)

    def loseConnection(self) -> None:  # Twisted calls it by name
        """Nobody can hold these pipes."""

    def says(self, text: bytes) -> None:
        self.protocol.errReceived(text)

    def ends(self, status: int = 0, signal: int | None = None) -> None:
        self.reaped = True
        done = status == 0 and signal is None
        reason = Failure(ProcessDone(0) if done else ProcessTerminated(status, signal))
        self.protocol.processExited(reason)
        self.protocol.processEnded(reason)


class ProcessReactor(MemoryReactorClock):
    """A reactor with its own time that starts `FakeProcess`es, or refuses to."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[FakeProcess] = []
        self.refuses: OSError | None = None

    def spawnProcess(
        self, protocol: Any, executable: str, args: Sequence[str], env: Mapping[str, str]
    ) -> FakeProcess:
        assert executable == args[0]
        if self.refuses is not None:
            raise self.refuses
        process = FakeProcess(protocol, args, env)
        self.started.append(process)
        protocol.makeConnection(process)
        return process

    def alive(self) -> list[FakeProcess]:
        return [process for process in self.started if not process.reaped]


@attrs.define(eq=False)
class Nursery:
    """
    A child, its reactor, and what becomes of it.

    Attributes:
        says: what our server answers about its health; None: it does not answer at all.
        stranger: another server answers where ours would.
        stranger_before: it did when it was last asked while none of ours ran.
        asked: how often it was asked for its health.
        unanswered: questions that wait for an answer.
        heard: the lines that the child's listener was told.
        states: those that it was told of.
        ended: how many signals had been sent each time that calls were ended.
        told: the errors that were logged and meant.
    """

    folder: Path
    limits: Limits = attrs.field(factory=Limits)
    events: list[LogEvent] = attrs.field(factory=list)
    reactor: ProcessReactor = attrs.field(factory=ProcessReactor)
    says: Health | None = Health.DOWN
    stranger: bool = False
    stranger_before: bool = False
    asked: int = 0
    unanswered: list[Deferred[Health]] = attrs.field(factory=list)
    heard: list[str] = attrs.field(factory=list)
    states: list[str] = attrs.field(factory=list)
    ended: list[int] = attrs.field(factory=list)
    told: list[str] = attrs.field(factory=list)
    child: Child = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.child = Child(
            tier="main",
            command=WORDS,
            env={"ADDED": "too"},
            state_dir=self.folder,
            health=self._health,
            reactor=self.reactor,
            limits=self.limits,
            on_line=self.heard.append,
            on_state=lambda state: self.states.append(state.value),
            end_calls=self.end_calls,
        )

    def end_calls(self) -> None:
        self.ended.append(sum(len(process.signals) for process in self.reactor.started))

    async def _health(self) -> Health:
        self.asked += 1
        if not self.reactor.alive():
            self.stranger_before = self.stranger
            return Health.READY if self.stranger else Health.DOWN
        if self.stranger:
            return Health.READY
        if self.says is not None:
            return self.says
        answer: Deferred[Health] = Deferred(self.unanswered.remove)
        self.unanswered.append(answer)
        return await answer

    @property
    def process(self) -> FakeProcess:
        """The one that was started last."""
        return self.reactor.started[-1]

    @property
    def state(self) -> str:
        return self.child.state.value

    @property
    def said(self) -> str:
        return "\n".join(formatEvent(event) or "" for event in self.events)

    @property
    def record(self) -> Path:
        return self.folder / "main.child"

    def take_errors(self) -> list[str]:
        """The errors that were logged since, which then are meant."""
        errors = [event for event in self.events if event["log_level"] >= LogLevel.error]
        self.events[:] = [event for event in self.events if event not in errors]
        self.told += [formatEvent(event) or "" for event in errors]
        return self.told

    def be(self, state: str) -> None:
        """Bring a new child into `state`."""
        child = self.child
        if state == "stopped":
            return
        self.says = Health.LOADING if state == "loading" else Health.DOWN
        child.startService()
        if state in ("ready", "unwell", "draining"):
            self.says = Health.READY
        if state in ("loading", "ready", "unwell", "draining"):
            self.reactor.advance(0.25)
        if state == "unwell":
            child.stuck("a test")
        elif state == "draining":
            child.restart()
        elif state in ("backoff", "failed"):
            child.limits = Limits(max_restarts=1 if state == "backoff" else 0)
            self.process.ends(status=1)
        self.take_errors()
        assert self.state == state

    def crash(self, status: int = 0, signal: int | None = 11) -> float:
        """End the process unexpectedly; the seconds until it is started again."""
        self.process.ends(status, signal)
        self.take_errors()
        (call,) = self.reactor.getDelayedCalls()
        return float(call.getTime() - self.reactor.seconds())

    def nothing_is_left(self) -> bool:
        """No timer, no process, no question, no note of it."""
        left = (self.reactor.getDelayedCalls(), self.reactor.alive(), self.unanswered)
        return not any(left) and not self.record.exists()


@pytest.fixture
def nursery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[LogEvent]
) -> Iterator[Nursery]:
    """A child that was not started yet, and is stopped after the test."""
    monkeypatch.setenv("INHERITED", "yes")
    nursery = Nursery(tmp_path, events=logged)
    yield nursery
    nursery.child.stopService()
    for process in nursery.reactor.alive():
        process.ends()


def fired(deferred: Deferred[None]) -> list[None]:
    """A list that is no longer empty once `deferred` has fired."""
    results: list[None] = []
    deferred.addCallback(lambda _: results.append(None))
    return results


STATES = [state.value for state in State]


# --- start ----------------------------------------------------------------------------------------


def test_a_child_starts_with_the_service(nursery: Nursery) -> None:
    """The command is run as it stands, with our environment and what is added to it."""
    nursery.child.startService()
    (process,) = nursery.reactor.started
    assert tuple(process.words[-len(WORDS) :]) == WORDS
    assert process.env["INHERITED"] == "yes"
    assert process.env["ADDED"] == "too"
    assert nursery.child.pid == process.pid
    assert nursery.state == "starting"


def test_what_is_withheld_is_not_in_its_environment(nursery: Nursery) -> None:
    """A key for somebody else stays with us; what is set for the server itself goes."""
    nursery.child.withheld = ("INHERITED", "ADDED")
    nursery.child.startService()
    assert "INHERITED" not in nursery.process.env
    assert nursery.process.env["ADDED"] == "too"


def test_the_log_shows_the_command_without_its_key(nursery: Nursery) -> None:
    """What is run stands in the log, but no key does, nor in the note of the process."""
    nursery.child.startService()
    assert f"tier main: starting {sys.executable} -m server --api-key '***'" in nursery.said
    assert "secret" not in nursery.said
    assert "secret" not in nursery.record.read_text()
    assert nursery.record.stat().st_mode & 0o777 == 0o600


def test_its_output_goes_to_a_log_of_its_own(nursery: Nursery) -> None:
    """What it says is written down beside its note, and heard line by line."""
    nursery.child.startService()
    nursery.process.says(b"loading\nready")
    assert (nursery.folder / "main.log").read_bytes() == b"loading\nready"
    assert nursery.heard == ["loading"]


def test_it_is_asked_until_it_is_ready_and_not_after(nursery: Nursery) -> None:
    """From no answer over loading to ready: four questions a second, then none any more."""
    nursery.child.startService()
    asked = nursery.asked
    nursery.reactor.pump([0.25] * 4)
    assert (nursery.state, nursery.asked) == ("starting", asked + 4)
    nursery.says = Health.LOADING
    nursery.reactor.pump([0.25] * 4)
    assert (nursery.state, nursery.asked) == ("loading", asked + 8)
    nursery.says = Health.DOWN
    nursery.reactor.advance(0.25)
    assert nursery.state == "loading"
    nursery.says = Health.READY
    nursery.reactor.advance(0.25)
    assert (nursery.state, nursery.asked) == ("ready", asked + 10)
    assert nursery.reactor.getDelayedCalls() == []
    assert nursery.states == ["starting", "loading", "ready"]


def test_a_long_start_is_asked_about_once_a_second(nursery: Nursery) -> None:
    """After 10 seconds the questions are further apart."""
    nursery.child.startService()
    nursery.reactor.pump([0.25] * 40)
    asked = nursery.asked
    nursery.reactor.pump([0.25] * 40)
    assert nursery.asked == asked + 10


def test_a_question_without_an_answer_holds_up_no_end(nursery: Nursery) -> None:
    """A health that is never told is not asked for twice, and no longer wanted when it ends."""
    nursery.says = None
    nursery.child.startService()
    nursery.reactor.pump([0.25] * 20)
    assert len(nursery.unanswered) == 1
    nursery.process.ends(status=1)
    nursery.take_errors()
    assert nursery.unanswered == []
    assert nursery.state == "backoff"


def test_a_question_that_fails_is_asked_again(nursery: Nursery) -> None:
    """Whatever goes wrong with a question, the next one may be answered."""
    answers: list[Health | Exception] = [Health.DOWN, ValueError("no"), Health.READY]

    async def health() -> Health:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    nursery.child.health = health
    nursery.child.startService()
    nursery.reactor.advance(0.25)
    assert len(nursery.take_errors()) == 1
    nursery.reactor.advance(0.25)
    assert nursery.state == "ready"


def test_another_server_in_its_place_is_not_taken_for_it(nursery: Nursery) -> None:
    """Where somebody answers already, ours is not ready before it has shown that it can stay."""
    nursery.stranger = True
    nursery.child.startService()
    for _ in range(6):
        nursery.reactor.pump([0.25] * 20)
        assert nursery.state == "starting"
        nursery.process.ends(status=1)
        nursery.reactor.advance(10)
    nursery.take_errors()
    assert "ready" not in nursery.states
    assert nursery.state == "failed"
    assert "another server answers where ours will" in nursery.said
    nursery.child.retry()
    nursery.reactor.pump([0.25] * 45)
    assert nursery.state == "ready"


def test_another_server_makes_nothing_ready_that_is_gone(nursery: Nursery) -> None:
    """An answer that comes after the end of our process is none of ours."""
    nursery.says = None
    nursery.child.startService()
    nursery.reactor.advance(0.25)
    nursery.process.ends(status=1)
    nursery.take_errors()
    assert nursery.unanswered == []
    nursery.stranger = True
    nursery.reactor.pump([0.25] * 3)
    assert nursery.state == "backoff"


def test_a_socket_that_was_left_behind_is_removed(nursery: Nursery) -> None:
    """llama-server would not start over the socket file of its predecessor."""
    with TemporaryDirectory() as folder:  # short enough for a socket
        path = Path(folder) / "llama.sock"
        left = socket.socket(socket.AF_UNIX)
        left.bind(str(path))
        left.close()
        nursery.child.command = (*WORDS, "--host", str(path))
        nursery.child.startService()
        assert not path.exists()
    assert nursery.state == "starting"


@pytest.mark.parametrize(
    "refusal", [FileNotFoundError(2, "No such file"), PermissionError(13, "Permission denied")]
)
def test_a_process_that_cannot_be_made_is_an_end(nursery: Nursery, refusal: OSError) -> None:
    """What the system has against it is a reason, and the next try comes after the pause."""
    nursery.reactor.refuses = refusal
    nursery.child.startService()
    nursery.take_errors()
    assert nursery.state == "backoff"
    assert nursery.child.status()["reason"] == f"it cannot be run: {refusal}"
    nursery.reactor.refuses = None
    nursery.reactor.advance(3)
    assert nursery.state == "starting"


def test_a_program_that_is_not_there_is_an_end(nursery: Nursery) -> None:
    """It is looked for on the PATH that the child would have."""
    nursery.child.env = {"PATH": str(nursery.folder)}
    nursery.child.command = ("no-such-server",)
    nursery.child.startService()
    nursery.take_errors()
    assert nursery.state == "backoff"
    assert "no program 'no-such-server'" in str(nursery.child.status()["reason"])
    assert nursery.reactor.started == []


# --- unexpected ends ------------------------------------------------------------------------------


def test_a_child_that_ends_by_itself_is_started_again(nursery: Nursery) -> None:
    """After a pause the same command runs again; its last words are in the log."""
    nursery.child.startService()
    nursery.process.says(b"out of memory\n")
    pause = nursery.crash()
    assert nursery.state == "backoff"
    assert not nursery.record.exists()
    (told,) = nursery.told
    assert told.startswith("tier main: its server is gone: it was ended by SIGSEGV; ")
    assert f"starting it again in {pause:.0f} s. Its last words:\nout of memory" in told
    nursery.reactor.advance(pause * 0.99)
    assert len(nursery.reactor.started) == 1
    nursery.reactor.advance(pause * 0.02)
    first, second = nursery.reactor.started
    assert first.words == second.words
    assert nursery.record.exists()


@pytest.mark.parametrize("state", ["starting", "loading", "ready"])
@pytest.mark.parametrize(
    ("status", "signal", "words"),
    [
        (0, None, "it ended with status 0"),
        (1, None, "it ended with status 1"),
        (0, 9, "it was ended by SIGKILL"),
        (0, 63, "it was ended by signal 63"),
    ],
)
def test_every_end_is_unexpected_while_it_is_wanted(
    nursery: Nursery, state: str, status: int, signal: int | None, words: str
) -> None:
    """Whenever and however it ends, it comes back, and the reason is told."""
    nursery.be(state)
    pause = nursery.crash(status, signal)
    assert nursery.child.status()["reason"] == words
    nursery.reactor.advance(pause)
    assert nursery.state == "starting"
    assert len(nursery.reactor.started) == 2


def test_the_pause_grows_with_each_failure(nursery: Nursery) -> None:
    """A server that always ends again is started less and less often, up to a minute."""
    nursery.child.limits = Limits(max_restarts=1000)
    nursery.child.startService()
    pauses = []
    for _ in range(12):
        pauses.append(nursery.crash())
        nursery.reactor.advance(pauses[-1])
    assert len(nursery.reactor.started) == 13
    assert 0 < 4 * pauses[0] < 2 * pauses[4] < pauses[8]
    assert pauses[-1] <= 61


@pytest.mark.parametrize(("seconds", "is_short"), [(59.0, False), (61.0, True)])
def test_staying_ready_makes_the_next_pause_a_short_one(
    nursery: Nursery, seconds: float, is_short: bool
) -> None:
    """A minute of being ready, and the failures before it are forgotten."""
    nursery.child.limits = Limits(max_restarts=1000)
    nursery.child.startService()
    for _ in range(6):
        nursery.reactor.advance(nursery.crash())
    nursery.says = Health.READY
    nursery.reactor.advance(0.25)
    nursery.reactor.advance(seconds)
    assert (nursery.crash() <= 2) == is_short


def test_a_child_that_ends_too_often_is_left_alone(nursery: Nursery) -> None:
    """After five restarts within the window the next end is the last, and that is said loudly."""
    nursery.child.startService()
    for _ in range(5):
        nursery.reactor.advance(nursery.crash(status=1, signal=None))
    assert nursery.child.status()["restarts"] == 5
    assert nursery.child.starts == 6
    nursery.process.says(b"bad model\n")
    nursery.process.ends(status=1)
    (loud,) = [event for event in nursery.events if event["log_level"] is LogLevel.critical]
    assert "it ended with status 1; that is too often" in str(formatEvent(loud))
    assert "bad model" in str(formatEvent(loud))
    nursery.take_errors()
    assert nursery.nothing_is_left()
    nursery.reactor.advance(100_000)
    assert nursery.state == "failed"
    status = nursery.child.status()
    assert status["reason"] == "it ended with status 1"
    assert status["last_words"] == "bad model\n"
    assert (status["pid"], status["for"]) == (None, 100_000)


def test_ends_of_long_ago_do_not_count(nursery: Nursery) -> None:
    """Only what falls into the window is too often."""
    nursery.child.limits = Limits(max_restarts=2, restart_window=100)
    nursery.child.startService()
    for _ in range(10):
        nursery.reactor.advance(nursery.crash())
        nursery.reactor.advance(60)
    assert nursery.state == "starting"
    assert nursery.child.status()["restarts"] <= 2


@pytest.mark.parametrize("ask", [Child.retry, Child.restart])
def test_a_failed_child_is_started_when_it_is_asked_for(
    nursery: Nursery, ask: Callable[[Child], None]
) -> None:
    """It starts at once, and what was before is forgotten."""
    nursery.be("failed")
    nursery.child.limits = Limits()
    ask(nursery.child)
    assert nursery.state == "starting"
    assert nursery.child.status()["restarts"] == 0
    assert nursery.crash() <= 2


@pytest.mark.parametrize("ask", [Child.retry, Child.restart])
def test_a_pause_is_cut_short_when_it_is_asked_for(
    nursery: Nursery, ask: Callable[[Child], None]
) -> None:
    """It starts at once and only once; how often it was started is not forgotten."""
    nursery.be("backoff")
    ask(nursery.child)
    assert nursery.state == "starting"
    assert nursery.child.status()["restarts"] == 1
    nursery.reactor.pump([1.0] * 100)
    assert len(nursery.reactor.started) == 2


# --- unwell ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["loading", "ready", "starting"])
def test_a_child_that_is_stuck_is_ended_and_started_at_once(nursery: Nursery, state: str) -> None:
    """Calls are ended, TERM is sent, after two seconds KILL; then it starts without a pause."""
    nursery.be(state)
    nursery.child.stuck("no token for 60 s")
    assert nursery.state == "unwell"
    assert nursery.ended == [0]
    assert nursery.process.signals == ["TERM"]
    nursery.reactor.advance(1.9)
    assert nursery.process.signals == ["TERM"]
    nursery.reactor.advance(0.2)
    assert nursery.process.signals == ["TERM", "KILL"]
    nursery.process.ends(signal=9)
    nursery.take_errors()
    assert nursery.state == "starting"
    assert len(nursery.reactor.started) == 2
    status = nursery.child.status()
    assert status["restarts"] == 1
    assert status["reason"] == "it does not answer yet; before that it was stuck: no token for 60 s"


def test_being_stuck_too_often_is_failing(nursery: Nursery) -> None:
    """Each time counts as a restart."""
    nursery.be("ready")
    for _ in range(6):
        nursery.child.stuck("again")
        nursery.process.ends(signal=15)
        nursery.reactor.advance(0.25)
    nursery.take_errors()
    assert nursery.state == "failed"
    assert nursery.child.status()["reason"] == "it was stuck: again"


@pytest.mark.parametrize("state", ["starting", "loading"])
def test_a_server_that_does_not_come_up_is_stuck(nursery: Nursery, state: str) -> None:
    """It hangs before it answers or while it loads; after its patience it is started anew."""
    nursery.be(state)
    nursery.reactor.pump([1.0] * 890)
    assert nursery.state == state
    nursery.reactor.pump([1.0] * 20)
    assert nursery.process.signals[0] == "TERM"
    nursery.process.ends(signal=9)
    nursery.take_errors()
    assert "it is not up after 90" in nursery.child.status()["reason"]


@pytest.mark.parametrize("state", sorted(set(STATES) - {"starting", "loading", "ready"}))
def test_only_a_server_that_runs_can_be_stuck(nursery: Nursery, state: str) -> None:
    """In every other state the word of it changes nothing."""
    nursery.be(state)
    before = (nursery.state, nursery.child.status(), len(nursery.reactor.getDelayedCalls()))
    nursery.child.stuck("a mistake")
    assert (nursery.state, nursery.child.status(), len(nursery.reactor.getDelayedCalls())) == before


def test_stopping_a_stuck_child_kills_it(nursery: Nursery) -> None:
    """It gets no second chance to end by itself."""
    nursery.be("unwell")
    stopped = fired(nursery.child.stopService())
    assert (nursery.state, nursery.process.signals) == ("draining", ["TERM", "KILL"])
    nursery.process.ends(signal=9)
    assert stopped == [None]
    assert nursery.nothing_is_left()


# --- restart --------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["starting", "loading", "ready"])
def test_a_restart_runs_what_is_set_now(nursery: Nursery, state: str) -> None:
    """Calls are ended, TERM is sent, then the new command runs; that is no failure."""
    nursery.be(state)
    assert not nursery.child.replace(list(WORDS), {"ADDED": "too"})
    assert nursery.child.replace((*WORDS, "--more"), {"ADDED": "too"})
    assert nursery.child.replace(WORDS, {})
    assert len(nursery.reactor.started) == 1
    nursery.child.restart()
    assert nursery.state == "draining"
    assert nursery.ended == [0]
    assert nursery.process.signals == ["TERM"]
    nursery.process.ends()
    assert nursery.state == "starting"
    assert "ADDED" not in nursery.process.env
    assert nursery.child.status()["restarts"] == 0
    assert not nursery.child.replace(WORDS, {})


def test_a_restart_kills_what_does_not_end(nursery: Nursery) -> None:
    """The grace is the one of a stop."""
    nursery.be("draining")
    nursery.reactor.advance(9.9)
    assert nursery.process.signals == ["TERM"]
    nursery.reactor.advance(0.2)
    assert nursery.process.signals == ["TERM", "KILL"]
    nursery.process.ends(signal=9)
    assert nursery.state == "starting"


@pytest.mark.parametrize("state", sorted(set(STATES) - {"backoff", "failed"}))
def test_there_is_nothing_to_retry_elsewhere(nursery: Nursery, state: str) -> None:
    """A child that runs, or is not wanted, is not touched."""
    nursery.be(state)
    processes = len(nursery.reactor.started)
    nursery.child.retry()
    assert nursery.state == state
    assert len(nursery.reactor.started) == processes


# --- stop -----------------------------------------------------------------------------------------


def test_a_child_is_asked_to_end(nursery: Nursery) -> None:
    """Its calls are ended, TERM is sent, the stop fires when it is gone, and nobody is killed."""
    nursery.be("ready")
    stopped = fired(nursery.child.stopService())
    assert nursery.state == "draining"
    assert nursery.ended == [0]
    assert nursery.process.signals == ["TERM"]
    assert stopped == []
    nursery.process.ends()
    assert stopped == [None]
    assert nursery.nothing_is_left()
    nursery.reactor.advance(3600)
    assert nursery.process.signals == ["TERM"]
    assert len(nursery.reactor.started) == 1
    assert nursery.state == "stopped"


def test_a_child_that_does_not_end_is_killed(nursery: Nursery) -> None:
    """After its grace TERM is followed by KILL."""
    nursery.child.limits = Limits(stop_grace=3)
    nursery.child.startService()
    stopped = fired(nursery.child.stopService())
    nursery.reactor.advance(2.9)
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


@pytest.mark.parametrize("state", STATES)
def test_it_can_be_stopped_and_started_at_any_time(nursery: Nursery, state: str) -> None:
    """From every state a stop leaves nothing behind, however often it is said."""
    nursery.be(state)
    stops = [fired(nursery.child.stopService()) for _ in range(2)]
    for process in nursery.reactor.alive():
        process.ends(signal=15)
    assert stops == [[None], [None]]
    assert nursery.state == "stopped"
    assert nursery.nothing_is_left()
    processes = len(nursery.reactor.started)
    nursery.reactor.advance(3600)
    assert len(nursery.reactor.started) == processes
    nursery.child.startService()
    assert nursery.state == "starting"


def test_a_start_during_the_stop_waits_for_its_end(nursery: Nursery) -> None:
    """Two servers of one tier never run at once; who stopped it is told."""
    nursery.be("ready")
    stopped = fired(nursery.child.stopService())
    nursery.child.startService()
    assert (nursery.state, len(nursery.reactor.started)) == ("draining", 1)
    nursery.process.ends()
    assert stopped == [None]
    assert (nursery.state, len(nursery.reactor.started)) == ("starting", 2)


def test_a_stop_during_a_restart_is_a_stop(nursery: Nursery) -> None:
    """What was to come after the end does not."""
    nursery.be("draining")
    stopped = fired(nursery.child.stopService())
    nursery.process.ends()
    assert stopped == [None]
    assert nursery.state == "stopped"
    assert len(nursery.reactor.started) == 1


def test_a_stop_that_nobody_waits_for_any_more_still_stops(nursery: Nursery) -> None:
    """Giving up the wait does not give up the stop."""
    nursery.be("ready")
    stop = nursery.child.stopService().addErrback(lambda _: None)
    stop.cancel()
    nursery.process.ends()
    assert nursery.state == "stopped"


# --- listeners ------------------------------------------------------------------------------------


def test_listeners_that_fail_change_nothing(nursery: Nursery) -> None:
    """What goes wrong with whom is told is logged, and the child comes to its next state."""

    def fail(*_: object) -> None:
        raise ValueError

    nursery.child.on_state = nursery.child.end_calls = nursery.child.on_line = fail
    nursery.be("ready")
    nursery.process.says(b"line\n")
    stopped = fired(nursery.child.stopService())
    nursery.process.ends()
    assert stopped == [None]
    failed = [event for event in nursery.events if "log_failure" in event]
    assert len(failed) == 4  # two states, a line, the calls
    nursery.take_errors()


@pytest.mark.parametrize("state", ["starting", "loading", "ready"])
@pytest.mark.parametrize("ask", [Child.stopService, Child.restart, Child.retry])
def test_a_listener_may_ask_for_something(
    nursery: Nursery, state: str, ask: Callable[[Child], Any]
) -> None:
    """What is asked for while a state is told of comes after it."""
    states: list[str] = []

    def told(new: State) -> None:
        states.append(new.value)
        if new.value == state and states.count(state) == 1:
            ask(nursery.child)

    nursery.child.on_state = told
    nursery.says = Health.LOADING if state == "loading" else Health.DOWN
    nursery.child.startService()
    nursery.says = Health.LOADING if state == "loading" else Health.READY
    nursery.reactor.advance(0.25)
    assert state in states
    assert (states[-1] == "draining") == (ask is not Child.retry)


def test_a_question_is_ended_before_the_calls(nursery: Nursery) -> None:
    """Hanging up on the server may answer a question about it, which nobody asks any more."""
    nursery.says = None
    nursery.child.startService()
    nursery.reactor.advance(0.25)
    (question,) = nursery.unanswered

    def answer() -> None:
        if not question.called:
            question.callback(Health.READY)

    nursery.child.end_calls = answer
    nursery.child.restart()
    nursery.process.ends()
    assert [event for event in nursery.events if "log_failure" in event] == []
    assert nursery.states == ["starting", "draining", "starting"]


def test_who_waited_for_a_stop_may_start_again(nursery: Nursery) -> None:
    """He is told when it has come to rest, and what he asks for then is done."""
    nursery.be("ready")
    nursery.child.stopService().addCallback(lambda _: nursery.child.startService())
    nursery.process.ends()
    assert nursery.states[-3:] == ["draining", "stopped", "starting"]


def test_who_waited_for_a_stop_may_stop_it_once_more(nursery: Nursery) -> None:
    """A start came between, so there is something to stop again."""
    nursery.be("ready")
    stops: list[list[None]] = []
    again = nursery.child.stopService()
    again.addCallback(lambda _: stops.append(fired(nursery.child.stopService())))
    nursery.child.startService()
    nursery.process.ends()
    assert (nursery.state, len(nursery.reactor.alive())) == ("draining", 1)
    nursery.process.ends()
    assert (nursery.state, stops) == ("stopped", [[None]])


def test_a_stop_in_the_pause_ends_it(nursery: Nursery) -> None:
    """A service that is stopped starts nothing any more."""
    nursery.be("backoff")
    assert fired(nursery.child.stopService()) == [None]
    assert nursery.state == "stopped"
    assert nursery.nothing_is_left()


def test_status_tells_all(nursery: Nursery) -> None:
    """Each state is named, with how long, why, and what was said last; ready needs no words."""
    nursery.child.startService()
    nursery.process.says(b"x" * 5000 + b"the end")
    nursery.reactor.advance(0.2)
    status = nursery.child.status()
    assert status["state"] == "starting"
    assert status["for"] == pytest.approx(0.2)
    assert status["pid"] == nursery.process.pid
    assert status["reason"] == "it does not answer yet"
    assert status["last_words"] == ("x" * 5000 + "the end")[-2000:]
    nursery.says = Health.LOADING
    nursery.reactor.advance(0.25)
    assert nursery.child.status()["reason"] == "it loads its model"
    nursery.says = Health.READY
    nursery.reactor.advance(0.25)
    ready = nursery.child.status()
    assert (ready["state"], ready["reason"]) == ("ready", None)
    assert "last_words" not in ready
