"""The ledger: each call is written down once, by how it ended, without what it said."""

from __future__ import annotations

from contextlib import suppress

import pytest
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.logger import LogEvent, formatEvent

from gateway.ledger import Ledger
from gateway.wire.errors import ApiError, invalid
from gateway.wire.events import Usage
from tests.house import HELLO, Household, turn


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [
        (None, "answered"),
        (invalid("no"), "400 invalid_request_error"),
        (CancelledError(), "cancelled"),
        (KeyError("bug"), "500 internal"),
    ],
)
def test_the_outcome_is_how_the_block_was_left(raised: Exception | None, outcome: str) -> None:
    """An answer, a refusal, a client that left and a bug are told apart."""
    ledger = Ledger(Clock())
    with suppress(ApiError, CancelledError, KeyError), ledger.call("req_1"):
        if raised is not None:
            raise raised
    status = ledger.status()
    assert status["calls"] == []
    assert [record["outcome"] for record in status["last"]] == [outcome]


def test_what_cannot_be_written_down_harms_no_answer(logged: list[LogEvent]) -> None:
    """Nor what the client gets, nor the calls that come after."""
    ledger = Ledger(Clock())

    def fails(_: object) -> None:
        raise KeyError("bug")

    ledger.heard.append(fails)
    for name in ("one", "two"):
        with ledger.call(name):
            pass
    assert [record["id"] for record in ledger.status()["last"]] == ["two", "one"]
    assert ledger.status()["calls"] == []
    assert len([event for event in logged if event.get("log_failure")]) == 2
    logged.clear()


def test_waits_and_work_are_told_apart() -> None:
    """Seconds in line and seconds of work are two figures."""
    clock = Clock()
    ledger = Ledger(clock)
    with ledger.call("req_1") as record:
        clock.advance(3)
        ledger.started(record)
        clock.advance(4)
        (running,) = ledger.status()["calls"]
    assert (running["waited"], running["took"], running["outcome"]) == (3, 4, "running")
    clock.advance(50)
    (ended,) = ledger.status()["last"]
    assert (ended["waited"], ended["took"]) == (3, 4)


def test_the_first_content_is_counted_from_the_turn() -> None:
    """Neither the wait before its turn counts, nor what came before its server went away."""
    clock = Clock()
    ledger = Ledger(clock)
    with ledger.call("req_1") as record:
        clock.advance(3)
        ledger.started(record)
        assert ledger.status()["calls"][0]["first"] is None
        clock.advance(1)
        ledger.content(record)
        record.again()
        assert ledger.status()["calls"][0]["first"] is None
        clock.advance(2)
        ledger.started(record)
        clock.advance(4)
        ledger.content(record)
        clock.advance(5)
        ledger.content(record)
    (ended,) = ledger.status()["last"]
    assert (ended["waited"], ended["first"], ended["took"]) == (6, 4, 9)


def test_a_record_says_when_it_came() -> None:
    """By the clock on the wall, whatever the reactor's counts from."""
    ledger = Ledger(Clock(), lambda: 1_800_000_000.25)
    with ledger.call("req_1"):
        assert ledger.status()["calls"][0]["at"] == 1_800_000_000.25
    assert ledger.status()["last"][0]["at"] == 1_800_000_000.25


def test_an_answer_has_its_first_content() -> None:
    """A stream, a whole message and an answer under a schema alike; not before there is content."""
    house = Household.built()
    for is_streamed in (True, False):
        house.ask(turn(stream=is_streamed))
        (held,) = house.main.held
        house.wait(2)
        held.begin()
        held.send(HELLO[0])
        house.wait(3)
        assert house.api.dispatch.status()["calls"][0]["first"] is None
        held.send(*HELLO[1:3])
        house.wait(4)
        held.send(*HELLO[3:])
        held.finish()
        house.settle()
        house.main.held.clear()
        last = house.api.dispatch.status()["last"][0]
        assert (last["first"], last["took"]) == (5, 9)
    house.main.completions = ['{"n": 1}']
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    house.ask(turn(output_config={"format": {"type": "json_schema", "schema": schema}}))
    last = house.api.dispatch.status()["last"][0]
    assert (last["outcome"], last["first"]) == ("answered", 0)


# --- the chart ------------------------------------------------------------------------------------


def test_an_empty_chart_has_all_its_steps() -> None:
    """Six hours of five minutes each, up to now."""
    chart = Ledger(Clock(), lambda: 1_800_000_000.0).chart()
    assert len(chart) == 72
    assert [step["at"] for step in chart] == [
        1_800_000_000 - 300 * number for number in reversed(range(72))
    ]
    empty = {"calls": 0, "input": 0, "cached": 0, "output": 0, "first": None, "with_first": 0}
    assert all(step == {"at": step["at"], **empty} for step in chart)


def test_a_call_is_where_it_ended() -> None:
    """Its tokens are added up, its first content is a mean, and after six hours it is forgotten."""
    clock = Clock()
    clock.advance(1_800_000_000 + 299)
    ledger = Ledger(clock, clock.seconds)
    for first in (1, 2, None):
        with ledger.call("req_1") as record:
            record.kind, record.usage = "turn", Usage(10, 20, 30)
            ledger.started(record)
            if first is not None:
                record.first = record.started + first  # type: ignore[operator]
            clock.advance(1)
    last, now = ledger.chart()[-2:]
    assert (last["calls"], now["calls"]) == (0, 3)
    assert now == {
        "at": 1_800_000_300,
        "calls": 3,
        "input": 30,
        "cached": 60,
        "output": 90,
        "first": 1.5,
        "with_first": 2,
    }
    clock.advance(71 * 300)
    assert ledger.chart()[0] == now
    clock.advance(300)
    assert not any(step["calls"] for step in ledger.chart())


def test_a_count_is_in_no_chart() -> None:
    """Its tokens were evaluated by nobody."""
    clock = Clock()
    ledger = Ledger(clock, clock.seconds)
    with ledger.call("req_1") as record:
        record.kind, record.usage.input = "count", 1000
    assert ledger.chart()[-1]["calls"] == 0


def test_a_chart_that_nobody_looks_at_does_not_grow() -> None:
    """It forgets by itself."""
    clock = Clock()
    ledger = Ledger(clock, clock.seconds)
    for _ in range(100):
        with ledger.call("req_1"):
            clock.advance(300)
    assert len(ledger._chart._steps) == 72
    assert all(step["calls"] for step in ledger.chart())


# --- what is kept ---------------------------------------------------------------------------------


def test_only_the_last_hundred_are_kept() -> None:
    """The ledger's memory is bounded."""
    ledger = Ledger(Clock())
    for number in range(150):
        with ledger.call(f"req_{number}"):
            pass
    last = ledger.status()["last"]
    assert len(last) == 100
    assert last[0]["id"] == "req_149"


def test_no_word_of_a_call_is_logged(logged: list[LogEvent]) -> None:
    """One line a call, without its text and without the token."""
    house = Household.built(token="sesame")
    browser = house.ask(turn("a very private word"), x_api_key="sesame")
    house.main.held[0].answer()
    house.settle()
    assert browser.status == 200
    lines = [formatEvent(event) for event in logged]
    mine = [line for line in lines if browser.headers["request-id"] in line]
    assert len(mine) == 1
    assert "turn 'my-model' -> main" in mine[0]
    everything = repr(logged) + "".join(lines)
    assert "private" not in everything
    assert "sesame" not in everything
