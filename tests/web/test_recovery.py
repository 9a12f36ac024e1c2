"""Servers that go away under a call: who is told what, and what is sent again."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred

from gateway.llama.child import State
from gateway.tier.cache import Cache
from gateway.tier.deaths import REMEMBERED
from gateway.tier.tier import Tier
from gateway.tier.vitals import Vitals
from tests.house import CLAUDE_CODE, HELLO, FakeLlama, Held, Household, turn

TITLE = {
    "model": "my-model",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "hi"}],
    "output_config": {
        "format": {
            "type": "json_schema",
            "schema": {"properties": {"title": {"type": "string"}}, "required": ["title"]},
        }
    },
}


def die(house: Household, held: Held, *, sent: int = 0) -> None:
    """The server goes away under `held`, after so many events."""
    held.begin()
    held.send(*HELLO[:sent])
    house.settle()
    held.die()
    house.settle()


def come_back(house: Household) -> None:
    """Time for the permit to come back."""
    for _ in range(5):
        house.wait(1)


def last(house: Household) -> Any:
    return house.api.dispatch.ledger.status()["last"][0]


@pytest.mark.parametrize("sent", [0, 1])
def test_a_stream_without_content_goes_on_from_the_new_server(sent: int) -> None:
    """The client sees one message_start and one answer, and never hears of the first server."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    die(house, house.main.held[0], sent=sent)
    come_back(house)
    assert house.main.held[1].body == house.main.held[0].body
    house.main.held[1].answer()
    house.settle()
    kinds = [event["type"] for event in browser.events if event["type"] != "ping"]
    assert kinds == [event["type"] for event in HELLO]
    assert browser.events[-2]["usage"]["input_tokens"] == 4
    assert browser.ended
    assert last(house)["resent"] == 1


def test_an_answer_that_is_not_streamed_is_asked_for_anew_at_any_time() -> None:
    """Nothing of it was told, so all of it is told from the second server."""
    house = Household.built()
    browser = house.ask(turn())
    die(house, house.main.held[0], sent=4)
    come_back(house)
    house.main.held[1].answer()
    house.settle()
    assert browser.status == 200
    assert browser.json["content"] == [{"type": "text", "text": "Hello"}]


def test_after_content_nothing_is_sent_again() -> None:
    """The connection is cut, which makes the client ask again."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    die(house, house.main.held[0], sent=3)
    come_back(house)
    assert browser.wire.aborted
    assert len(house.main.held) == 1


def test_a_call_is_sent_again_only_so_often() -> None:
    """A server that breaks off without going away is asked `resends` times more."""
    house = Household.built(resends=2)
    browser = house.ask(turn())
    for number in range(3):
        house.main.held[number].begin()
        house.main.held[number].finish()
        come_back(house)
    assert len(house.main.held) == 3
    assert browser.status == 503


def test_a_call_that_ends_the_server_twice_is_refused() -> None:
    """It is a 500 that is not to be tried again; the same call later is refused at once."""
    house = Household.built()
    browser = house.ask(turn("poison"))
    for number in range(2):
        die(house, house.main.held[number])
        come_back(house)
    assert browser.status == 500
    assert browser.headers["x-should-retry"] == "false"
    assert "2 times" in browser.json["error"]["message"]
    again, other = house.ask(turn("poison", max_tokens=50)), house.ask(turn("other"))
    assert again.status == 500
    assert len(house.main.held) == 3
    house.main.held[2].answer()
    house.settle()
    assert other.status == 200
    refused = house.api.dispatch.status()["tiers"]["main"]["refused"]
    assert refused == [browser.headers["request-id"]]


def test_poison_is_forgotten_after_an_hour() -> None:
    """A server that was mended in the meantime gets it again."""
    house = Household.built()
    house.ask(turn("poison"))
    for number in range(2):
        die(house, house.main.held[number])
        come_back(house)
    house.wait(REMEMBERED + 1)
    house.ask(turn("poison"))
    assert len(house.main.held) == 3


def test_an_answer_acquits_a_call() -> None:
    """Asked again later, it may lose its server once more: it is no poison."""
    house = Household.built()
    for number in (0, 2):
        browser = house.ask(turn("innocent"))
        die(house, house.main.held[number])
        come_back(house)
        house.main.held[number + 1].answer()
        house.settle()
        assert browser.status == 200
        house.wait(10)
    assert house.api.dispatch.status()["tiers"]["main"]["refused"] == []


def test_who_was_beside_a_poison_is_not_blamed_for_it() -> None:
    """Suspects go one at a time: the innocent one is answered, the other one refused."""
    house = Household.built(main=FakeLlama(slots=2))
    innocent, poison = house.ask(turn("innocent")), house.ask(turn("poison"))
    for held in house.main.held[:2]:
        die(house, held)
    come_back(house)
    while poison.status is None or innocent.status is None:
        (held,) = [each for each in house.main.held[2:] if not each.left and not each.over]
        if "poison" in str(held.body):
            die(house, held)
        else:
            held.answer()
        held.over = True
        come_back(house)
    assert (innocent.status, poison.status) == (200, 500)


def test_calls_in_line_wait_for_a_server_that_is_gone() -> None:
    """Its connection is refused for a while; then everybody gets an answer, in the old order."""
    house = Household.built()
    browsers = [house.ask(turn(text, stream=True)) for text in ("one", "two", "three")]
    house.main.status = 503
    die(house, house.main.held[0])
    for _ in range(30):
        house.wait(1)
    assert len(house.main.held) == 1
    house.main.status = None
    for number in range(1, 4):
        come_back(house)
        house.main.held[number].answer()
        house.settle()
    words = [held.body["messages"][0]["content"][0]["text"] for held in house.main.held[1:]]
    assert words == ["one", "two", "three"]
    assert all(browser.ended for browser in browsers)


def test_a_count_waits_for_a_server_that_is_gone() -> None:
    """It is answered when the server is back."""
    house = Household.built()
    assert house.ask(turn(), "/v1/messages/count_tokens").status == 200
    house.main.status = 503
    browser = house.ask(turn("other"), "/v1/messages/count_tokens")
    house.wait(5)
    assert browser.status is None
    house.main.status = None
    come_back(house)
    assert browser.status == 200


def test_a_call_that_loses_its_server_while_the_house_stops_is_told_at_once() -> None:
    """It would get no place in the line any more: the client is told to come again."""
    house = Household.built()
    browser = house.ask(turn())
    house.api.dispatch.tiers["main"].stop()
    house.main.gone = True
    die(house, house.main.held[0])
    house.settle()
    assert browser.status == 503
    assert browser.headers["retry-after"] == "5"


def test_a_call_whose_tier_was_removed_goes_where_it_belongs_now() -> None:
    """Its server went away, and a reload has taken the tier: main answers."""
    house = Household.built()
    browser = house.ask(turn(model="claude-haiku"), **CLAUDE_CODE)
    house.api.dispatch.tiers = {"main": house.api.dispatch.tiers["main"]}
    die(house, house.small.held[0])
    come_back(house)
    house.main.held[0].answer()
    house.settle()
    assert browser.status == 200
    assert browser.headers["x-claudegw-tier"] == "main"


def test_a_count_whose_tier_was_removed_goes_where_it_belongs_now() -> None:
    """It waits for an answer of a server that goes away, together with its tier."""
    house = Household.built()
    house.small.hangs.add("/apply-template")
    house.small.hangs.add("/v1/messages/count_tokens")
    browser = house.ask(turn(model="claude-haiku"), "/v1/messages/count_tokens", **CLAUDE_CODE)
    assert browser.status is None
    small = house.api.dispatch.tiers["small"]
    house.api.dispatch.tiers = {"main": house.api.dispatch.tiers["main"]}
    small.client.hang_up()
    come_back(house)
    assert browser.status == 200


# --- the small tier -------------------------------------------------------------------------------


def test_without_the_small_tier_its_calls_go_to_main() -> None:
    """They go in the background, and a header says that they are not where they belong."""
    house = Household.built()
    house.small.gone = True
    house.main.completions = ['{"title": "a"}']
    browser = house.ask(TITLE, **CLAUDE_CODE)
    assert browser.status == 200
    assert browser.headers["x-claudegw-tier"] == "main"
    assert browser.headers["x-claudegw-degraded"] == "small is down"
    assert last(house)["background"]


def test_back_to_the_small_tier_when_it_is_well() -> None:
    """The next call goes where it belongs."""
    house = Household.built()
    house.small.gone = True
    house.main.completions = ['{"title": "a"}']
    house.ask(TITLE, **CLAUDE_CODE)
    house.small.gone = False
    house.small.completions = ['{"title": "b"}']
    browser = house.ask(TITLE, **CLAUDE_CODE)
    assert browser.headers["x-claudegw-tier"] == "small"
    assert "x-claudegw-degraded" not in browser.headers


def test_without_any_tier_side_calls_are_refused() -> None:
    """The client does without a title; nothing is made up, and nothing tried again."""
    house = Household.built()
    house.small.gone = house.main.gone = True
    browser = house.ask(TITLE, **CLAUDE_CODE)
    assert browser.status == 503
    assert browser.headers["x-should-retry"] == "false"
    waiting = house.ask(turn())
    house.main.gone = False
    come_back(house)
    house.main.held[0].answer()
    house.settle()
    assert waiting.status == 200


def test_a_small_call_whose_server_dies_is_answered_by_main() -> None:
    """It is sent again, to where it can be answered now."""
    house = Household.built()
    browser = house.ask(turn(model="claude-haiku"), **CLAUDE_CODE)
    house.small.gone = True
    die(house, house.small.held[0])
    come_back(house)
    house.main.held[0].answer()
    house.settle()
    assert browser.status == 200
    assert browser.headers["x-claudegw-tier"] == "main"


class Gone:
    """A server of ours that is away."""

    state = State.BACKOFF
    started_with: tuple[Any, ...] = ((), {})

    @classmethod
    def of(cls, house: Household) -> Tier:
        """The main tier, whose server that is from now on."""
        tier = house.api.dispatch.tiers["main"]
        assert tier.llama is not None
        tier.vitals = Vitals(180, lambda: False, tier.llama.slots, lambda _: None, house.clock)
        tier.child = cls()  # type: ignore[assignment]
        tier.server_is(State.BACKOFF)
        return tier

    def status(self) -> Any:
        return {"reason": "it was ended by SIGKILL"}


def test_a_call_is_not_sent_to_a_server_that_ended_while_its_slot_was_made_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits for the next one, and is to blame for nothing."""
    house, is_prepared = Household.built(), Deferred[None]()
    monkeypatch.setattr(Cache, "before", lambda *_: is_prepared)
    browser = house.ask(turn())
    tier = Gone.of(house)
    is_prepared.callback(None)
    house.settle()
    assert house.main.held == []
    tier.server_is(State.READY)
    house.settle()
    house.main.held[0].answer()
    house.settle()
    assert browser.status == 200
    assert last(house)["outcome"] == "answered"
    assert list(tier.deaths._suspects) == []
    tier.stop()


def test_a_server_of_ours_that_is_gone_is_hung_up_on() -> None:
    """A connection that outlives its server, as behind a proxy, keeps no call."""
    house = Household.built()
    browser = house.ask(turn())
    tier = Gone.of(house)
    house.settle()
    assert house.main.held[0].left
    assert browser.status is None
    tier.stop()
    house.settle()
    assert browser.status == 503
