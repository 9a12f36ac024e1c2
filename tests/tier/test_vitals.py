"""Whether a server does anything, under a test clock."""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, formatEvent

from gateway.tier.vitals import Vitals
from gateway.wire.errors import unavailable

STALL = 30.0


def slot(*, decoded: int = 0, processed: int = 0, processing: bool = True) -> dict[str, Any]:
    """One of ``/slots``, as far as it is looked at."""
    return {
        "id_task": 7,
        "is_processing": processing,
        "n_prompt_tokens": 100,
        "n_prompt_tokens_processed": processed,
        "next_token": [{"n_decoded": decoded}],
    }


@attrs.define(eq=False)
class Scene:
    """
    A server that is watched.

    Attributes:
        works: whether it has something to do.
        slots: what it says of its slots; None where it does not answer.
        refuses: its port is closed.
        breaks: it cannot even be asked.
        stuck: why it counted as stuck, each time.
    """

    clock: Clock = attrs.field(factory=Clock)
    works: bool = True
    slots: list[Any] | None = attrs.field(factory=lambda: [slot()])
    refuses: bool = False
    breaks: bool = False
    asked: int = 0
    stuck: list[str] = attrs.field(factory=list)
    vitals: Vitals = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.vitals = Vitals(STALL, lambda: self.works, self._slots, self.stuck.append, self.clock)
        self.vitals.start()

    async def _slots(self) -> Any:
        self.asked += 1
        if self.refuses:
            raise unavailable("down")
        if self.breaks:
            raise OSError("too many files")
        if self.slots is None:
            await Deferred()
        return self.slots

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds)):
            self.clock.advance(1)


def test_a_server_that_makes_no_progress_is_stuck() -> None:
    """Its slots are busy and count no further for so long; it is said once."""
    scene = Scene()
    scene.wait(2 * STALL)
    assert scene.stuck == ["no progress for 30 s"]
    scene.wait(10 * STALL)
    assert len(scene.stuck) == 1
    assert scene.clock.getDelayedCalls() == []


def test_a_question_that_breaks_does_not_end_the_watch(logged: list[LogEvent]) -> None:
    """It is logged, and counts as no answer."""
    scene = Scene(breaks=True)
    scene.wait(STALL / 3)
    assert [formatEvent(event) for event in logged] == ["cannot ask a server for signs of life"]
    logged.clear()
    scene.breaks = False
    scene.wait(2 * STALL)
    assert scene.stuck == ["no progress for 30 s"]


def test_not_before_its_time() -> None:
    """A pause that is shorter than what is borne is none."""
    scene = Scene()
    scene.wait(STALL - 1)
    assert scene.stuck == []
    scene.vitals.sign()
    scene.wait(STALL - 1)
    assert scene.stuck == []


def test_slow_is_not_stuck() -> None:
    """A batch every 28 s, which only its output tells, is progress."""
    scene = Scene()
    for _ in range(20):
        scene.wait(28)
        scene.vitals.sign()
    assert scene.stuck == []


def test_a_busy_server_is_not_asked_while_it_speaks() -> None:
    """Each question would put off its look whether clients are still there."""
    scene = Scene()
    for _ in range(200):
        scene.wait(1)
        scene.vitals.sign()
    assert scene.asked == 0


def test_counts_that_grow_are_progress() -> None:
    """It says nothing, and its slots show that it evaluates, and then that it generates."""
    scene = Scene()
    for step in range(10):
        scene.slots = [slot(processed=step)]
        scene.wait(STALL - 2)
    for step in range(10):
        scene.slots = [slot(processed=9, decoded=step + 1)]
        scene.wait(STALL - 2)
    assert scene.stuck == []
    scene.wait(2 * STALL)
    assert len(scene.stuck) == 1


def test_slots_that_hang_under_work_are_no_progress() -> None:
    """The question is given up, and nothing is left of it."""
    scene = Scene(slots=None)
    scene.wait(2 * STALL)
    assert len(scene.stuck) == 1
    assert scene.stuck[0].startswith("no progress")
    assert scene.clock.getDelayedCalls() == []


def test_slots_that_hang_while_tokens_come_are_borne() -> None:
    """An older server does not answer while it evaluates."""
    scene = Scene(slots=None)
    for _ in range(10):
        scene.wait(STALL / 2)
        scene.vitals.sign()
    assert scene.stuck == []


def test_an_idle_server_that_does_not_answer_is_stuck() -> None:
    """Without work it has only to answer, and does not."""
    scene = Scene(works=False, slots=None)
    scene.wait(2 * STALL)
    assert len(scene.stuck) == 1
    assert scene.stuck[0].startswith("no answer to any question")


def test_an_idle_server_that_refuses_is_stuck() -> None:
    """Its process is there, and its port is not."""
    scene = Scene(works=False, refuses=True)
    scene.wait(2 * STALL)
    assert len(scene.stuck) == 1


def test_an_idle_server_that_is_silent_and_answers_is_well() -> None:
    """Nothing ever changes in its slots, and nothing has to."""
    scene = Scene(works=False, slots=[slot(processing=False)])
    scene.wait(20 * STALL)
    assert scene.stuck == []
    assert scene.asked > 20


def test_who_begins_after_a_long_rest_has_the_whole_time() -> None:
    """The rest before the work counts for nothing."""
    scene = Scene(works=False, slots=[slot(processing=False)])
    scene.wait(10 * STALL)
    scene.works, scene.slots = True, [slot()]
    scene.wait(STALL - 1)
    assert scene.stuck == []


def test_a_client_that_does_not_read_says_nothing_of_the_server() -> None:
    """Its answer is not over, but the server has said all of it and its slot rests."""
    scene = Scene(slots=[slot(processing=False)])
    scene.wait(20 * STALL)
    assert scene.stuck == []


def test_nobody_watches_what_is_stopped() -> None:
    """A question that is under way is given up, and nothing is left on the clock."""
    scene = Scene(slots=None)
    scene.wait(STALL / 3 + 1)
    assert scene.asked == 1
    scene.vitals.stop()
    assert scene.clock.getDelayedCalls() == []
    scene.wait(2 * STALL)
    assert scene.stuck == []


def test_a_new_start_begins_anew() -> None:
    """What was silent before it is another server's."""
    scene = Scene(slots=None)
    scene.wait(STALL - 5)
    scene.vitals.start()
    scene.wait(STALL - 5)
    assert scene.stuck == []
    scene.wait(STALL)
    assert len(scene.stuck) == 1


def test_a_new_bound_holds_from_the_next_look_on() -> None:
    """A configuration that was read again changes it while the server works."""
    scene = Scene()
    scene.vitals.stall = 10 * STALL
    scene.wait(5 * STALL)
    assert scene.stuck == []
    scene.wait(10 * STALL)
    assert len(scene.stuck) == 1
