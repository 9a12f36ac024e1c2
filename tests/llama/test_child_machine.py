"""
The child as a state machine: whatever happens in whatever order, nothing is left behind.

It is started, stopped, judged, asked for; its process speaks, ends or cannot be made; its server
answers, hangs, or is somebody else; time passes.  Whoever is told of a state may ask for something
himself.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent

from gateway.llama.child import Child, Limits, State
from gateway.upstream import Health
from tests.llama.test_child import WORDS, Nursery, fired

LIMITS = Limits(max_restarts=2, restart_window=100.0, stop_grace=10.0, steady=60.0)

#: Each state, and those that may come right after it.
FOLLOWS = {
    "stopped": {"starting"},
    "starting": {"loading", "ready", "draining", "backoff", "failed", "stopped", "unwell"},
    "loading": {"ready", "unwell", "draining", "backoff", "failed"},
    "ready": {"unwell", "draining", "backoff", "failed"},
    "unwell": {"starting", "draining", "failed"},
    "draining": {"stopped", "starting"},
    "backoff": {"starting", "stopped"},
    "failed": {"starting", "stopped"},
}

ASK = {
    "stop": Child.stopService,
    "start": Child.startService,
    "retry": Child.retry,
    "restart": Child.restart,
    "stuck": lambda child: child.stuck("said by a listener"),
}


class Childhood(RuleBasedStateMachine):
    """A child, and all that can happen to it."""

    nursery: Nursery
    #: Whether the service was started last, and not stopped.
    wanted: bool
    #: The stops that somebody waits for.
    stops: list[list[None]]
    #: What is asked for by who is told of the next state, and by who is told of a stop.
    wishes: dict[str, str]

    @initialize(says=st.sampled_from([None, *Health]))
    def begin(self, says: Health | None) -> None:
        self.folder = Path(mkdtemp())
        self.nursery = Nursery(self.folder, LIMITS)
        self.nursery.says = says
        self.states = ["stopped"]
        self.wanted, self.stops, self.wishes = False, [], {}
        self.more = 0
        self.nursery.child.on_state = self._told
        self.nursery.child.end_calls = self._end_calls

    def _told(self, state: State) -> None:
        self.states.append(state.value)
        assert self.nursery.child.state is state
        if state is State.STARTING:
            self.starting_since = self.nursery.reactor.seconds()
        if state in (State.READY, State.LOADING) and self.nursery.stranger_before:
            assert self.nursery.reactor.seconds() - self.starting_since >= 10
        self._grant("state")

    def _grant(self, whose: str) -> None:
        if whose in self.wishes:
            self._ask(self.wishes.pop(whose))

    def _end_calls(self) -> None:
        """Questions are calls, too: whoever waits for an answer gets one."""
        self.nursery.end_calls()
        for question in list(self.nursery.unanswered):
            self.nursery.unanswered.remove(question)
            question.callback(Health.DOWN)

    def _ask(self, wish: str) -> None:
        if wish in ("start", "stop"):
            self.wanted = wish == "start"
        answer: Any = ASK[wish](self.nursery.child)
        if wish == "stop":
            self.stops.append(fired(answer.addCallback(lambda _: self._grant("stop"))))

    # --- what can happen --------------------------------------------------------------------------

    @rule()
    def start(self) -> None:
        self._ask("start")

    @rule()
    def stop(self) -> None:
        self._ask("stop")

    @rule()
    def stop_and_wait_no_longer(self) -> None:
        self.wanted = False
        stop: Deferred[None] = self.nursery.child.stopService()
        stop.addErrback(lambda _: None).cancel()

    @rule()
    def stuck(self) -> None:
        self._ask("stuck")

    @rule()
    def retry(self) -> None:
        self._ask("retry")

    @rule()
    def restart(self) -> None:
        self._ask("restart")

    @rule()
    def replace(self) -> None:
        self.more += 1
        self.nursery.child.replace((*WORDS, f"--more={self.more}"), {})

    @rule(whose=st.sampled_from(["state", "stop"]), wish=st.sampled_from(sorted(ASK)))
    def a_listener_has_a_wish(self, whose: str, wish: str) -> None:
        self.wishes[whose] = wish

    @precondition(lambda self: self.nursery.reactor.alive())
    @rule(how=st.sampled_from([(0, None), (1, None), (0, 9), (0, 11)]))
    def it_dies(self, how: tuple[int, int | None]) -> None:
        self.nursery.process.says(b"last words")
        self.nursery.process.ends(*how)

    @precondition(lambda self: "KILL" in self._signals())
    @rule()
    def it_dies_as_killed(self) -> None:
        self.nursery.process.ends(0, 9)

    @rule(says=st.sampled_from([*Health, None]))
    def the_server_will_say(self, says: Health | None) -> None:
        self.nursery.says = says

    @precondition(lambda self: self.nursery.unanswered)
    @rule(says=st.sampled_from(Health))
    def the_server_answers_at_last(self, says: Health) -> None:
        self.nursery.unanswered.pop().callback(says)

    @rule(there=st.booleans())
    def somebody_else_answers(self, there: bool) -> None:
        self.nursery.stranger = there

    @rule(refuses=st.sampled_from([None, FileNotFoundError(2, "No such file")]))
    def processes_can_be_made(self, refuses: OSError | None) -> None:
        self.nursery.reactor.refuses = refuses

    @rule(seconds=st.sampled_from([0.25, 1.0, 2.0, 10.0, 61.0, 101.0]))
    def time_passes(self, seconds: float) -> None:
        self.nursery.reactor.advance(seconds)

    def _signals(self) -> list[str]:
        return [name for process in self.nursery.reactor.alive() for name in process.signals]

    # --- what must hold ---------------------------------------------------------------------------

    @invariant()
    def at_most_one_of_each(self) -> None:
        nursery = self.nursery
        assert len(nursery.reactor.alive()) <= 1
        under_way = len(nursery.reactor.getDelayedCalls()) + len(nursery.unanswered)
        assert under_way <= 1

    @invariant()
    def each_state_has_what_it_needs(self) -> None:
        """A process where one runs, somebody who waits where the next step is not a signal's."""
        nursery, state = self.nursery, self.nursery.state
        alive = nursery.reactor.alive()
        waits = bool(nursery.reactor.getDelayedCalls() or nursery.unanswered)
        killed = "KILL" in self._signals()
        match state:
            case "stopped" | "failed":
                assert nursery.nothing_is_left()
            case "backoff":
                assert waits
                assert not alive
            case "starting" | "loading":
                assert waits
                assert alive
                assert not self._signals()
            case "ready":
                assert not waits
                assert alive
                assert not self._signals()
            case "unwell" | "draining":
                assert self._signals()[0] == "TERM"
                assert waits != killed

    @invariant()
    def the_note_is_that_of_the_process(self) -> None:
        nursery = self.nursery
        pids = [process.pid for process in nursery.reactor.alive()]
        noted = (
            [orjson.loads(nursery.record.read_bytes())["pid"]] if nursery.record.exists() else []
        )
        assert noted == pids
        assert nursery.child.pid == (pids[0] if pids else None)

    @invariant()
    def states_follow_as_they_may(self) -> None:
        assert self.states[-1] == self.nursery.state
        for before, after in pairwise(self.states):
            assert after in FOLLOWS[before]
        del self.states[:-1]

    @invariant()
    def what_is_wanted_comes_or_has_failed(self) -> None:
        state = self.nursery.state
        assert self.wanted or state in ("stopped", "draining")
        assert not self.wanted or state != "stopped"

    @invariant()
    def a_stop_fires_when_the_process_is_gone(self) -> None:
        if not self.nursery.reactor.alive():
            assert all(stop == [None] for stop in self.stops)
            self.stops.clear()

    @invariant()
    def calls_are_ended_before_signals(self) -> None:
        """Once for each process that was told to end, and not after."""
        told = [process for process in self.nursery.reactor.started if process.signals]
        before = 0
        for process, ended in zip(told, self.nursery.ended, strict=True):
            assert ended == before
            before += len(process.signals)

    @invariant()
    def it_is_not_started_too_often(self) -> None:
        assert self.nursery.child.status()["restarts"] <= LIMITS.max_restarts

    def teardown(self) -> None:
        """A stop ends everything, within the grace."""
        if not hasattr(self, "nursery"):
            return
        nursery = self.nursery
        self.wishes = {}
        stopped = fired(nursery.child.stopService())
        nursery.reactor.advance(LIMITS.stop_grace)
        for process in nursery.reactor.alive():
            assert process.signals[-1] == "KILL"
            process.ends(0, 9)
        assert stopped == [None]
        assert nursery.state == "stopped"
        assert nursery.nothing_is_left()
        shutil.rmtree(self.folder)


Childhood.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestChildhood = Childhood.TestCase


@pytest.fixture(autouse=True)
def no_failure_is_logged(logged: list[LogEvent]) -> Iterator[None]:
    """A child that ends is an error in the log, and is meant here; a failure never is."""
    yield
    gc.collect(1)  # what a test leaves behind is young
    assert [event for event in logged if event.get("log_failure") is not None] == []
