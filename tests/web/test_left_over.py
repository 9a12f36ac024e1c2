"""
What is left of calls once they are over: nothing.

A gateway runs for months.  Ten calls of each kind must leave no object of ours behind, no timer and
no Deferred, or `python -m bench.load` would say so only after half an hour.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from gateway.tier.deaths import REMEMBERED
from tests.house import CLAUDE_CODE, HELLO, Browser, Household, turn

#: How often each thing is done; what grows by as many is left by every one of them.
OFTEN: Final = 10

SCHEMA: Any = {"type": "object", "properties": {"title": {"type": "string"}}}
NAMED: Any = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}


@pytest.fixture
def house() -> Household:
    return Household.built()


def asks(house: Household, path: str = "/v1/messages", **more: Any) -> Browser:
    """A new connection with a call."""
    return house.ask(turn(**more), path, **CLAUDE_CODE)


def answered(house: Household, *, stream: bool = True, path: str = "/v1/messages") -> None:
    """A call to its end."""
    asking = asks(house, path, stream=stream)
    house.main.held.pop().answer(*HELLO)
    house.settle()
    assert asking.status == 200
    asking.leave()


def whole(house: Household) -> None:
    """A call without a stream."""
    answered(house, stream=False)


def in_chunks(house: Household) -> None:
    """A call of OpenAI's API."""
    answered(house, path="/v1/chat/completions")


def under_a_schema(house: Household) -> None:
    """A title, which the small tier writes."""
    house.small.completions.append('{"title": "x"}')
    asking = asks(house, **NAMED)
    assert asking.status == 200
    asking.leave()


def left_in_line(house: Household) -> None:
    """One waits behind another; then both leave."""
    first, second = asks(house, stream=True), asks(house, text="other", stream=True)
    assert house.line().waiting == 1
    second.leave()
    first.leave()


def left_before_the_status(house: Household) -> None:
    """The client is gone before a byte came."""
    asks(house, stream=True).leave()


def left_in_prefill(house: Household) -> None:
    """Pings have come, and no content."""
    asking = asks(house, stream=True)
    house.main.held.pop().begin()
    house.wait(40)
    asking.leave()


def left_mid_stream(house: Household) -> None:
    """Some of the answer has come."""
    asking = asks(house, stream=True)
    held = house.main.held.pop()
    held.begin()
    held.send(*HELLO[:3])
    house.settle()
    assert b"Hello" in asking.raw
    asking.leave()


def lost(house: Household) -> None:
    """The server goes away mid-stream."""
    asks(house, stream=True)
    held = house.main.held.pop()
    held.begin()
    held.send(*HELLO[:3])
    house.settle()
    held.die()


def asked_again(house: Household) -> None:
    """The server goes away before it said anything, and comes back."""
    asking = asks(house, stream=True)
    house.main.held.pop().die()
    house.wait(5)
    house.main.held.pop().answer(*HELLO)
    house.settle()
    assert b"message_stop" in asking.raw
    asking.leave()


def counted(house: Household) -> None:
    """Tokens of a prompt."""
    assert asks(house, "/v1/messages/count_tokens").status == 200


def refused(house: Household) -> None:
    """What is no call."""
    assert house.ask(b"{").status == 400
    assert asks(house, max_tokens="many").status == 400
    assert house.ask({}, "/nowhere").status == 404


def no_http(house: Household) -> None:
    """What is nothing."""
    browser = house.browser()
    browser.send(b"\x16\x03\x01\r\n\r\n")
    browser.leave()


def half_sent(house: Household) -> None:
    """A body that never comes."""
    browser = house.browser()
    browser.send(b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{")
    browser.leave()


def half_closed(house: Household) -> None:
    """A client that sends no more before it has an answer."""
    browser = asks(house, stream=True)
    browser.half_close()
    browser.leave()


def watched(house: Household) -> None:
    """Everything that shows what there is."""
    for path in ("/", "/status", "/metrics", "/healthz", "/v1/models"):
        browser = house.browser()
        browser.get(path)
        house.settle()
        assert browser.status == 200
        browser.leave()


def page_kept_open(house: Household) -> None:
    """The page's events, for a while."""
    browser = house.browser()
    browser.get("/page/events")
    house.wait(30)
    assert b"data: " in browser.raw
    browser.leave()


DONE = (
    answered,
    whole,
    in_chunks,
    under_a_schema,
    left_in_line,
    left_before_the_status,
    left_in_prefill,
    left_mid_stream,
    lost,
    asked_again,
    counted,
    refused,
    no_http,
    half_sent,
    half_closed,
    watched,
    page_kept_open,
)


def rest(house: Household) -> None:
    """Forget what the test itself has kept, and let every time limit pass."""
    house.forget()
    for seconds in (60, 60, REMEMBERED):
        house.wait(seconds)


@pytest.fixture
def apart() -> Iterator[Callable[[], None]]:
    """Leave alone what there is now: only what comes after it is looked at."""

    def freeze() -> None:
        gc.collect()
        gc.freeze()

    yield freeze
    gc.unfreeze()


def living() -> Counter[str]:
    """The objects of ours and of Twisted's that there are, by their classes."""
    gc.collect()
    names = (f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
    return Counter(name for name in names if name.startswith(("gateway.", "twisted.")))


@pytest.mark.parametrize("do", DONE, ids=lambda do: do.__name__)
def test_nothing_is_left(
    house: Household, apart: Callable[[], None], do: Callable[[Household], None]
) -> None:
    """Neither objects nor timers nor permits nor connections."""
    for _ in range(2):  # what is made once is not left over
        do(house)
        rest(house)
    timers = len(house.clock.getDelayedCalls())
    apart()
    for _ in range(OFTEN):
        do(house)
        rest(house)
    assert {name: many for name, many in living().items() if many >= OFTEN} == {}
    assert len(house.clock.getDelayedCalls()) == timers
    assert not house.site.connections
    line = house.line()
    assert (line.running, line.waiting, line.settling) == (0, 0, 0)
