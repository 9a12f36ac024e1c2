"""What becomes of each kind of call on its way through the house."""

from __future__ import annotations

from typing import Any, Final

import pytest
from twisted.logger import LogLevel

from gateway.config import RouteRule
from gateway.tier.pace import Pace
from gateway.wire.events import Usage
from tests.house import CLAUDE_CODE, HELLO, Browser, FakeLlama, Household, turn

Json = Any

TOOL: Final = {"name": "Bash", "input_schema": {"type": "object"}}

VERDICT: Final = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "reason": {"type": "string"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def under(schema: Json) -> Json:
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


# --- hooks and other housekeeping -----------------------------------------------------------------


def test_a_hook_with_tools_is_a_hook() -> None:
    """An older client sends all its tools with a hook; it is answered without them, by small."""
    house = Household.built()
    house.small.completions = ['{"ok": true}']
    system = "You are evaluating a hook in Claude Code."
    browser = house.ask(turn(tools=[TOOL], system=system, **under(VERDICT)), **CLAUDE_CODE)
    assert browser.headers["x-claudegw-call"] == "hook"
    assert browser.json["content"] == [{"type": "text", "text": '{"ok": true}'}]
    assert "tools" not in dict(house.small.asked)["/apply-template"]
    assert house.main.asked == []


@pytest.mark.parametrize(
    ("more", "kind", "tier", "bound"),
    [
        ({"messages": turn("Web page content:\n---\n")["messages"]}, "fetch", "small", 1024),
        ({"max_tokens": 1}, "probe", "small", 1),
        ({"model": "claude-haiku-4-5"}, "other", "small", 1024),
        ({"messages": turn("[SUGGESTION MODE: x]")["messages"]}, "suggestion", "main", 8000),
        ({}, "turn", "main", 8000),
    ],
)
def test_only_housekeeping_is_bounded(more: Json, kind: str, tier: str, bound: int) -> None:
    """What goes to a tiny model is cut short; what somebody reads is not."""
    house = Household.built(main=FakeLlama(65536), small=FakeLlama(65536, slots=2))
    house.ask(turn() | {"max_tokens": 8000} | more, **CLAUDE_CODE)
    servers = {"main": house.main, "small": house.small}
    (held,) = servers[tier].held
    assert held.body["max_tokens"] == bound
    (call,) = house.api.dispatch.ledger.status()["calls"]
    assert (call["kind"], call["tier"]) == (kind, tier)
    assert call["background"] == (kind == "suggestion")


def test_a_call_belongs_to_a_session() -> None:
    """The ledger has the client's id of it, so that a status line finds its own."""
    house = Household.built()
    house.ask(turn(), **CLAUDE_CODE, x_claude_code_session_id="s" * 100)
    house.ask(turn())
    ours, theirs = house.api.dispatch.ledger.status()["calls"]
    assert (ours["session"], theirs["session"]) == ("s" * 80, "")


@pytest.mark.parametrize("more", [{"max_tokens": 1}, {"stop_sequences": ["</block>"]}, {}])
def test_an_sdk_users_call_is_a_turn_on_main(more: Json) -> None:
    """Whatever it looks like: only Claude Code has side calls."""
    house = Household.built()
    house.ask(turn(**more) if "max_tokens" not in more else turn() | more)
    (call,) = house.api.dispatch.ledger.status()["calls"]
    assert (call["kind"], call["tier"], call["background"]) == ("turn", "main", False)


def test_an_sdk_users_schema_is_answered_by_main() -> None:
    """A schema of one's own is no title."""
    house = Household.built()
    house.main.completions = ['{"ok": true}']
    browser = house.ask(turn(**under(VERDICT)))
    assert browser.headers["x-claudegw-call"] == "turn"
    assert browser.headers["x-claudegw-tier"] == "main"
    assert browser.json["content"][0]["text"] == '{"ok": true}'


def test_a_search_that_only_anthropic_runs_is_refused() -> None:
    """The client is told why; no model makes results up."""
    house = Household.built()
    search = {"type": "web_search_20250305", "name": "web_search"}
    browser = house.ask(turn(tools=[search]), **CLAUDE_CODE)
    assert browser.status == 400
    assert "web_search" in browser.json["error"]["message"]
    assert browser.headers["x-claudegw-call"] == "other"
    assert house.main.held == []


# --- the safety check -----------------------------------------------------------------------------


def check(words: str = "x" * 2000) -> Json:
    """A safety check of auto mode."""
    return turn("is this safe?", system=words, stop_sequences=["</block>"])


def measured(house: Household, seconds: float, system: str) -> None:
    """Let main answer a turn with this system prompt, its prefill taking so long."""
    house.ask(turn(system=system), **CLAUDE_CODE)
    held = house.main.held.pop()
    held.begin()
    house.wait(seconds)
    held.send(*HELLO[:3])
    house.wait(1)
    usage = {"output_tokens": 11}
    held.send(HELLO[3], HELLO[4] | {"usage": usage}, HELLO[5])
    held.finish()
    house.settle()


def refused(browser: Browser) -> str:
    """Why a check was refused."""
    assert browser.status == 503
    assert browser.headers["x-should-retry"] == "false"
    return str(browser.json["error"]["message"])


def test_a_check_of_unknown_length_is_refused(logged: list[Json]) -> None:
    """Nothing was measured yet: who refuses says what to change, in the log too."""
    house = Household.built(main=FakeLlama(65536))
    why = refused(house.ask(check(), **CLAUDE_CODE))
    assert "not known yet" in why
    assert "disableAutoMode" in why
    assert house.main.held == []
    (warning,) = [event for event in logged if event["log_level"] is LogLevel.warn]
    assert why in warning["why"]


def test_a_check_that_takes_too_long_is_refused() -> None:
    """At 4 tokens in 8 seconds 2 000 are too many for 360 s."""
    house = Household.built(main=FakeLlama(65536))
    measured(house, 8, "something else")
    assert "would take" in refused(house.ask(check(), **CLAUDE_CODE))


def test_a_check_in_time_is_answered_by_main() -> None:
    """At 4 tokens in a tenth of a second they are few."""
    house = Household.built(main=FakeLlama(65536))
    measured(house, 0.1, "something else")
    browser = house.ask(check(), **CLAUDE_CODE)
    (held,) = house.main.held
    held.answer()
    house.settle()
    assert browser.status == 200
    assert browser.headers["x-claudegw-call"] == "classifier"
    assert browser.headers["x-claudegw-tier"] == "main"


def test_a_check_whose_prompt_is_known_is_in_time() -> None:
    """What main has seen of it is not counted: the next check shares nearly all of it."""
    house = Household.built(main=FakeLlama(65536))
    words = "x" * 2000
    measured(house, 8, words)
    house.ask(check(words), **CLAUDE_CODE)
    assert len(house.main.held) == 1


def test_a_check_that_waited_too_long_is_refused_when_its_turn_comes() -> None:
    """It would be answered to nobody; its permit comes back at once."""
    house = Household.built(main=FakeLlama(65536))
    measured(house, 0.1, "something else")
    house.ask(turn(), **CLAUDE_CODE)
    browser = house.ask(check(), **CLAUDE_CODE)
    house.wait(340)
    assert browser.raw == b""
    house.main.held[0].answer()
    house.settle()
    assert "would take" in refused(browser)
    assert len(house.main.held) == 1
    assert (house.line().running, house.line().settling) == (0, 0)


def test_a_rule_may_send_a_check_to_small() -> None:
    """Who writes such a rule has weighed it; the check is asked for whatever was measured."""
    rule = RouteRule("small", kind="classifier")
    house = Household.built(small=FakeLlama(65536, slots=2), rules=[rule])
    house.ask(check(), **CLAUDE_CODE)
    assert len(house.small.held) == 1
    (call,) = house.api.dispatch.ledger.status()["calls"]
    assert (call["kind"], call["rule"]) == ("classifier", "route 1")


# --- switches -------------------------------------------------------------------------------------

SESSION: Final = {
    "x_claude_code_session_id": "session-1",
    "user_agent": CLAUDE_CODE["user-agent"],
}
ON: Final = {"thinking": {"type": "adaptive"}}
OFF: Final = {"thinking": {"type": "disabled"}}


def told(house: Household, headers: Json = SESSION, **more: Json) -> Json:
    """What the template was told for one more turn."""
    house.ask(turn(**more), **headers)
    held = house.main.held.pop()
    held.answer()
    house.settle()
    return held.body["chat_template_kwargs"]


def test_a_switch_that_rewrites_the_past_keeps_its_first_value() -> None:
    """Thinking is switched in the middle: this template would write every turn anew."""
    house = Household.built()
    house.main.template, house.main.rewrites = "{{ enable_thinking }}", True
    assert told(house, **ON) == {"enable_thinking": True}
    assert told(house, **OFF) == {"enable_thinking": True}
    other = SESSION | {"x_claude_code_session_id": "session-2"}
    assert told(house, other, **OFF) == {"enable_thinking": False}
    assert told(house, other, **ON) == {"enable_thinking": False}


def test_a_switch_that_changes_only_the_end_is_switched() -> None:
    """This template begins the answer in another way, and nothing else."""
    house = Household.built()
    house.main.template = "{{ enable_thinking }}"
    assert told(house, **ON) == {"enable_thinking": True}
    assert told(house, **OFF) == {"enable_thinking": False}


def test_a_side_call_does_not_decide_for_its_conversation() -> None:
    """A page summary of the same session does not think, and its turns do all the same."""
    house = Household.built(rules=())
    house.main.template, house.main.rewrites = "{{ enable_thinking }}", True
    house.small.template, house.small.rewrites = "{{ enable_thinking }}", True
    house.ask(turn("Web page content:\n---\n"), **SESSION)
    assert house.small.held[0].body["chat_template_kwargs"] == {"enable_thinking": False}
    assert told(house, **ON) == {"enable_thinking": True}


# --- words under a schema, beside tools -----------------------------------------------------------


def answer_with(house: Household, words: str) -> None:
    """Let main answer freely with these words."""
    delta = HELLO[2] | {"delta": {"type": "text_delta", "text": words}}
    house.main.held.pop().answer(*HELLO[:2], delta, *HELLO[3:])
    house.settle()


def test_words_that_fit_are_told_as_they_are() -> None:
    """The model needs no grammar to say what fits."""
    house = Household.built()
    browser = house.ask(turn(tools=[TOOL], **under(VERDICT)))
    answer_with(house, '{"ok": false}')
    assert browser.json["content"] == [{"type": "text", "text": '{"ok": false}'}]
    assert "/completion" not in house.main.paths()


def test_words_that_do_not_fit_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the schema, behind the same prompt with the same tools, and without thinking."""
    house = Household.built()
    house.main.completions = ['{"ok": true}']
    learnt: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Pace, "learn", lambda _, *given: learnt.append(given))
    browser = house.ask(turn(tools=[TOOL], **under(VERDICT)))
    answer_with(house, "Yes, it is fine.")
    assert learnt[-1][1:] == (Usage(11, 2, 5), 1.1, 0.5)  # of the second answer alone
    assert browser.json["content"] == [{"type": "text", "text": '{"ok": true}'}]
    assert browser.json["usage"]["output_tokens"] == 1 + 5
    asked = dict(house.main.asked)["/apply-template"]
    assert [each["function"]["name"] for each in asked["tools"]] == ["Bash"]
    assert asked["chat_template_kwargs"]["enable_thinking"] is False
    assert house.line().running == 0


@pytest.mark.parametrize("stream", [True, False])
def test_words_that_do_not_fit_after_the_message_has_begun(stream: bool) -> None:
    """By a pulse while the prompt is long, or by a server that went away: it begins once."""
    house = Household.built()
    house.main.completions = ['{"ok": true}']
    browser = house.ask(turn(tools=[TOOL], stream=stream, **under(VERDICT)))
    house.wait(501)  # a stream has its message_start by now
    lost = house.main.held.pop()
    lost.begin()
    lost.send(HELLO[0])
    lost.die()
    house.wait(10)
    answer_with(house, "Yes, it is fine.")
    if stream:
        names = [event["type"] for event in browser.events if event["type"] != "ping"]
        assert names == [event["type"] for event in HELLO]
        assert b'{\\"ok\\": true}' in browser.body
    else:
        assert browser.json["content"] == [{"type": "text", "text": '{"ok": true}'}]
    assert browser.ended
    assert house.line().running == 0


def test_a_call_needs_no_schema() -> None:
    """A tool call is told as it is; only the last words must fit."""
    house = Household.built()
    browser = house.ask(turn(tools=[TOOL], stream=True, **under(VERDICT)))
    start = {"type": "tool_use", "id": "x", "name": "Bash"}
    house.main.held.pop().answer(
        HELLO[0],
        {"type": "content_block_start", "index": 0, "content_block": start},
        {"type": "content_block_stop", "index": 0},
        HELLO[4] | {"delta": {"stop_reason": "tool_use", "stop_sequence": None}},
        HELLO[5],
    )
    house.settle()
    opened = [event for event in browser.events if event["type"] == "content_block_start"]
    assert [event["content_block"]["name"] for event in opened] == ["Bash"]
    assert browser.ended
    assert "/completion" not in house.main.paths()
