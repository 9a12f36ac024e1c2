"""Who goes next."""

from __future__ import annotations

import attrs
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.order import next_to_go


@attrs.frozen
class Somebody:
    """A call that waits."""

    background: bool
    number: int = 0


def test_the_first_goes_first() -> None:
    """Among equals the one that came first goes."""
    assert next_to_go([Somebody(False), Somebody(False)]) == 0
    assert next_to_go([Somebody(True), Somebody(True)]) == 0


def test_background_gives_way() -> None:
    """A call that somebody waits for goes before all background calls, however late it came."""
    assert next_to_go([Somebody(True), Somebody(True), Somebody(False)]) == 2
    assert next_to_go([Somebody(True), Somebody(False), Somebody(False)]) == 1


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_everybody_goes_once_and_in_order(backgrounds: list[bool]) -> None:
    """A line is emptied: the awaited ones in order of arrival, then the others in theirs."""
    line = [Somebody(background, number) for number, background in enumerate(backgrounds)]
    everybody = list(line)
    gone = []
    while line:
        gone.append(line.pop(next_to_go(line)))
    assert gone == sorted(everybody, key=lambda call: (call.background, call.number))
