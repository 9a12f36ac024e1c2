"""Answers on their way: the pulse, the client that leaves, the server that fails."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from gateway.tier.line import Ticket
from gateway.wire.events import PING
from tests.house import CLAUDE_CODE, HELLO, FakeLlama, Held, Household, turn

TITLE = {
    "type": "object",
    "properties": {"title": {"type": "string"}},
    "required": ["title"],
    "additionalProperties": False,
}


def title(**more: Any) -> dict[str, Any]:
    """A title call as Claude Code sends it."""
    return turn(output_config={"format": {"type": "json_schema", "schema": TITLE}}, **more)


# --- the pulse --------------------------------------------------------------------------------


def test_headers_and_a_ping_after_one_second() -> None:
    """A call whose server says nothing has its status and a ping after one second."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    house.wait(0.9)
    assert browser.raw == b""
    house.wait(0.1)
    assert browser.status == 200
    assert browser.body == PING


def test_a_ping_every_ten_seconds() -> None:
    """In line and in prefill there is one ping for each ten seconds of silence."""
    house = Household.built()
    holder, waiter = house.ask(turn(stream=True)), house.ask(turn(stream=True))
    for _ in range(31):
        house.wait(1)
    assert holder.body == waiter.body == PING * 4


def test_no_ping_while_there_is_something_to_say() -> None:
    """Events put the next ping off."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    (held,) = house.main.held
    held.begin()
    held.send(*HELLO[:3])
    for _ in range(3):
        house.wait(9)
        held.send(HELLO[2])
    house.settle()
    assert PING not in browser.body
    house.wait(10)
    assert browser.body.count(PING) == 1


def test_the_clock_stops_with_the_answer() -> None:
    """An answer that has ended leaves nothing on the clock."""
    house = Household.built()
    house.ask(turn(stream=True))
    house.main.held[0].answer()
    house.settle()
    assert not [call for call in house.clock.getDelayedCalls() if "_beat" in str(call)]


# --- the client that leaves -------------------------------------------------------------------


def test_a_client_that_leaves_in_line_never_reaches_the_server() -> None:
    """Its place is free at once and its call is never sent."""
    house = Household.built()
    house.ask(turn("first", stream=True))
    leaver = house.ask(turn("second", stream=True))
    assert house.line().waiting == 1
    leaver.leave()
    house.settle()
    assert house.line().waiting == 0
    house.main.held[0].answer()
    house.settle()
    assert len(house.main.held) == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("sent", [0, 3])
def test_a_client_that_leaves_stops_the_servers_work(stream: bool, sent: int) -> None:
    """In prefill and in the middle of the answer the server is hung up on at once."""
    house = Household.built()
    leaver = house.ask(turn(stream=stream))
    (held,) = house.main.held
    if sent:
        held.begin()
        held.send(*HELLO[:sent])
        house.settle()
    leaver.leave()
    house.settle()
    assert held.left
    assert (house.line().running, house.line().settling) == (0, 1)


def test_the_slot_is_known_idle_before_the_next_call() -> None:
    """After a client has left, the next call waits until the server says that its slot is free."""
    house = Household.built()
    leaver, patient = house.ask(turn()), house.ask(turn())
    house.main.busy = 1
    leaver.leave()
    house.wait(1.5)
    assert house.main.paths().count("/slots") == 1
    assert len(house.main.held) == 1
    house.main.busy = 0
    house.wait(2)
    assert len(house.main.held) == 2
    house.main.held[1].answer()
    house.settle()
    assert patient.status == 200


def test_a_server_that_hangs_does_not_shut_the_line() -> None:
    """A question about the slots that is never answered ends, and the next call goes."""
    house = Household.built()
    leaver, patient = house.ask(turn()), house.ask(turn())
    house.main.hangs = {"/slots"}
    leaver.leave()
    house.wait(1.5)
    assert len(house.main.held) == 1
    house.wait(61)
    assert len(house.main.held) == 2
    house.main.held[1].answer()
    house.settle()
    assert patient.status == 200


def test_a_count_that_hangs_is_503() -> None:
    """A server that does not answer a short question within a minute, thrice, is unavailable."""
    house = Household.built()
    house.main.hangs = {"/apply-template"}
    browser = house.ask(turn(), "/v1/messages/count_tokens")
    for _ in range(3):
        house.wait(61)
    assert browser.status == 503
    assert "/apply-template" in browser.json["error"]["message"]


# --- the server that fails --------------------------------------------------------------------


def test_a_server_that_is_not_waited_for_is_503() -> None:
    """Where nobody has patience with a loading server it is a 503 that says when to try again."""
    house = Household.built(startup_patience=0)
    house.main.status = 503
    browser = house.ask(turn(stream=True))
    assert browser.status == 503
    assert browser.headers["retry-after"] == "5"
    assert browser.json["error"]["type"] == "api_error"


def test_an_overflow_is_told_in_the_clients_words() -> None:
    """What llama-server calls exceed_context_size_error makes Claude Code compact."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    house.main.held[0].refuse(
        400,
        {
            "error": {
                "code": 400,
                "message": "request (5000 tokens) exceeds the available context size",
                "type": "exceed_context_size_error",
                "n_prompt_tokens": 5000,
                "n_ctx": 4096,
            }
        },
    )
    house.settle()
    assert browser.status == 400
    assert browser.json["error"] == {
        "type": "invalid_request_error",
        "message": "prompt is too long: 5000 tokens > 4095 maximum",
    }
    assert house.line().running == 0


def test_a_prompt_that_cannot_fit_is_refused_before_the_line() -> None:
    """A long prompt is counted, and refused without a place in the line."""
    house = Household.built()
    house.ask(turn(stream=True))
    browser = house.ask(turn("x" * 5000, stream=True))
    assert browser.status == 400
    assert browser.json["error"]["message"].startswith("prompt is too long: 50")
    assert house.line().waiting == 0


def test_a_long_answer_is_clamped_to_the_window() -> None:
    """The server is never asked for more tokens than its window holds."""
    house = Household.built()
    house.ask(turn("x" * 3500) | {"max_tokens": 32_000})
    (held,) = house.main.held
    prompt = house.main.asked[-2][1]["content"]
    assert held.body["max_tokens"] == 4096 - len(prompt)


@attrs.frozen
class Failing:
    """A way in which a server fails after it has accepted a call."""

    name: str
    sent: int
    error: dict[str, object] | None

    def happen(self, house: Household, held: Held) -> None:
        held.begin()
        held.send(*HELLO[: self.sent])
        house.wait(1)
        if self.error is None:
            held.die()
        else:
            held.send({"type": "error", **self.error})
            held.finish()
        house.settle()


SERVER_ERROR = {"code": 500, "message": "Compute error.", "type": "server_error"}


def test_before_any_content_the_client_is_told_to_come_again() -> None:
    """What is not sent again here is an overloaded_error, which Claude Code sends again."""
    house = Household.built(resends=0)
    browser = house.ask(turn(stream=True))
    Failing("dies", 0, None).happen(house, house.main.held[0])
    assert browser.events[-1]["type"] == "error"
    assert browser.events[-1]["error"]["type"] == "overloaded_error"
    assert browser.ended


def test_after_content_the_connection_is_cut() -> None:
    """A server that dies in the middle of an answer leaves no answer that looks whole."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    Failing("dies", 3, None).happen(house, house.main.held[0])
    assert browser.wire.aborted
    assert not browser.ended


def test_a_servers_own_error_is_wrapped() -> None:
    """An error event of llama-server comes out in the shape of the Messages API."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    held = house.main.held[0]
    held.begin()
    held.send(*HELLO[:3])
    held.request.write(b'event: error\ndata: {"code":500,"message":"Oh","type":"server_error"}\n\n')
    held.finish()
    house.settle()
    error = browser.events[-1]
    assert error["type"] == "error"
    assert error["error"]["type"] == "api_error"
    assert error["request_id"] == browser.headers["request-id"]
    assert browser.ended


def test_a_broken_answer_that_was_not_streamed_is_a_status() -> None:
    """Without a stream the same failure is a 503."""
    house = Household.built(resends=0)
    browser = house.ask(turn())
    Failing("dies", 3, None).happen(house, house.main.held[0])
    assert browser.status == 503


def test_a_stream_without_message_start_has_its_tokens_counted() -> None:
    """llama-server can forget message_start, the only event that has the prompt's tokens."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    house.main.held[0].answer(*HELLO[1:])
    house.settle()
    assert browser.events[0]["type"] == "message_start"
    usage = browser.events[-2]["usage"]
    assert usage["input_tokens"] == len(
        b'[{"role":"user","content":[{"type":"text","text":"hi"}]}]'
    )


# --- housekeeping -----------------------------------------------------------------------------


def test_a_title_comes_from_the_small_tier_under_its_schema() -> None:
    """A title call is answered by /completion under a grammar."""
    house = Household.built()
    house.small.completions = ['{"title": "Fix login"}']
    house.small.template = "{{ enable_thinking }}"
    browser = house.ask(title(), **CLAUDE_CODE)
    assert browser.status == 200
    assert browser.headers["x-claudegw-tier"] == "small"
    assert browser.headers["x-claudegw-call"] == "title"
    assert browser.json["content"] == [{"type": "text", "text": '{"title": "Fix login"}'}]
    assert browser.json["usage"]["input_tokens"] == 11
    assert house.main.asked == []
    sent = dict(house.small.asked)["/completion"]
    assert "title" in sent["grammar"]
    assert sent["n_predict"] == 100
    template = dict(house.small.asked)["/apply-template"]
    assert template["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_title_can_be_streamed() -> None:
    """A schema answer comes as a whole stream, after it was checked."""
    house = Household.built()
    house.small.completions = ['{"title": "Fix login"}']
    browser = house.ask(title(stream=True), **CLAUDE_CODE)
    kinds = [event["type"] for event in browser.events]
    assert kinds == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_an_answer_that_does_not_fit_is_asked_for_once_more() -> None:
    """The first answer misses the schema, the second one is told."""
    house = Household.built()
    house.small.completions = ['{"title": 3', '{"title": "ok"}']
    browser = house.ask(title(), **CLAUDE_CODE)
    assert browser.json["content"][0]["text"] == '{"title": "ok"}'


def test_two_answers_that_do_not_fit_are_an_error() -> None:
    """Nothing is made up: after the second attempt the call fails, and is not to be tried again."""
    house = Household.built()
    house.small.completions = ["{}", '{"title": 3}']
    browser = house.ask(title(), **CLAUDE_CODE)
    assert browser.status == 500
    assert browser.headers["x-should-retry"] == "false"
    assert house.line("small").running == 0


def test_a_bad_schema_is_refused_without_a_slot() -> None:
    """A schema that is none is a 400 before any server is asked for an answer."""
    house = Household.built()
    body = turn(output_config={"format": {"type": "json_schema", "schema": {"type": "strange"}}})
    browser = house.ask(body)
    assert browser.status == 400
    assert "output_config.format.schema" in browser.json["error"]["message"]
    assert "/completion" not in house.main.paths()


def test_a_tiny_model_does_not_ramble() -> None:
    """A free-text answer of the small tier to housekeeping is bounded."""
    house = Household.built(small=FakeLlama(n_ctx=8192, slots=2))
    house.ask(turn() | {"model": "claude-haiku-4-5", "max_tokens": 32_000}, **CLAUDE_CODE)
    assert house.small.held[0].body["max_tokens"] == 1024


def test_a_count_is_taken_where_its_message_would_go() -> None:
    """A count of a haiku-named call goes to small whatever it says of max_tokens."""
    house = Household.built()
    body = {"model": "claude-haiku-4-5", "messages": turn()["messages"]}
    browser = house.ask(body, "/v1/messages/count_tokens", **CLAUDE_CODE)
    assert browser.headers["x-claudegw-tier"] == "small"
    browser = house.ask(body | {"max_tokens": "abc"}, "/v1/messages/count_tokens", **CLAUDE_CODE)
    assert browser.status == 400


def test_a_web_page_of_another_place_is_refused() -> None:
    """A page that posts to loopback without asking gets 403, and no model works for it."""
    house = Household.built()
    browser = house.ask(turn(), origin="https://evil.example")
    assert browser.status == 403
    assert house.main.asked == []
    ours = house.ask(turn(), origin="http://localhost:9090")
    assert ours.raw == b""
    assert len(house.main.held) == 1


def test_housekeeping_that_does_not_fit_goes_to_main() -> None:
    """What is too long for the small window goes to main as background, and says why."""
    house = Household.built(main=FakeLlama(n_ctx=65536))
    body = turn("x" * 3000) | {"model": "claude-haiku-4-5"}
    house.ask(body, **CLAUDE_CODE)
    assert house.small.held == []
    assert len(house.main.held) == 1
    (call,) = house.api.dispatch.ledger.status()["calls"]
    assert call["background"]
    assert "do not fit the 2048 of small" in call["rule"]


# --- counts -----------------------------------------------------------------------------------


def test_a_count_does_not_wait_in_line() -> None:
    """While main is busy a count is answered at once, and asked for only once."""
    house = Household.built()
    house.ask(turn(stream=True))
    for _ in range(2):
        browser = house.ask(turn("count me"), "/v1/messages/count_tokens")
        assert browser.status == 200
    text = b'[{"role":"user","content":[{"type":"text","text":"count me"}]}]'
    assert browser.json == {"input_tokens": len(text)}
    assert house.main.paths().count("/tokenize") == 1


def test_a_count_with_an_image_is_the_servers_own() -> None:
    """An image becomes tokens only inside the server."""
    house = Household.built()
    house.main.vision = True
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    body = turn() | {
        "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]
    }
    browser = house.ask(body, "/v1/messages/count_tokens")
    assert browser.json == {"input_tokens": 77}


# --- the end of the day -----------------------------------------------------------------------


def test_who_waits_when_the_service_stops_is_told_to_come_again() -> None:
    """A call in line gets 503 when the line stops, the one that runs goes on to its end."""
    house = Household.built()
    runner, waiter = house.ask(turn()), house.ask(turn())
    for tier in house.api.dispatch.tiers.values():
        tier.stop()
    house.settle()
    assert waiter.status == 503
    assert waiter.headers["retry-after"] == "5"
    house.main.held[0].answer()
    house.settle()
    assert runner.status == 200


# --- what the slot holds ----------------------------------------------------------------------


@pytest.mark.parametrize("bound", [False, True])
def test_an_answer_is_made_use_of_before_the_next_call_has_the_slot(
    monkeypatch: pytest.MonkeyPatch, *, bound: bool
) -> None:
    """Otherwise what the one proves, and what the slot holds, would be taken for the other's."""
    seen: list[str] = []

    async def before(*_: Any) -> None:
        seen.append("before")

    monkeypatch.setattr("gateway.tier.cache.Cache.before", before)
    monkeypatch.setattr("gateway.tier.cache.Cache.answered", lambda *_: seen.append("answered"))
    house = Household.built(small=FakeLlama(n_ctx=2048, slots=1))
    if bound:
        house.small.completions = ['{"title": "one"}', '{"title": "two"}']
        turns: list[Any] = []
        house.line("small").join(Ticket()).addCallback(turns.append)
        for _ in range(2):
            house.ask(title(), **CLAUDE_CODE)
        assert house.line("small").waiting == 2
        turns[0].finished()
    else:
        for words in ("one", "two"):
            house.ask(turn(words, stream=True))
        house.main.held[0].answer()
        house.settle()
        house.main.held[1].answer()
    house.settle()
    assert seen == ["before", "answered"] * 2
