"""Calls that wait long: the ladder, the client that leaves it, the server that loads."""

from __future__ import annotations

from typing import Any, Final

import orjson
import pytest

from gateway.wire.events import PING, STILL
from tests.house import CLAUDE_CODE, HELLO, Browser, FakeLlama, Household, turn

Json = Any

#: Seconds on the test clock, and what an answer is told by then.
RUNGS: Final = {"before the headers": 0.5, "headers": 1, "pings": 250, "start": 500, "deltas": 900}


def started(browser: Browser) -> list[Json]:
    """The `message_start` events that the client has got."""
    return [event for event in browser.events if event["type"] == "message_start"]


def wait(house: Household, seconds: float) -> None:
    """Let time pass second by second, as it does."""
    for _ in range(int(seconds)):
        house.wait(1)
    house.wait(seconds % 1)


def assert_at_rest(house: Household, *still_there: Browser) -> None:
    """Once these clients have hung up nothing is left on the clock."""
    for browser in still_there:
        browser.leave()
    assert house.clock.getDelayedCalls() == []


# --- the ladder -----------------------------------------------------------------------------------


def test_every_rung_with_its_bytes() -> None:
    """Pings, the start with the counted tokens, deltas, then the answer under that start."""
    house = Household.built()
    browser = house.ask(turn("hello there", stream=True))
    wait(house, 499)
    assert browser.body == PING * 50
    wait(house, 1)
    (start,) = started(browser)
    prompt = orjson.dumps(
        [{"role": "user", "content": [{"type": "text", "text": "hello there"}]}]
    ).decode()
    assert start["message"]["usage"] == {
        "input_tokens": len(prompt),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 0,
    }
    before = browser.body
    wait(house, 89)
    assert browser.body == before + STILL * 2
    house.main.held[0].answer()
    house.settle()
    assert len(started(browser)) == 1
    kinds = [event["type"] for event in browser.events]
    assert kinds[-5:] == [
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    usage = browser.events[-2]["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (4, 3)
    assert browser.ended


def test_who_waits_in_line_climbs_the_same_ladder() -> None:
    """Behind a call that takes an hour a client gets pings, its start, deltas, its answer."""
    house = Household.built()
    first = house.ask(turn("one", stream=True))
    second = house.ask(turn("two", stream=True))
    wait(house, 3600)
    for browser in (first, second):
        assert len(started(browser)) == 1
        assert browser.body.count(PING) == 50
        assert browser.body.count(STILL) == 103
    assert len(house.main.held) == 1
    house.main.held[0].answer()
    house.settle()
    house.main.held[1].answer()
    house.settle()
    assert first.ended
    assert second.ended


@pytest.mark.parametrize("rung", RUNGS)
def test_a_client_may_leave_on_every_rung(rung: str) -> None:
    """The server is hung up on at once, its permit comes back, and no timer is left."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    wait(house, RUNGS[rung])
    browser.leave()
    house.settle()
    assert house.main.held[0].left
    assert house.line().running == 0
    house.wait(2)
    assert house.line().settling == 0
    assert_at_rest(house)


@pytest.mark.parametrize("rung", RUNGS)
def test_a_client_may_leave_the_line_on_every_rung(rung: str) -> None:
    """The server never hears of it."""
    house = Household.built()
    holder = house.ask(turn("one"))
    browser = house.ask(turn("two", stream=True))
    wait(house, RUNGS[rung])
    browser.leave()
    house.wait(2)
    assert house.line().waiting == 0
    assert len(house.main.held) == 1
    house.main.held[0].answer()
    house.settle()
    assert_at_rest(house, holder)


def test_an_answer_under_a_schema_goes_on_from_the_start() -> None:
    """What is told at once at the end has no second beginning either."""
    house = Household.built()
    house.main.completions = ['{"ok": true}']
    house.ask(turn("one"))
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}}
    body = turn(
        "two", stream=True, output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    browser = house.ask(body)
    wait(house, 501)
    house.main.held[0].answer()
    house.settle()
    assert len(started(browser)) == 1
    assert browser.ended


def test_a_start_without_a_count_says_nothing_of_the_tokens() -> None:
    """A server that cannot count when it is asked does not break an answer."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    house.main.status = 500
    wait(house, 500)
    (start,) = started(browser)
    assert start["message"]["usage"]["input_tokens"] == 0
    house.main.held[0].answer()
    house.settle()
    assert browser.events[-2]["usage"]["input_tokens"] == 4


def test_a_long_silence_inside_a_block_is_filled_with_pings() -> None:
    """Nothing else may stand between the start of a block and its end."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    (held,) = house.main.held
    held.begin()
    held.send(*HELLO[:3])
    wait(house, 100)
    assert browser.body.count(PING) == 10
    assert STILL not in browser.body


# --- answers that are not streamed ----------------------------------------------------------------


def test_a_client_that_would_give_up_is_told_in_time() -> None:
    """Claude Code asks again after 360 s without a status; after 350 s it gets one with reasons."""
    house = Household.built()
    browser = house.ask(turn(), **CLAUDE_CODE)
    wait(house, 349)
    assert browser.raw == b""
    wait(house, 1)
    assert browser.status == 504
    assert browser.json["error"]["type"] == "timeout_error"
    assert house.main.held[0].left
    house.wait(2)
    assert_at_rest(house, browser)


@pytest.mark.parametrize("headers", [{}, CLAUDE_CODE | {"x-stainless-timeout": "3600"}])
def test_a_client_that_waits_longer_is_let_wait(headers: Json) -> None:
    """Other clients have their own clocks, and ours may have been told to wait for an hour."""
    house = Household.built()
    browser = house.ask(turn(), **headers)
    wait(house, 3500)
    house.main.held[0].answer()
    house.settle()
    assert browser.status == 200


# --- calls that are sent again --------------------------------------------------------------------


def test_a_call_that_is_sent_again_without_a_stream_gets_its_place() -> None:
    """It is asked of the server anew, before the call that has waited meanwhile."""
    house = Household.built()
    cut = house.ask(turn("one", stream=True))
    house.ask(turn("two", stream=True))
    cut.leave()
    house.wait(0.6)
    again = house.ask(turn("one") | {"max_tokens": 50})
    house.wait(1)
    assert [held.body["messages"][0]["content"][0]["text"] for held in house.main.held] == [
        "one"
    ] * 2
    house.main.held[1].answer()
    house.settle()
    assert again.status == 200


def test_another_call_does_not_get_the_place() -> None:
    """Neither other words nor another session's same words."""
    house = Household.built()
    session = {"user_agent": CLAUDE_CODE["user-agent"], "x_claude_code_session_id": "one"}
    cut = house.ask(turn("one", stream=True), **session)
    house.ask(turn("two"), **session)
    cut.leave()
    house.ask(turn("one"), **session | {"x_claude_code_session_id": "two"})
    house.wait(2)
    words = [held.body["messages"][0]["content"][0]["text"] for held in house.main.held]
    assert words == ["one", "two"]


# --- loading --------------------------------------------------------------------------------------


def test_a_call_waits_for_a_server_that_loads() -> None:
    """Its headers are held back, so that a refusal would still be a status; then it is answered."""
    house = Household.built()
    house.main.status = 503
    browsers = [house.ask(turn("hi", stream=True)) for _ in range(3)]
    wait(house, 60)
    assert [browser.raw for browser in browsers] == [b""] * 3
    house.main.status = None
    for _ in browsers:
        wait(house, 3)
        house.main.held[-1].answer()
        house.settle()
    assert all(browser.ended for browser in browsers)
    assert_at_rest(house, *browsers)


@pytest.mark.parametrize("stream", [True, False])
def test_a_schema_that_cannot_be_held_waits_for_no_server(stream: bool) -> None:
    """What no server would change is refused at once, and nobody is asked."""
    house = Household.built()
    house.main.status = 503
    held_to = {"format": {"type": "json_schema", "schema": {"not": {}}}}
    browser = house.ask(turn(stream=stream, output_config=held_to))
    assert browser.status == 400
    assert "output_config.format.schema: not" in browser.json["error"]["message"]
    assert house.main.asked == []
    assert_at_rest(house, browser)


def test_a_server_that_loads_is_asked_once_by_all() -> None:
    """Many waiting calls ask no more than one, ever more seldom, and without them nobody asks."""
    house = Household.built()
    house.main.status = 503
    browsers = [house.ask(turn(stream=True)) for _ in range(10)]
    before = house.main.paths().count("/props")
    wait(house, 10)
    assert 4 <= house.main.paths().count("/props") - before <= 14
    for browser in browsers:
        browser.leave()
    wait(house, 3)
    asked = len(house.main.asked)
    wait(house, 60)
    assert len(house.main.asked) == asked
    assert_at_rest(house)


def test_patience_with_a_server_has_an_end() -> None:
    """After it a stream gets the error that its client retries, others a status."""
    house = Household.built(startup_patience=200)
    house.main.status = 503
    stream, whole = house.ask(turn(stream=True)), house.ask(turn())
    wait(house, 119)
    assert stream.raw == whole.raw == b""
    wait(house, 90)
    assert stream.events[-1]["error"]["type"] == "overloaded_error"
    assert (whole.status, whole.headers["retry-after"]) == (503, "5")
    assert_at_rest(house, stream, whole)


def test_a_server_that_comes_and_refuses_the_call_gives_a_status() -> None:
    """Within the time that headers are held back the refusal is a true one."""
    house = Household.built(main=FakeLlama(n_ctx=50))
    house.main.status = 503
    browser = house.ask(turn("x" * 100, stream=True))
    wait(house, 100)
    house.main.status = None
    wait(house, 3)
    assert browser.status == 400
    assert "prompt is too long" in browser.json["error"]["message"]


def test_only_so_many_wait_for_a_server_that_loads() -> None:
    """One more gets 529."""
    house = Household.built(max_waiting=2)
    house.main.status = 503
    for _ in range(2):
        house.ask(turn(stream=True))
    browser = house.ask(turn(stream=True))
    assert browser.status == 529
    assert house.api.dispatch.tiers["main"].status()["waiting"] == 2


def test_who_waits_for_a_server_is_told_when_the_service_stops() -> None:
    """503, and come again."""
    house = Household.built()
    house.main.status = 503
    browser = house.ask(turn())
    house.api.dispatch.tiers["main"].stop()
    house.settle()
    assert browser.status == 503
    assert_at_rest(house, browser)


# --- what everybody can see -----------------------------------------------------------------------


def test_the_status_shows_places_and_progress() -> None:
    """Who runs shows how far its prompt is, who waits its place; nothing is made up."""
    house = Household.built()
    first, second = house.ask(turn("one")), house.ask(turn("two", stream=True))
    running, waiting = house.api.dispatch.status()["calls"]
    assert (running["place"], waiting["place"]) == (None, 1)
    assert waiting["eta"] is None
    assert running["progress"] == {
        "done": None,
        "total": None,
        "fraction": None,
        "tokens_per_second": None,
        "seconds_left": None,
    }
    assert waiting["progress"] is None
    house.main.held[0].answer()
    house.settle()
    (running,) = house.api.dispatch.status()["calls"]
    assert running["place"] is None
    house.main.held[1].answer()
    house.settle()
    assert house.api.dispatch.status()["calls"] == []
    assert_at_rest(house, first, second)


def test_the_next_turn_is_foreseen_by_what_was_measured() -> None:
    """Once main has answered, a waiting call knows when it goes, and that comes nearer."""
    house = Household.built(main=FakeLlama(n_ctx=100))
    house.ask(turn("one"))
    (held,) = house.main.held
    held.begin()
    house.wait(20)
    held.send(*HELLO[:3])
    house.wait(10)
    held.send(HELLO[3], HELLO[4] | {"usage": {"output_tokens": 11}}, HELLO[5])
    held.finish()
    house.settle()
    house.ask(turn("two"))
    house.ask(turn("three"))

    def waiting() -> Json:
        return house.api.dispatch.status()["calls"][-1]

    assert waiting()["place"] == 1
    before = waiting()["eta"]
    assert before > 10
    house.wait(5)
    assert waiting()["eta"] == pytest.approx(before - 5)
