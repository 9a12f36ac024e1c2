"""How far prompts are, and when waiting calls get their turn; no second passes by itself."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, formatEvent

from gateway.llama.loglines import Prefilling, Released, Started, Works
from gateway.tier.pace import Pace
from gateway.tier.progress import EVERY, Prefill, Progress
from gateway.wire.errors import unavailable
from gateway.wire.events import Usage

NOTHING = Prefill()


@attrs.define(eq=False)
class Slots:
    """A server that is asked for its slots; each answer is given by the test, or at once."""

    clock: Clock
    answer: Any = None
    asked: list[float] = attrs.field(factory=list)
    waiting: list[Deferred[Any]] = attrs.field(factory=list)

    def ask(self) -> Awaitable[Sequence[Any]]:
        self.asked.append(self.clock.seconds())
        answered: Deferred[Any] = Deferred()
        if self.answer is None:
            self.waiting.append(answered)
        elif isinstance(self.answer, Exception):
            answered.errback(self.answer)
        else:
            answered.callback(self.answer)
        return answered


def slot(task: int, evaluated: int, cached: int = 0, *, busy: bool = True) -> dict[str, Any]:
    return {
        "id_task": task,
        "is_processing": busy,
        "n_prompt_tokens_processed": evaluated,
        "n_prompt_tokens_cache": cached,
    }


def measured(clock: Clock, prefill: int = 100) -> Pace:
    """The pace of a model that evaluates so many tokens a second."""
    pace = Pace(clock.seconds)
    pace.learn({"messages": ["x"]}, Usage(prefill * 10, 0, 11), 10, 1)
    return pace


def heard(clock: Clock, slots: int = 1) -> Progress:
    """The progress of a server whose output is heard, and of which nothing was measured yet."""
    return Progress(slots, Pace(clock.seconds), clock)


def generated(progress: Progress, clock: Clock, seconds: float) -> None:
    """One call whose answer took so long."""
    progress.begin("earlier")
    progress.token("earlier")
    clock.advance(seconds)
    progress.end("earlier")


# --- a server that is heard -----------------------------------------------------------------------


def test_the_progress_of_a_counted_prompt() -> None:
    """Tokens done, their total, the speed and the time left, from what the server says."""
    clock = Clock()
    progress = heard(clock)
    progress.begin("a", 1000)
    progress.hear(Started(7))
    clock.advance(4)
    progress.hear(Prefilling(7, 0.4, evaluated=200))
    assert progress.of("a") == Prefill(400, 1000, 0.4, 50.0, 12.0)
    clock.advance(2)
    assert progress.of("a") == Prefill(400, 1000, 0.4, 50.0, 10.0)
    clock.advance(60)
    assert progress.of("a") == Prefill(400, 1000, 0.4, 50.0, 0.0)


def test_the_progress_of_an_older_server() -> None:
    """One that says what the slot holds has told the whole length with it."""
    clock = Clock()
    progress = heard(clock)
    progress.begin("a")
    progress.hear(Started(7))
    clock.advance(1)
    progress.hear(Prefilling(7, 0.905238, held=4891))
    assert progress.of("a") == Prefill(4891, 5403, 0.9052, None, None)
    clock.advance(2)
    progress.hear(Prefilling(7, 0.942069, held=5090))
    assert progress.of("a") == Prefill(5090, 5403, 0.9421, 99.5, 3.1)


def test_the_progress_of_a_prompt_that_nobody_counted() -> None:
    """The time left follows from how the fraction grows; no number of tokens is made up."""
    clock = Clock()
    progress = heard(clock)
    progress.begin("a")
    progress.hear(Started(7))
    clock.advance(4)
    progress.hear(Prefilling(7, 0.60, evaluated=200))
    assert progress.of("a") == Prefill(None, None, 0.60, 50.0, None)
    clock.advance(1)
    progress.hear(Prefilling(7, 0.63, evaluated=250))
    assert progress.of("a") == Prefill(None, None, 0.63, 50.0, None)
    clock.advance(3)
    progress.hear(Prefilling(7, 0.70, evaluated=400))
    assert progress.of("a") == Prefill(None, None, 0.70, 50.0, 12.0)


def test_the_speed_is_that_of_late() -> None:
    """A long prompt becomes slower, and what is left is told by the last steps."""
    clock = Clock()
    progress = heard(clock)
    progress.begin("a", 10_000)
    progress.hear(Started(7))
    for step in range(1, 9):
        clock.advance(1 if step <= 4 else 10)
        progress.hear(Prefilling(7, step / 10, evaluated=step * 1000))
    known = progress.of("a")
    assert known == Prefill(8000, 10_000, 0.8, 100.0, 20.0)


def test_before_the_first_word_the_pace_tells() -> None:
    """The time left is what the model's pace so far makes likely; nothing else is known."""
    clock = Clock()
    progress = Progress(1, measured(clock), clock)
    progress.begin("a", 1000)
    progress.expect("a", lambda: 0.5)
    assert progress.of("a") == Prefill(total=1000, seconds_left=5.0)
    clock.advance(2)
    assert progress.of("a") == Prefill(total=1000, seconds_left=3.0)
    progress.begin("b")
    assert progress.of("b") == NOTHING
    progress.expect("a", lambda: 0.9)
    assert progress.of("a") == Prefill(total=1000, seconds_left=0.0)
    progress.expect("nobody", lambda: 0.9)


def test_with_the_first_token_the_prefill_is_over() -> None:
    """There is no progress of a prompt that is through, nor of a call that is over."""
    clock = Clock()
    progress = heard(clock)
    assert progress.of("a") is None
    progress.begin("a", 1000)
    assert progress.of("a") is not None
    progress.token("a")
    assert progress.of("a") is None
    progress.begin("b", 1000)
    progress.end("b")
    assert progress.of("b") is None
    progress.token("b")
    progress.end("b")


def test_each_call_has_its_own_task() -> None:
    """With several slots a line counts for the call that its task was begun for."""
    clock = Clock()
    progress = heard(clock, slots=2)
    progress.begin("a", 1000)
    progress.begin("b", 1000)
    progress.hear(Started(4))
    progress.hear(Started(9))
    clock.advance(1)
    progress.hear(Prefilling(9, 0.9, evaluated=900))
    progress.hear(Prefilling(4, 0.1, evaluated=100))
    assert progress.of("a") == Prefill(100, 1000, 0.1, 100.0, 9.0)
    assert progress.of("b") == Prefill(900, 1000, 0.9, 900.0, 0.1)


def test_lines_of_unknown_tasks_say_nothing() -> None:
    """What a call that is gone still causes is not the progress of the next one."""
    clock = Clock()
    progress = heard(clock)
    progress.begin("a", 1000)
    progress.hear(Started(4))
    progress.end("a")
    progress.begin("b", 1000)
    clock.advance(1)
    progress.hear(Prefilling(4, 0.9, evaluated=900))
    progress.hear(Prefilling(3, 0.9, evaluated=900))
    progress.hear(Released(3))
    progress.hear(Works())
    assert progress.of("b") == Prefill(total=1000)


def test_a_call_may_be_sent_twice() -> None:
    """An answer that is asked for again, under a schema, begins anew."""
    clock = Clock()
    progress = heard(clock)
    progress.begin("a", 1000)
    progress.hear(Started(4))
    clock.advance(1)
    progress.hear(Prefilling(4, 0.9, evaluated=900))
    progress.begin("a", 1000)
    assert progress.of("a") == Prefill(total=1000)
    progress.hear(Started(5))
    clock.advance(1)
    progress.hear(Prefilling(5, 0.2, evaluated=200))
    assert progress.of("a") == Prefill(200, 1000, 0.2, 200.0, 4.0)


def test_a_call_that_is_sent_again_is_the_latest() -> None:
    """Among several, its next task is the one that was begun last."""
    clock = Clock()
    progress = heard(clock, slots=2)
    for call in "aba":
        progress.begin(call, 1000)
    progress.hear(Started(4))
    progress.hear(Started(5))
    clock.advance(1)
    progress.hear(Prefilling(5, 0.2, evaluated=200))
    assert progress.of("a") == Prefill(200, 1000, 0.2, 200.0, 4.0)


def test_lines_are_understood() -> None:
    """What the server writes is what is heard; the rest passes."""
    clock = Clock()
    progress = heard(clock)
    progress.begin("a", 1000)
    progress.listen("srv  init: model loaded")
    progress.listen("slot launch_slot_: id  0 | task 16 | processing task, is_child = 0")
    clock.advance(1)
    progress.listen(
        "slot print_timing: id  0 | task 16 | prompt processing, n_tokens =    100,"
        " progress = 0.10, t =   1.00 s / 100.00 tokens per second"
    )
    assert progress.of("a") == Prefill(100, 1000, 0.1, 100.0, 9.0)


def test_the_log_tells_of_a_long_prefill(logged: list[LogEvent]) -> None:
    """One line in half a minute, and none for a short prompt."""
    clock = Clock()
    progress = heard(clock)
    progress.begin("req_1", 10_000)
    progress.hear(Started(7))
    for step in range(1, 7):
        clock.advance(10)
        progress.hear(Prefilling(7, step / 10, evaluated=step * 1000))
    told = [formatEvent(event) for event in logged if event["log_level"] == LogLevel.info]
    assert told == [
        "req_1: 30 % of its prompt, 100.0 tokens/s, 70 s left",
        "req_1: 60 % of its prompt, 100.0 tokens/s, 40 s left",
    ]


def test_a_heard_server_needs_no_timer() -> None:
    """Nothing is asked and no clock is wound."""
    clock = Clock()
    progress = heard(clock)
    progress.begin("a", 1000)
    progress.hear(Started(7))
    assert clock.getDelayedCalls() == []


# --- a slot that is free --------------------------------------------------------------------------


def test_the_slot_of_a_call_that_is_gone_is_told_when_it_is_free() -> None:
    """Once, with the server's own line, and for that call alone."""
    clock, freed = Clock(), list[str]()
    progress = heard(clock, slots=2)
    progress.begin("a", idle=lambda: freed.append("a"))
    progress.begin("b", idle=lambda: freed.append("b"))
    progress.hear(Started(4))
    progress.hear(Started(5))
    progress.end("a")
    progress.hear(Works())
    assert freed == []
    progress.hear(Released(4))
    progress.hear(Released(4))
    assert freed == ["a"]
    progress.hear(Released(5))
    assert freed == ["a", "b"]


def test_a_server_that_began_anew_frees_nothing_of_before() -> None:
    """Its tasks have the numbers of earlier ones, and are others."""
    clock, freed = Clock(), list[str]()
    progress = heard(clock)
    progress.begin("a", idle=lambda: freed.append("a"))
    progress.hear(Started(0))
    progress.end("a")
    progress.begin("b", idle=lambda: freed.append("b"))
    progress.hear(Started(0))
    progress.end("b")
    progress.hear(Released(0))
    assert freed == ["b"]
    progress.begin("c", idle=lambda: freed.append("c"))
    progress.hear(Started(1))
    progress.end("c")
    progress.hear(Started(1))  # for somebody else
    progress.hear(Released(1))
    assert freed == ["b"]


def test_a_server_that_frees_nothing_is_not_remembered_without_end() -> None:
    """The oldest tasks are forgotten."""
    clock, freed = Clock(), list[int]()
    progress = heard(clock)
    for task in range(1000):
        progress.begin("a", idle=partial(freed.append, task))
        progress.hear(Started(task))
        progress.end("a")
    assert len(progress._tasks) < 100
    progress.hear(Released(0))
    progress.hear(Released(999))
    assert freed == [999]


# --- a server that is asked -----------------------------------------------------------------------


def test_a_server_is_asked_while_a_prompt_is_evaluated() -> None:
    """Every two seconds from two seconds on, until the first token; then no timer is left."""
    clock = Clock()
    slots = Slots(clock, [])
    progress = Progress(1, Pace(clock.seconds), clock, slots.ask)
    assert clock.getDelayedCalls() == []
    progress.begin("a", 1000)
    for evaluated in range(0, 500, 100):
        slots.answer = [slot(3, evaluated, 200)]
        clock.advance(2)
    assert slots.asked == [2, 4, 6, 8, 10]
    assert progress.of("a") == Prefill(600, 1000, 0.6, 50.0, 8.0)
    progress.token("a")
    assert clock.getDelayedCalls() == []


def test_the_speed_of_a_server_that_is_asked_is_that_of_its_batches() -> None:
    """Between two batches nothing changes, and that is no measurement."""
    clock = Clock()
    slots = Slots(clock, [slot(3, 0)])
    progress = Progress(1, Pace(clock.seconds), clock, slots.ask)
    progress.begin("a", 4096)
    clock.pump([2] * 5)
    assert progress.of("a") == Prefill(total=4096)
    slots.answer = [slot(3, 512)]
    clock.pump([2] * 4)
    assert progress.of("a") == Prefill(512, 4096, 0.125, 42.7, 78.0)


def test_a_server_is_never_asked_more_often() -> None:
    """Short calls, calls one after another and a slow answer do not bring two questions closer."""
    clock = Clock()
    slots = Slots(clock)
    progress = Progress(1, Pace(clock.seconds), clock, slots.ask)
    for _ in range(10):
        progress.begin("short")
        clock.advance(1)
        progress.end("short")
    assert slots.asked == []
    assert clock.getDelayedCalls() == []
    progress.begin("a")
    clock.advance(2)
    progress.begin("b")
    clock.advance(9)
    assert len(slots.asked) == 1
    slots.waiting.pop().callback([])
    clock.advance(1.9)
    assert len(slots.asked) == 1
    clock.advance(0.1)
    assert len(slots.asked) == 2


def test_an_answer_that_comes_too_late_asks_no_more() -> None:
    """The question was under way when the first token came."""
    clock = Clock()
    slots = Slots(clock)
    progress = Progress(1, Pace(clock.seconds), clock, slots.ask)
    progress.begin("a")
    clock.advance(2)
    progress.end("a")
    slots.waiting.pop().callback([slot(3, 100)])
    assert clock.getDelayedCalls() == []
    progress.begin("b")
    clock.advance(2)
    assert len(slots.asked) == 2


def test_nothing_is_asked_while_a_slot_settles() -> None:
    """A question would keep the server from noticing that a client left."""
    clock, settling = Clock(), [1]
    slots = Slots(clock, [slot(3, 100)])
    progress = Progress(2, Pace(clock.seconds), clock, slots.ask, lambda: settling[0])
    progress.begin("a", 1000)
    clock.pump([2] * 5)
    assert slots.asked == []
    settling[0] = 0
    clock.advance(2)
    assert slots.asked == [12]
    assert progress.of("a") == Prefill(100, 1000, 0.1, 8.3, 108.0)


def test_the_slots_of_several_calls() -> None:
    """Tasks are numbered in the order of the calls; while one is missing, nobody guesses."""
    clock = Clock()
    slots = Slots(clock, [slot(9, 100), slot(2, 100, busy=False)])
    progress = Progress(2, Pace(clock.seconds), clock, slots.ask)
    progress.begin("a", 1000)
    progress.begin("b", 2000)
    clock.advance(2)
    assert progress.of("a") == Prefill(total=1000)
    assert progress.of("b") == Prefill(total=2000)
    slots.answer = [slot(9, 300), slot(7, 500)]
    clock.advance(2)
    assert progress.of("a") == Prefill(500, 1000, 0.5, 125.0, 4.0)
    assert progress.of("b") == Prefill(300, 2000, 0.15, 75.0, 22.7)
    progress.end("a")
    slots.answer = [slot(9, 400), slot(7, 900, busy=False)]
    clock.advance(2)
    assert progress.of("b") == Prefill(400, 2000, 0.2, 66.7, 24.0)


@pytest.mark.parametrize("slots", [100, 1], ids=["a slot each", "more than there are slots"])
def test_many_calls_at_a_server_that_is_asked(slots: int) -> None:
    """Where there is a slot for each its task is known; each can end in any case."""
    clock = Clock()
    shown = Slots(clock, [slot(task, 100) for task in range(100)])
    progress = Progress(slots, Pace(clock.seconds), clock, shown.ask)
    for task in range(100):
        progress.begin(str(task), 1000)
    clock.advance(2)
    known = [progress.of(str(task)) for task in range(100)]
    assert known.count(Prefill(100, 1000, 0.1, 50.0, 18.0)) == (100 if slots == 100 else 64)
    for task in range(100):
        progress.end(str(task))
    assert progress._tasks == {}


@pytest.mark.parametrize(
    "answer",
    [
        unavailable("gone"),
        [{"is_processing": True}],
        [{"is_processing": True, "id_task": 3}],
        [{"is_processing": True, "id_task": None}],
        {"error": "no"},
        [None],
        3,
    ],
    ids=str,
)
def test_a_server_that_does_not_tell(answer: Any) -> None:
    """It is not asked again for this call, and the next one finds out anew."""
    clock = Clock()
    slots = Slots(clock, answer)
    progress = Progress(1, Pace(clock.seconds), clock, slots.ask)
    progress.begin("a", 1000)
    clock.pump([2] * 5)
    assert len(slots.asked) == 1
    assert clock.getDelayedCalls() == []
    assert progress.of("a") == Prefill(total=1000)
    progress.end("a")
    slots.answer = [slot(3, 100)]
    progress.begin("b", 1000)
    clock.advance(2)
    assert progress.of("b") == Prefill(100, 1000, 0.1, 50.0, 18.0)


# --- those who wait -------------------------------------------------------------------------------


def test_the_turns_of_those_who_wait() -> None:
    """Each waits for what runs and for all before it."""
    clock = Clock()
    progress = Progress(1, measured(clock), clock)
    generated(progress, clock, 20)
    progress.begin("a", 1000)
    needs = [progress.need(500, 0), progress.need(1000, 0.5), progress.need(None, 0), 1.0]
    assert needs == [25.0, 25.0, None, 1.0]
    assert progress.etas(needs) == [30.0, 55.0, 80.0, None]
    clock.advance(10)
    progress.token("a")
    clock.advance(5)
    assert progress.etas(needs) == [15.0, 40.0, 65.0, None]
    clock.advance(100)
    assert progress.etas(needs[:1]) == [0.0]


def test_the_turns_at_several_slots() -> None:
    """The slot that is free first takes the next one."""
    clock = Clock()
    progress = Progress(3, measured(clock), clock)
    generated(progress, clock, 10)
    progress.begin("a", 2000)
    progress.begin("b", 1000)
    assert progress.etas([5.0, 40.0, 1.0, 1.0]) == [0.0, 5.0, 20.0, 21.0]


def test_where_nothing_was_measured_no_turn_is_told() -> None:
    """A first call has no pace to be judged by."""
    clock = Clock()
    progress = heard(clock)
    assert progress.need(1000, 0) is None
    progress.begin("a", 1000)
    assert progress.etas([None, 1.0]) == [None, None]
    progress.end("a")
    assert progress.etas([None, 1.0]) == [0.0, None]
    progress = Progress(1, measured(clock), clock)
    assert progress.need(1000, 0) is None  # how long answers are is not known yet


def test_the_time_of_an_answer_follows_the_last_ones() -> None:
    """What is measured fades."""
    clock = Clock()
    progress = Progress(1, measured(clock), clock)
    generated(progress, clock, 100)
    for _ in range(20):
        generated(progress, clock, 10)
    assert progress.need(100, 0) == pytest.approx(11, rel=0.02)
    progress.begin("a")
    progress.token("a")
    clock.advance(10)
    progress.token("a")
    clock.advance(10)
    progress.end("a")
    assert progress.need(100, 0) == pytest.approx(14, rel=0.02)


def test_as_json() -> None:
    """What the status shows."""
    assert Prefill(400, 1000, 0.4, 50.0, 12.0).as_json() == {
        "done": 400,
        "total": 1000,
        "fraction": 0.4,
        "tokens_per_second": 50.0,
        "seconds_left": 12.0,
    }


# --- whatever happens -----------------------------------------------------------------------------

CALLS = st.sampled_from("abc")
TASKS = st.integers(0, 4)
HAPPENINGS = st.one_of(
    st.tuples(st.just("begin"), CALLS, st.none() | st.integers(0, 5000), st.floats(0, 1)),
    st.tuples(st.just("token"), CALLS),
    st.tuples(st.just("end"), CALLS),
    st.tuples(st.just("hear"), st.builds(Started, TASKS)),
    st.tuples(st.just("hear"), st.builds(Released, TASKS)),
    st.tuples(
        st.just("hear"),
        st.builds(Prefilling, TASKS, st.floats(0, 1), evaluated=st.integers(0, 9000)),
    ),
    st.tuples(
        st.just("hear"),
        st.builds(Prefilling, TASKS, st.floats(0, 1), held=st.integers(0, 9000)),
    ),
    st.tuples(st.just("slots"), st.lists(st.builds(slot, TASKS, st.integers(0, 9000)))),
    st.tuples(st.just("wait"), st.sampled_from([0.0, 0.7, 1.0, 5.0])),
)


@settings(deadline=None)
@example(
    asks=False,
    happenings=[
        ("begin", "a", None, 0.0),
        ("hear", Started(0)),
        ("hear", Prefilling(0, 2e-313, held=1)),
    ],
)
@given(asks=st.booleans(), happenings=st.lists(HAPPENINGS, max_size=40))
def test_whatever_happens(asks: bool, happenings: list[tuple[Any, ...]]) -> None:
    """Nothing fails, no number is absurd, no slot is told twice, and at the end no timer runs."""
    clock = Clock()
    slots = Slots(clock, [])
    progress = Progress(2, measured(clock), clock, slots.ask if asks else None)
    freed: list[int] = []
    for number, (kind, *what) in enumerate(happenings):
        match kind:
            case "wait":
                clock.advance(what[0])
            case "slots":
                slots.answer = what[0]
            case "begin":
                call, tokens, seen = what
                progress.begin(call, tokens, partial(freed.append, number))
                progress.expect(call, partial(float, seen))
            case _ if kind != "hear" or not asks:
                getattr(progress, kind)(*what)
        for call in "abc":
            known = progress.of(call) or NOTHING
            assert known.fraction is None or 0 <= known.fraction <= 1
            assert known.seconds_left is None or 0 <= known.seconds_left < 1e9
            assert known.tokens_per_second is None or known.tokens_per_second >= 0
        turns = [eta for eta in progress.etas([1.0, None, 2.0]) if eta is not None]
        assert turns == sorted(turns)
        assert all(eta >= 0 for eta in turns)
    assert len(freed) == len(set(freed))
    assert all(late - early >= EVERY for early, late in pairwise(slots.asked))
    for call in "abc":
        progress.end(call)
    assert clock.getDelayedCalls() == []
