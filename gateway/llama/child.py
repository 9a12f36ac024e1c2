"""
A llama-server as a child process: started, watched while it loads, ended, and started again.

What can happen to it stands in one table at the end of this file.  Each state holds at most one
thing that is under way, a timer or a question to the server, and the next state ends it; so nothing
is left behind, whatever comes in whatever order.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, Final, Protocol

import attrs
from automat import TypeMachineBuilder
from twisted.application.internet import backoffPolicy
from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IProcessTransport
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.background import unless_cancelled
from gateway.llama.command import socket_file, without_key
from gateway.llama.launcher import launched
from gateway.llama.orphans import Record
from gateway.llama.output import Output
from gateway.upstream import Health

#: Seconds that a server which is stuck gets to end before it is killed.
_LAST_CHANCE: Final = 2.0

#: Seconds between two questions whether a server is up: while it is young, and later.
_SOON: Final = 0.25
_LATER: Final = 1.0
_YOUNG: Final = 10.0

#: What the log says of an end that nobody asked for.
_ENDED: Final = "tier {tier}: its server is gone: {reason}; {then}. Its last words:\n{last_words}"

log = Logger()


class State(Enum):
    """How a child is, and what calls get meanwhile."""

    #: Nobody wants it: calls are refused with 503, to be sent again.
    STOPPED = "stopped"
    #: It runs, or is about to, and does not answer yet: calls wait within their patience.
    STARTING = "starting"
    #: It loads its model: calls wait within their patience.
    LOADING = "loading"
    #: Calls are answered.
    READY = "ready"
    #: It is stuck and being ended: calls that have no content yet wait and are sent again, others
    #: are cut so that the client sends them again; new ones wait.
    UNWELL = "unwell"
    #: It was told to end.  To start again: as unwell.  To stop: as stopped.
    DRAINING = "draining"
    #: It ended, and is started again after a pause: as unwell.
    BACKOFF = "backoff"
    #: It ended too often and is left alone until somebody asks: calls are refused at once, with
    #: the reason.
    FAILED = "failed"


#: Why a child that runs is not ready.
_NOT_YET: Final = {
    State.STARTING: "it does not answer yet",
    State.LOADING: "it loads its model",
}


@attrs.frozen
class Limits:
    """
    How much is borne with a child.

    Attributes:
        max_restarts: how often it may be started again within the window, unasked.
        restart_window: seconds of the window.
        stop_grace: seconds that it gets to end by itself before it is killed.
        steady: seconds of being ready after which the next pause is a short one again.
        patience: seconds after which one that is not ready yet counts as stuck.
    """

    max_restarts: int = 5
    restart_window: float = 600.0
    stop_grace: float = 10.0
    steady: float = 60.0
    patience: float = 900.0


@attrs.define(eq=False)
class Child(Service):
    """
    The service that keeps one child running.

    Attributes:
        tier: whose server it is.
        command: what is run at the next start.
        env: added to our own environment at the next start.
        withheld: what of our own it does not get.
        state_dir: its output goes to ``TIER.log`` in there, and while it runs ``TIER.child`` says
            which process it is.
        health: asks the server; does not raise, and is cancelled when it is no longer wanted.
        limits: how much is borne.
        on_line: hears each line of its output.
        on_state: told after each change of state.
        end_calls: called before a signal is sent; whoever has a request at the server hangs up,
            since a llama-server with open requests does not end.
    """

    tier: str
    command: Sequence[str]
    env: Mapping[str, str]
    state_dir: Path
    health: Callable[[], Awaitable[Health]]
    _reactor: Any
    limits: Limits = Limits()
    on_line: Callable[[str], None] = lambda _: None
    on_state: Callable[[State], None] = lambda _: None
    end_calls: Callable[[], None] = lambda: None
    withheld: Collection[str] = ()
    _core: _Core = attrs.field(init=False)
    _machine: _Inputs = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        record = Record(self.tier, self.state_dir / f"{self.tier}.child", self._reactor)
        self._core = _Core(self, record, self._reactor)
        self._machine = _supervised(self._core)

    @property
    def state(self) -> State:
        return self._core.state

    @property
    def pid(self) -> int | None:
        """Its process, while there is one."""
        return None if self._core.process is None else self._core.process.pid

    @property
    def starts(self) -> int:
        """How often a process was started for it."""
        return self._core.starts

    @property
    def started_with(self) -> tuple[Sequence[str], Mapping[str, str]]:
        """Command and environment of its last start; before that, of its first."""
        return self._core.started_with or (self.command, self.env)

    def startService(self) -> None:
        super().startService()
        self._machine.start()

    def stopService(self) -> Deferred[None]:
        """Fires when the process is gone."""
        super().stopService()
        stopping = self._core.stopping
        gone: Deferred[None] = Deferred(stopping.remove)
        stopping.append(gone)
        self._machine.stop()
        return gone

    def stuck(self, why: str) -> None:
        """It is up and does nothing: end it, and start it again without a pause."""
        self._machine.stuck(why)

    def retry(self) -> None:
        """Start it now, if it waits to be started or has failed."""
        self._machine.retry()

    def restart(self) -> None:
        """End it and start it with what is set now; that is no failure."""
        self._machine.restart()

    def replace(self, command: Sequence[str], env: Mapping[str, str]) -> bool:
        """Set both for the next start; whether they differ from those of the last one."""
        self.command, self.env = command, env
        return self._core.started_with not in (None, _start(command, env))

    def status(self) -> Mapping[str, Any]:
        """What ``/status`` says of it."""
        core, state = self._core, self._core.state
        status = {
            "state": state.value,
            "for": core.reactor.seconds() - core.since,
            "pid": self.pid,
            "restarts": core.restarts(),
            "reason": core.why_not_ready(),
        }
        return status if state is State.READY else {**status, "last_words": core.last_words}


def _start(command: Sequence[str], env: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    return list(command), dict(env)


# --- the process ----------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Core:
    """
    What the states of a child have in common.

    Attributes:
        since: when it came into its state.
        reason: why it is not ready, or why it ended last; None before that.
        started_with: its command and environment at the last start.
        starts: how often it was started.
        in_doubt: another server answered before it was started.  If that one has its place, it
            ends while it is young.
        failures: ends since it last stayed ready; the pause grows with them.
        ends: when it was started again unasked, within the window.
        stopping: who waits for it to be gone.
    """

    child: Child
    record: Record
    reactor: Any
    state: State = State.STOPPED
    since: float = attrs.field(init=False)
    reason: str | None = None
    process: IProcessTransport | None = None
    output: Output | None = None
    started_with: tuple[list[str], dict[str, str]] | None = None
    starts: int = 0
    spawned: float = 0.0
    in_doubt: bool = False
    failures: int = 0
    ends: list[float] = attrs.field(factory=list)
    stopping: list[Deferred[None]] = attrs.field(factory=list)
    pause: Callable[[int], float] = attrs.field(factory=backoffPolicy)
    _held: Deferred[None] | None = None

    def __attrs_post_init__(self) -> None:
        self.since = self.reactor.seconds()

    def become(self, state: State, held: Deferred[None] | None = None) -> None:
        """Be in `state`, with `held` under way; what was under way before is ended."""
        self.hold(held)
        if state is self.state:
            return
        self.state, self.since = state, self.reactor.seconds()
        self._call(self.child.on_state, state)

    def hold(self, held: Deferred[None] | None) -> None:
        before, self._held = self._held, held
        if before is not None:
            before.cancel()

    def after(self, seconds: float, then: Callable[[], None]) -> Deferred[None]:
        """Something to hold: `then`, later."""
        return deferLater(self.reactor, seconds, then).addErrback(unless_cancelled)

    async def clear(self) -> None:
        """
        See to it that a server can start.

        Raises:
            StillThere: one that we left behind does not end.
        """
        await self.record.end_orphan(self.child.limits.stop_grace)
        self.in_doubt = await self._health() is not Health.DOWN
        if self.in_doubt:
            log.warn("tier {tier}: another server answers where ours will", tier=self.child.tier)
            return
        # llama-server leaves its socket file behind, and does not start over one.
        if (socket := socket_file(self.child.command)) is not None and socket.is_socket():
            socket.unlink()

    async def ask(self) -> Health:
        """How the server is, a moment from now; who answered before it may only seem to be it."""
        await deferLater(self.reactor, _SOON if self.is_young() else _LATER)
        health = await self._health()
        return Health.DOWN if self.in_doubt and self.is_young() else health

    def is_young(self) -> bool:
        return bool(self.reactor.seconds() - self.spawned < _YOUNG)

    async def _health(self) -> Health:
        try:
            return await self.child.health()
        except CancelledError:
            raise
        except Exception:  # noqa: BLE001  # whatever it is, the next question may be answered
            log.failure("tier {tier}: cannot ask for its health", tier=self.child.tier)
            return Health.DOWN

    def spawn(self, gone: Callable[[str], None]) -> None:
        """Start the process; raises whatever speaks against it."""
        child = self.child
        command, env = self.started_with = _start(child.command, child.env)
        self.spawned, self.output = self.reactor.seconds(), None
        shown = shlex.join(without_key(command))
        log.info("tier {tier}: starting {command}", tier=child.tier, command=shown)
        ours = {name: each for name, each in os.environ.items() if name not in child.withheld}
        whole_env = {**ours, **env}
        words = launched(command, whole_env)
        output = Output(
            child.state_dir / f"{child.tier}.log",
            # Whoever hears it may be another one by then.
            lambda line: child.on_line(line),  # noqa: PLW0108
            gone,
            self.reactor,
        )
        self.process = self.reactor.spawnProcess(output, words[0], words, env=whole_env)
        self.output = output
        self.starts += 1
        self.record.write(self.process.pid, command)

    def gone(self) -> None:
        """There is no process any more, if there was one."""
        if self.process is not None:
            self.process = None
            self.record.remove()

    def tell_it_to_end(self) -> None:
        """Hang up on it, and send TERM."""
        self.hold(None)  # the question how it is, too
        if self.process is not None:
            self._call(self.child.end_calls)
            self.signal("TERM")

    def signal(self, name: str) -> None:
        if self.process is not None:
            with suppress(ProcessExitedAlready):  # then its end is on its way
                self.process.signalProcess(name)

    def tell_who_waited(self) -> None:
        """It is gone."""
        waiting, self.stopping[:] = list(self.stopping), []
        for gone in waiting:
            gone.callback(None)

    def restarts(self) -> int:
        """How often it was started again unasked within the window."""
        oldest = self.reactor.seconds() - self.child.limits.restart_window
        self.ends = [end for end in self.ends if end > oldest]
        return len(self.ends)

    def count(self) -> None:
        """It is about to be started again unasked."""
        self.ends.append(self.reactor.seconds())

    def forgive(self) -> None:
        """If it was ready for long, what was before that is forgotten."""
        ready_for = self.reactor.seconds() - self.since
        if self.state is State.READY and ready_for >= self.child.limits.steady:
            self.failures = 0

    def blame(self, why: str) -> None:
        """It ended unasked; of one that was made to end it is known why."""
        if self.state is not State.UNWELL:
            self.reason = why

    def why_not_ready(self) -> str | None:
        now = _NOT_YET.get(self.state)
        return f"{now}; before that {self.reason}" if now and self.reason else now or self.reason

    def told(self, then: str) -> Mapping[str, Any]:
        """What the log is told of an end that nobody asked for."""
        words = {"reason": self.reason, "then": then, "last_words": self.last_words}
        return {"tier": self.child.tier, **words}

    @property
    def last_words(self) -> str:
        return "" if self.output is None else self.output.last_words

    def _call(self, listener: Callable[..., None], *about: Any) -> None:
        try:
            listener(*about)
        except Exception:  # noqa: BLE001  # whatever it is, the child must come to its next state
            log.failure("tier {tier}: cannot tell of its server", tier=self.child.tier)


# --- the table ------------------------------------------------------------------------------------


class _Inputs(Protocol):
    """What can happen to a child."""

    def start(self) -> None:
        """It is wanted."""

    def stop(self) -> None:
        """It is not wanted any more."""

    def stuck(self, why: str) -> None:
        """It does nothing."""

    def retry(self) -> None:
        """Somebody wants it tried again."""

    def restart(self) -> None:
        """Somebody wants it started with what is set now."""

    def cleared(self) -> None:
        """Nothing is in its way."""

    def silent(self) -> None:
        """It was asked how it is and did not answer."""

    def loads(self) -> None:
        """It loads its model."""

    def answers(self) -> None:
        """It is up."""

    def ended(self, why: str, /) -> None:
        """Its process is gone, or could not be started."""

    def ended_too_often(self, why: str, /) -> None:
        """The same once more than is borne."""

    def grace_over(self) -> None:
        """It was told to end and did not."""

    def pause_over(self) -> None:
        """It has been left alone for long enough."""


def _clear(c: _Inputs, s: _Core, _why: str = "") -> None:
    """Make room for it."""

    def cannot(failure: Failure) -> None:
        if not failure.check(CancelledError):
            _end(c, s, f"it was not started: {failure.getErrorMessage()}")

    clearing = Deferred.fromCoroutine(s.clear()).addCallbacks(lambda _: c.cleared(), cannot)
    s.become(State.STARTING, clearing)
    s.tell_who_waited()


def _spawn(c: _Inputs, s: _Core) -> None:
    try:
        s.spawn(lambda why: _end(c, s, why))
    except Exception as error:  # noqa: BLE001  # whatever the system has against it
        _end(c, s, f"it cannot be run: {error}")
    else:
        s.hold(_asking(c, s))


def _end(c: _Inputs, s: _Core, why: str) -> None:
    """There is no process, or none any more."""
    s.gone()
    too_often = s.restarts() >= s.child.limits.max_restarts
    (c.ended_too_often if too_often else c.ended)(why)


def _asking(c: _Inputs, s: _Core) -> Deferred[None]:
    inputs = {Health.DOWN: c.silent, Health.LOADING: c.loads, Health.READY: c.answers}

    def asked(health: Health) -> None:
        took = s.reactor.seconds() - s.spawned
        if health is not Health.READY and took > s.child.limits.patience:
            c.stuck(f"it is not up after {took:.0f} s")
        else:
            inputs[health]()

    return Deferred.fromCoroutine(s.ask()).addCallback(asked).addErrback(unless_cancelled)


def _ask_again(c: _Inputs, s: _Core) -> None:
    s.hold(_asking(c, s))


def _load(c: _Inputs, s: _Core) -> None:
    s.become(State.LOADING, _asking(c, s))


def _be_ready(_c: _Inputs, s: _Core) -> None:
    took = s.reactor.seconds() - s.spawned
    log.info("tier {tier}: its server is ready, {took:.0f} s", tier=s.child.tier, took=took)
    s.become(State.READY)


def _give_up_on(c: _Inputs, s: _Core, why: str) -> None:
    """It is stuck."""
    s.forgive()
    s.reason = f"it was stuck: {why}"
    log.error("tier {tier}: its server is stuck, ending it: {why}", tier=s.child.tier, why=why)
    s.tell_it_to_end()
    s.become(State.UNWELL, s.after(_LAST_CHANCE, c.grace_over))


def _drain(c: _Inputs, s: _Core) -> None:
    s.reason = "it was told to end"
    s.tell_it_to_end()
    s.become(State.DRAINING, s.after(s.child.limits.stop_grace, c.grace_over))


def _kill(_c: _Inputs, s: _Core) -> None:
    s.signal("KILL")


def _kill_and_drain(_c: _Inputs, s: _Core) -> None:
    """It was stuck, and has no better chance to end by itself now."""
    s.signal("KILL")
    s.become(State.DRAINING)


def _rest(_c: _Inputs, s: _Core, _why: str = "") -> None:
    s.become(State.STOPPED)
    s.tell_who_waited()


def _pause(c: _Inputs, s: _Core, why: str) -> None:
    s.forgive()
    s.blame(why)
    s.count()
    pause = s.pause(s.failures)
    s.failures += 1
    log.error(_ENDED, **s.told(f"starting it again in {pause:.0f} s"))
    s.become(State.BACKOFF, s.after(pause, c.pause_over))


def _start_at_once(c: _Inputs, s: _Core, why: str) -> None:
    s.blame(why)
    s.count()
    log.error(_ENDED, **s.told("starting it again"))
    _clear(c, s)


def _fail(_c: _Inputs, s: _Core, why: str) -> None:
    s.blame(why)
    log.critical(_ENDED, **s.told("that is too often, it stays down until it is asked for"))
    s.become(State.FAILED)


def _start_anew(c: _Inputs, s: _Core) -> None:
    """With nothing held against it."""
    s.ends.clear()
    s.failures = 0
    _clear(c, s)


def _table() -> Callable[[_Core], _Inputs]:
    builder = TypeMachineBuilder(_Inputs, _Core)
    state, on = builder.state, _Inputs

    stopped = state("stopped")
    clearing = state("starting, not spawned yet")
    starting = state("starting")
    loading = state("loading")
    ready = state("ready")
    unwell = state("unwell")
    draining = state("draining, to stop")
    restarting = state("draining, to start again")
    backoff = state("backoff")
    failed = state("failed")

    stopped.upon(on.start).to(clearing)(_start_anew)
    stopped.upon(on.stop).loop()(_rest)

    clearing.upon(on.cleared).to(starting)(_spawn)
    clearing.upon(on.ended).to(backoff)(_pause)
    clearing.upon(on.ended_too_often).to(failed)(_fail)
    clearing.upon(on.stop).to(stopped)(_rest)

    starting.upon(on.silent).loop()(_ask_again)
    starting.upon(on.loads).to(loading)(_load)
    loading.upon(on.silent).loop()(_ask_again)
    loading.upon(on.loads).loop()(_ask_again)
    starting.upon(on.stuck).to(unwell)(_give_up_on)
    loading.upon(on.stuck).to(unwell)(_give_up_on)
    ready.upon(on.stuck).to(unwell)(_give_up_on)
    for young in (starting, loading):
        young.upon(on.answers).to(ready)(_be_ready)
    for up in (starting, loading, ready):
        up.upon(on.ended).to(backoff)(_pause)
        up.upon(on.ended_too_often).to(failed)(_fail)
        up.upon(on.stop).to(draining)(_drain)
        up.upon(on.restart).to(restarting)(_drain)

    unwell.upon(on.grace_over).loop()(_kill)
    unwell.upon(on.ended).to(clearing)(_start_at_once)
    unwell.upon(on.ended_too_often).to(failed)(_fail)
    unwell.upon(on.stop).to(draining)(_kill_and_drain)

    for ending in (draining, restarting):
        ending.upon(on.grace_over).loop()(_kill)
    for gone in (on.ended, on.ended_too_often):
        draining.upon(gone).to(stopped)(_rest)
        restarting.upon(gone).to(clearing)(_clear)
    draining.upon(on.start).to(restarting).returns(None)
    restarting.upon(on.stop).to(draining).returns(None)

    backoff.upon(on.pause_over).to(clearing)(_clear)
    backoff.upon(on.retry).to(clearing)(_clear)
    backoff.upon(on.restart).to(clearing)(_clear)
    backoff.upon(on.stop).to(stopped)(_rest)

    failed.upon(on.retry).to(clearing)(_start_anew)
    failed.upon(on.restart).to(clearing)(_start_anew)
    failed.upon(on.stop).to(stopped)(_rest)

    # What anybody may ask for at any time, and what changes nothing.
    for at_rest, in_vain in (
        (stopped, (on.stuck, on.retry, on.restart)),
        (clearing, (on.start, on.stuck, on.retry, on.restart)),
        (starting, (on.start, on.retry)),
        (loading, (on.start, on.retry)),
        (ready, (on.start, on.retry)),
        (unwell, (on.start, on.stuck, on.retry, on.restart)),
        (draining, (on.stop, on.stuck, on.retry, on.restart)),
        (restarting, (on.start, on.stuck, on.retry, on.restart)),
        (backoff, (on.start, on.stuck)),
        (failed, (on.start, on.stuck)),
    ):
        for asked in in_vain:
            at_rest.upon(asked).loop().returns(None)
    return builder.build()


_supervised: Final = _table()
