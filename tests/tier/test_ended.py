"""Calls that a person has ended: their clients are refused when they come again."""

from __future__ import annotations

from functools import partial

import pytest
from twisted.internet.task import Clock

from gateway.tier.ended import REMEMBERED, Ended
from gateway.wire.errors import ApiError
from tests.house import HELLO, Browser, Household, turn


def ended(house: Household, browser: Browser) -> None:
    """Somebody ends this call by hand."""
    assert house.api.dispatch.end(browser.headers["request-id"])
    house.settle()


def last(house: Household) -> str:
    return str(house.api.dispatch.status()["last"][0]["outcome"])


def test_a_stream_that_is_ended_does_not_come_again() -> None:
    """Its client asks once more without a stream, and is told not to."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    house.wait(1)
    ended(house, browser)
    assert browser.events[-1]["error"]["type"] == "invalid_request_error"
    assert browser.ended
    assert house.main.held[0].left
    assert last(house) == "ended by hand"
    again = house.ask(turn())
    house.wait(4)
    assert (again.status, again.headers["x-should-retry"]) == (400, "false")
    assert len(house.main.held) == 1


def test_one_whose_server_loads_does_not_come_again() -> None:
    """Its client is refused at once, also while nobody is there to answer, and so told where."""
    house = Household.built()
    house.main.status = 503
    browser = house.ask(turn(stream=True))
    (call,) = house.api.dispatch.status()["calls"]
    assert house.api.dispatch.end(call["id"])
    house.settle()
    assert (browser.status, last(house)) == (400, "ended by hand")
    again, other = house.ask(turn(max_tokens=5)), house.ask(turn("other"))
    assert (again.status, again.headers["x-should-retry"]) == (400, "false")
    assert again.headers["x-claudegw-tier"] == "main"
    assert other.status is None
    house.main.status = None
    house.wait(4)
    assert len(house.main.held) == 1


def test_one_that_no_llama_server_would_take_does_not_come_again() -> None:
    """Whatever its body is, it is known again."""
    house = Household.built()
    house.main.status = 503
    body = turn("hi", tools=[{"type": "web_search_20250305", "name": "web_search"}])
    house.ask(body)
    (call,) = house.api.dispatch.status()["calls"]
    assert house.api.dispatch.end(call["id"])
    house.settle()
    again = house.ask(body)
    assert "ended this call by hand" in again.json["error"]["message"]


def test_it_may_be_asked_again_later() -> None:
    """After a few seconds it is a person who asks."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    house.wait(1)
    ended(house, browser)
    house.wait(REMEMBERED)
    house.ask(turn())
    assert len(house.main.held) == 2


def test_others_are_not_touched() -> None:
    """Who waits behind it goes next, and another call is not refused."""
    house = Household.built()
    browser, waiting = house.ask(turn(stream=True)), house.ask(turn("two"))
    house.wait(1)
    ended(house, browser)
    house.wait(4)
    assert len(house.main.held) == 2
    house.main.held[1].answer(*HELLO)
    house.settle()
    assert waiting.status == 200


def test_one_that_waits_is_ended_with_a_status() -> None:
    """It never gets to the server."""
    house = Household.built()
    house.ask(turn("one"))
    waiting = house.ask(turn("two"))
    (call,) = [each for each in house.api.dispatch.status()["calls"] if each["place"]]
    assert call["why"] == "a person waits for it"
    assert house.api.dispatch.end(call["id"])
    house.settle()
    assert (waiting.status, waiting.json["error"]["type"]) == (400, "invalid_request_error")
    assert len(house.main.held) == 1
    assert house.line().waiting == 0
    assert last(house) == "ended by hand"


def test_one_that_is_over_cannot_be_ended() -> None:
    """Nor one that never was."""
    house = Household.built()
    browser = house.ask(turn())
    house.main.held[0].answer()
    house.settle()
    assert not house.api.dispatch.end(browser.headers["request-id"])
    assert not house.api.dispatch.end("req_1")


def test_a_client_that_leaves_is_not_ended_by_hand() -> None:
    """It may come again at once."""
    house = Household.built()
    house.ask(turn(stream=True)).leave()
    house.settle()
    assert last(house) == "cancelled"
    house.ask(turn(stream=True))
    house.wait(2)
    assert len(house.main.held) == 2


def test_only_some_are_remembered() -> None:
    """The memory is bounded, and holds the latest."""
    remembered = Ended(Clock())
    keys = [str(number).encode() for number in range(101)]
    for key in keys:
        remembered.end(key)
    remembered.check(lambda: keys[0])
    for key in keys[1:]:
        with pytest.raises(ApiError):
            remembered.check(partial(bytes, key))
