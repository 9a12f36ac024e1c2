"""
How far the prompts are that one server evaluates, and when the calls that wait will get their turn.

A server that is our child says it on its stderr (`listen`).  Any other is asked for its slots, only
while a prompt is being evaluated, at most every `EVERY` seconds, and never while a slot is to
notice that its client left: each answer puts that off (docs/protocol.md, "Cancellation").

Nothing is made up: what neither the server said nor `Pace` measured is None.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from heapq import heapify, heapreplace
from math import inf
from typing import Any, Final

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from gateway.llama import loglines
from gateway.llama.loglines import Prefilling, Released, Said, Started
from gateway.tier.pace import Pace
from gateway.wire.errors import ApiError

Json = Any

#: Seconds between two questions for the slots.
EVERY: Final = 2.0

#: Seconds between two lines in the log about one call.
TOLD: Final = 30.0

#: Steps of a prompt over which its speed is taken: the longer a prompt, the slower it becomes.
_STEPS: Final = 4

#: The share of a prompt from which its rest can be told where its length is not known.
_ENOUGH: Final = 0.05

#: What an older call's generation counts for, beside each new one.
_FADING: Final = 0.7

#: Tasks that are remembered of a server which never says that it is through with them.
_REMEMBERED: Final = 64

#: A share of a prompt that says nothing of how long it is.
_NOTHING: Final = 1e-6

log = Logger()


@attrs.frozen
class Prefill:
    """
    How far a prompt is; None is what is not known.

    Attributes:
        done: tokens of the prompt that the slot holds, reused ones too.
        total: tokens of the prompt.
        fraction: of the prompt, from 0 to 1, as far as it was known last.
        tokens_per_second: lately.
        seconds_left: to the first token of the answer.
    """

    done: int | None = None
    total: int | None = None
    fraction: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None

    def as_json(self) -> dict[str, Json]:
        """For ``/status``."""
        return attrs.asdict(self)


@attrs.frozen
class _Step:
    """
    What was known at one time.

    Attributes:
        tokens: a count that grows with the prompt, from whatever it began with.
    """

    at: float
    tokens: int
    held: int | None = None
    fraction: float | None = None


@attrs.define(eq=False)
class _Call:
    """A call that the server works on."""

    name: str
    began: float
    idle: Callable[[], None]
    total: int | None = None
    expected: float | None = None
    task: int | None = None
    first_token: float | None = None
    told: float = attrs.field(default=attrs.Factory(lambda self: self.began, takes_self=True))
    first: _Step | None = None
    steps: deque[_Step] = attrs.field(factory=lambda: deque(maxlen=_STEPS))

    def step(self, step: _Step, *, from_nothing: bool) -> bool:
        """Take `step`; whether it is one.  With `from_nothing` its tokens were 0 at the start."""
        if not self.steps and from_nothing:
            self.steps.append(_Step(self.began, 0))
        if self.steps and step.tokens <= self.steps[-1].tokens:
            return False
        self.first = self.first or step
        self.steps.append(step)
        return True

    def prefill(self, now: float) -> Prefill:
        """How far it is."""
        if self.first is None:
            left = None if self.expected is None else self.expected - (now - self.began)
            return Prefill(total=self.total, seconds_left=_not_below_zero(left))
        last, speed = self.steps[-1], self._speed()
        total = self.total
        if total is None and last.held and last.fraction and last.fraction > _NOTHING:
            total = round(last.held / last.fraction)
        done = last.held
        if done is None and total is not None and last.fraction is not None:
            done = round(total * last.fraction)
        fraction = last.fraction
        if fraction is None and done is not None and total:
            fraction = min(1.0, done / total)
        rest = self._rest(last) if total is None or done is None else max(0, total - done)
        left = None if rest is None or not speed else rest / speed - (now - last.at)
        return Prefill(
            done,
            total,
            fraction if fraction is None else round(fraction, 4),
            speed and round(speed, 1),
            _not_below_zero(left),
        )

    def _speed(self) -> float | None:
        oldest, last = self.steps[0], self.steps[-1]
        seconds = last.at - oldest.at
        return (last.tokens - oldest.tokens) / seconds if seconds > 0 else None

    def _rest(self, last: _Step) -> float | None:
        """Tokens to come, from how the fraction grew with the tokens so far."""
        if self.first is None or self.first.fraction is None or last.fraction is None:
            return None
        grown = last.fraction - self.first.fraction
        if grown < _ENOUGH:
            return None
        return (last.tokens - self.first.tokens) / grown * (1 - last.fraction)


def _not_below_zero(seconds: float | None) -> float | None:
    return None if seconds is None else max(0.0, round(seconds, 1))


@attrs.define(eq=False)
class Progress:
    """
    What is known of the calls that one server works on.

    Attributes:
        slots: how many it works on at once.
        pace: how fast it was so far.
        ask: asks the server for its slots, as ``/slots`` shows them; None where it is heard, or
            shows none.
        settling: how many slots may still work for a client that left.
    """

    slots: int
    pace: Pace
    _reactor: IReactorTime
    ask: Callable[[], Awaitable[Sequence[Json]]] | None = None
    settling: Callable[[], int] = lambda: 0
    _calls: dict[str, _Call] = attrs.field(factory=dict, init=False)
    _tasks: dict[int, _Call] = attrs.field(factory=dict, init=False)
    _generation: float | None = attrs.field(default=None, init=False)
    _next: IDelayedCall | None = attrs.field(default=None, init=False)
    _asked: bool = attrs.field(default=False, init=False)

    # --- what the gateway knows -------------------------------------------------------------------

    def begin(
        self,
        call: str,
        tokens: int | None = None,
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        """
        A call is about to be sent to the server.

        Args:
            call: its name, as in the log.
            tokens: of its prompt, where they were counted.
            idle: called once, when the server says that the call's slot is free; only a server
                that is heard says so.
        """
        if call in self._calls:
            self.end(call)
        known = self._calls[call] = _Call(call, self._reactor.seconds(), idle)
        self._count(known, tokens, 0.0)
        self._wake()

    def expect(self, call: str, seen: Callable[[], float]) -> None:
        """Of the prompt of `call` the server has likely kept the share that `seen` gives."""
        known = self._calls.get(call)
        if known is not None and known.total is not None:  # else nobody can tell its time
            self._count(known, known.total, seen())

    def token(self, call: str) -> None:
        """The first token of the answer came; the later ones change nothing."""
        known = self._calls.get(call)
        if known is not None and known.first_token is None:
            known.first_token = self._reactor.seconds()
            self._quieten()

    def end(self, call: str) -> None:
        """The answer is over, or nobody wants it any more."""
        known = self._calls.pop(call, None)
        if known is None:
            return
        if known.first_token is not None:
            took = self._reactor.seconds() - known.first_token
            before = took if self._generation is None else self._generation
            self._generation = before * _FADING + took * (1 - _FADING)
        if self.ask is not None and known.task is not None:
            self._tasks.pop(known.task, None)
        self._quieten()

    # --- what the server says ---------------------------------------------------------------------

    def listen(self, line: str) -> bool:
        """A line of the server's output; whether it says anything of its work."""
        said = loglines.read(line)
        if said is not None:
            self.hear(said)
        return said is not None

    def hear(self, said: Said) -> None:
        """What a line of the server's output says."""
        match said:
            case Started():
                self._tasks.pop(said.task, None)  # a server that began anew counts anew
                self._meet([said.task])
            case Prefilling() if said.task in self._tasks:
                now = self._reactor.seconds()
                tokens = said.held if said.evaluated is None else said.evaluated
                assert tokens is not None
                step = _Step(now, tokens, said.held, said.fraction)
                self._step(said.task, step, from_nothing=said.evaluated is not None)
            case Released() if said.task in self._tasks:
                self._tasks.pop(said.task).idle()
            case _:
                pass

    # --- what can be told -------------------------------------------------------------------------

    def of(self, call: str) -> Prefill | None:
        """How far the prompt of `call` is; None if it is through, or not begun."""
        known = self._calls.get(call)
        if known is None or known.first_token is not None:
            return None
        return known.prefill(self._reactor.seconds())

    def need(self, tokens: int | None, seen: float) -> float | None:
        """
        Seconds that a call would take.

        Args:
            tokens: of its prompt, where they were counted.
            seen: the share of the prompt that the server has likely kept.
        """
        prefill = self._expected(tokens, seen)
        if prefill is None or self._generation is None:
            return None
        return prefill + self._generation

    def etas(self, needs: Sequence[float | None]) -> list[float | None]:
        """
        The seconds until the turn of each waiting call.

        Args:
            needs: the seconds that each of them will take, in the order in which they will go.
        """
        free = [self._left(call) for call in self._calls.values()]
        free += [0.0] * (self.slots - len(free))
        heapify(free)
        etas: list[float | None] = []
        for need in needs:
            at = free[0]
            etas.append(None if at == inf else round(at, 1))
            heapreplace(free, at + (inf if need is None else need))
        return etas

    def _left(self, call: _Call) -> float:
        """Seconds until the slot of `call` is free; infinite if nobody knows."""
        if self._generation is None:
            return inf
        now = self._reactor.seconds()
        if call.first_token is not None:
            return max(0.0, self._generation - (now - call.first_token))
        left = call.prefill(now).seconds_left
        return inf if left is None else left + self._generation

    def _expected(self, tokens: int | None, seen: float) -> float | None:
        """Seconds that a prompt takes, by the pace so far."""
        return None if tokens is None else self.pace.estimate(tokens, seen, 0)

    def _count(self, call: _Call, tokens: int | None, seen: float) -> None:
        call.total, call.expected = tokens, self._expected(tokens, seen)

    # --- tasks and their calls --------------------------------------------------------------------

    def _meet(self, tasks: Sequence[int]) -> None:
        """The server has begun `tasks`, in this order, and so had we begun their calls."""
        unknown = [call for call in self._calls.values() if call.task is None]
        for task, call in zip(tasks, unknown, strict=False):
            call.task = task
            self._tasks[task] = call
        while len(self._tasks) > max(_REMEMBERED, self.slots):
            del self._tasks[next(iter(self._tasks))]

    def _step(self, task: int, step: _Step, *, from_nothing: bool) -> None:
        call = self._tasks[task]
        if not call.step(step, from_nothing=from_nothing) or step.at - call.told < TOLD:
            return
        known = self.of(call.name)
        if known is None or known.fraction is None or known.seconds_left is None:
            return
        call.told = step.at
        log.info(
            "{id}: {percent:.0f} % of its prompt, {speed} tokens/s, {left:.0f} s left",
            id=call.name,
            percent=100 * known.fraction,
            speed=known.tokens_per_second,
            left=known.seconds_left,
        )

    # --- asking for the slots ---------------------------------------------------------------------

    @property
    def _is_prefilling(self) -> bool:
        return any(call.first_token is None for call in self._calls.values())

    def _wake(self) -> None:
        """Ask in a while, unless that is under way."""
        if self.ask is not None and self._next is None and not self._asked:
            self._next = self._reactor.callLater(EVERY, self._look)

    def _quieten(self) -> None:
        """Ask for nothing while no prompt is being evaluated."""
        if self._next is not None and not self._is_prefilling:
            self._next.cancel()
            self._next = None

    def _look(self) -> None:
        self._next = None
        if self.settling():
            self._wake()
        else:
            self._asked = True
            Deferred.fromCoroutine(self._ask()).addErrback(_tell)

    async def _ask(self) -> None:
        assert self.ask is not None
        try:
            self._see(await self.ask())
        except (ApiError, KeyError, TypeError, ValueError) as error:
            # It is down, or it does not tell; the next call will try again.
            log.debug("cannot read the slots: {error}", error=repr(error))
            return
        finally:
            self._asked = False
        if self._is_prefilling:
            self._wake()

    def _see(self, slots: Sequence[Json]) -> None:
        now = self._reactor.seconds()
        busy = {int(slot["id_task"]): slot for slot in slots if slot["is_processing"]}
        if len(busy) == len(self._calls):  # else one has just begun or ended, and who is who?
            self._meet(sorted(busy.keys() - self._tasks.keys()))
        for task, slot in busy.items():
            if task in self._tasks:
                evaluated = int(slot["n_prompt_tokens_processed"])
                held = evaluated + int(slot["n_prompt_tokens_cache"])
                self._step(task, _Step(now, evaluated, held), from_nothing=True)


def _tell(failure: Failure) -> None:
    log.failure("cannot ask for the slots", failure)
