"""The ledger: each call is written down once, by how it ended, without what it said."""

from __future__ import annotations

from contextlib import suppress

import pytest
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.logger import LogEvent, formatEvent

from gateway.ledger import Ledger
from gateway.wire.errors import ApiError, invalid
from tests.house import Household, turn


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
