"""The ladder: what is due when."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.pulse import Rung, Times, Told, due

TIMES = Times()
HEADERS = Told(arrived=0)


def walk(told: Told, until: float, times: Times = TIMES) -> list[tuple[float, Rung]]:
    """All that is said to a client that is told nothing else, with its times."""
    now = told.arrived
    said: list[tuple[float, Rung]] = []
    while now <= until:
        rung, again = due(now, told, times)
        if rung is not Rung.NOTHING:
            said.append((now, rung))
            told = attrs.evolve(told, said_at=now, started=told.started or rung is Rung.START)
        now += again
    return said


def test_the_whole_ladder() -> None:
    """A second of nothing, a ping every ten, the start at 500, a delta every thirty."""
    said = walk(HEADERS, 600)
    assert said[:3] == [(1, Rung.PING), (11, Rung.PING), (21, Rung.PING)]
    assert said[49:] == [
        (491, Rung.PING),
        (500, Rung.START),
        (530, Rung.DELTA),
        (560, Rung.DELTA),
        (590, Rung.DELTA),
    ]


def test_headers_are_held_while_no_server_can_count() -> None:
    """Two minutes of nothing; once it can, what was held back is due at once."""
    held = Told(arrived=0, held=True)
    assert due(119, held, TIMES) == (Rung.NOTHING, 1)
    assert walk(held, 135) == [(120, Rung.PING), (130, Rung.PING)]
    assert due(60, attrs.evolve(held, held=False), TIMES) == (Rung.PING, 10)


@pytest.mark.parametrize(
    ("told", "now", "expected"),
    [
        (Told(0, said_at=95), 100, (Rung.NOTHING, 5)),
        (Told(0, said_at=90), 100, (Rung.PING, 10)),
        (Told(0, said_at=485), 495, (Rung.PING, 5)),
        (Told(0, said_at=499), 500, (Rung.START, 30)),
        (Told(100, said_at=599), 599, (Rung.NOTHING, 1)),
        (Told(0, said_at=700, started=True), 720, (Rung.NOTHING, 10)),
        (Told(0, said_at=700, started=True), 730, (Rung.DELTA, 30)),
        (Told(0, said_at=700, started=True, in_block=True), 710, (Rung.PING, 10)),
        (Told(0, said_at=3, started=True), 20, (Rung.NOTHING, 13)),
    ],
)
def test_one_rung(told: Told, now: float, expected: tuple[Rung, float]) -> None:
    """Events of the answer put the next sign off; inside a block only a ping may stand."""
    assert due(now, told, TIMES) == expected


def test_a_start_that_comes_before_the_headers() -> None:
    """Where the times are set so, the start is the first that is said."""
    times = Times(commit=50, start=20)
    assert walk(HEADERS, 51, times) == [(20, Rung.START), (50, Rung.DELTA)]


@given(
    st.builds(
        Told,
        arrived=st.just(0.0),
        said_at=st.none() | st.floats(0, 1000),
        held=st.booleans(),
        started=st.booleans(),
        in_block=st.booleans(),
    ),
    st.floats(1000, 2000),
)
def test_it_always_comes_again(told: Told, now: float) -> None:
    """In more than nothing and at most half a minute, so that no client's patience ends."""
    _, again = due(now, told, TIMES)
    assert 0 < again <= 30
