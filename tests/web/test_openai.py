"""OpenAI's API over HTTP, on a gateway in memory: the same lines, ledger and cancellation."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gateway.config import RouteRule
from tests.house import HELLO, Browser, FakeLlama, Household, turn

Json = Any

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
EMBED = "/v1/embeddings"
SDK = {"authorization": "Bearer x"}
PING = b": ping\n\n"

#: What llama-server's /completion streams for a short answer.
ONCE: list[Json] = [
    {"index": 0, "content": " upon", "tokens": [1], "stop": False},
    {"index": 0, "content": " a", "tokens": [2], "stop": False},
    {
        "index": 0,
        "content": "",
        "tokens": [],
        "stop": True,
        "stop_type": "limit",
        "stopping_word": "",
        "tokens_predicted": 2,
        "tokens_evaluated": 9,
        "timings": {"cache_n": 3, "prompt_n": 6},
    },
]


def chat(text: str = "hi", **more: Json) -> Json:
    """The body of a plain chat call."""
    return {"model": "my-model", "messages": [{"role": "user", "content": text}], **more}


def prompt(text: str = "Once", **more: Json) -> Json:
    """The body of a call that goes on with a bare prompt."""
    return {"model": "my-model", "prompt": text, **more}


def last(house: Household) -> Json:
    """The ledger's record of the last call."""
    return house.api.dispatch.status()["last"][0]


# --- chat -----------------------------------------------------------------------------------------


def test_a_chat_call_is_answered_as_one_object() -> None:
    """It goes to the same endpoint as a turn does, and its answer is a chat completion."""
    house = Household.built()
    browser = house.ask(chat(max_tokens=50), CHAT, **SDK)
    (held,) = house.main.held
    assert held.body["max_tokens"] == 50
    held.answer()
    house.settle()
    assert browser.status == 200
    assert browser.headers["x-claudegw-tier"] == "main"
    assert browser.headers["x-claudegw-call"] == "turn"
    said = browser.json
    assert said["choices"][0]["message"]["content"] == "Hello"
    assert said["model"] == "my-model"
    assert said["usage"]["prompt_tokens"] == 7
    record = last(house)
    kept = ("kind", "tier", "outcome", "input", "cached", "output")
    assert [record[name] for name in kept] == ["turn", "main", "answered", 4, 3, 1]


def test_a_chat_call_is_streamed() -> None:
    """Its chunks come as they are generated, and its end is marked."""
    house = Household.built()
    wanted = chat(stream=True, stream_options={"include_usage": True})
    browser = house.ask(wanted, CHAT, **SDK)
    (held,) = house.main.held
    held.begin()
    held.send(*HELLO[:3])
    house.settle()
    assert browser.headers["content-type"].startswith("text/event-stream")
    assert [chunk["choices"][0]["delta"] for chunk in browser.chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
    ]
    held.send(*HELLO[3:])
    held.finish()
    house.settle()
    assert browser.chunks[-1]["usage"]["total_tokens"] == 8
    assert b"data: [DONE]\n\n" in browser.body
    assert browser.ended


def test_an_answer_without_a_bound_has_the_whole_window() -> None:
    """Nobody says how long it may be, so the window does."""
    house = Household.built()
    house.ask(chat(), CHAT)
    assert house.main.held[0].body["max_tokens"] == house.main.n_ctx


def test_who_waits_gets_comments() -> None:
    """In line and in prefill there is a comment after a second, then each ten seconds."""
    house = Household.built()
    holder, waiter = (house.ask(chat(text, stream=True), CHAT) for text in ("a", "b"))
    for _ in range(21):
        house.wait(1)
    assert holder.body == waiter.body == PING * 3


def test_who_waits_for_very_long_goes_on_getting_comments() -> None:
    """After the message was begun there are comments still, and no chunk that says nothing."""
    house = Household.built()
    browser = house.ask(chat(stream=True), CHAT)
    for _ in range(600):
        house.wait(1)
    assert [chunk["choices"][0]["delta"].get("role") for chunk in browser.chunks] == ["assistant"]
    house.main.held[0].answer()
    house.settle()
    deltas = [chunk["choices"][0]["delta"] for chunk in browser.chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Hello"}, {}]


def test_clients_of_both_apis_stand_in_one_line() -> None:
    """A chat call waits for the turn before it, and goes before the turn after it."""
    house = Household.built()
    house.ask(turn("first"))
    house.ask(chat("second"), CHAT)
    house.ask(turn("third"))
    assert house.line().waiting == 2
    for number in range(3):
        assert len(house.main.held) == number + 1
        house.main.held[number].answer()
        house.settle()
    words = [held.body["messages"][0]["content"][0]["text"] for held in house.main.held]
    assert words == ["first", "second", "third"]


def test_the_small_tier_by_its_name() -> None:
    """`claudegw-small` is the small tier; a name that nobody knows is the main one's."""
    house = Household.built()
    house.ask(chat() | {"model": "claudegw-small"}, CHAT)
    house.ask(chat() | {"model": "gpt-6"}, CHAT)
    assert (len(house.small.held), len(house.main.held)) == (1, 1)


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat()), (COMPLETE, prompt())])
def test_routes_hold_for_all_clients(path: str, body: Json) -> None:
    """A route by a model's name sends these calls too."""
    house = Household.built(rules=[RouteRule(tier="small", model="my-*")])
    browser = house.ask(body, path)
    assert len(house.small.held) == 1
    assert browser.raw == b""


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("path", "body"), [(CHAT, chat()), (COMPLETE, prompt())])
def test_a_client_that_leaves_stops_the_servers_work(path: str, body: Json, stream: bool) -> None:
    """In prefill the server is hung up on at once, and the ledger knows."""
    house = Household.built()
    leaver = house.ask(body | {"stream": stream}, path)
    leaver.leave()
    house.settle()
    assert house.main.held[0].left
    assert last(house)["outcome"] == "cancelled"


@pytest.mark.parametrize(
    ("path", "body", "again"), [(CHAT, chat(), HELLO), (COMPLETE, prompt(), ONCE)]
)
def test_a_server_that_goes_away_is_asked_again(path: str, body: Json, again: Json) -> None:
    """Before content nobody notices."""
    house = Household.built()
    browser = house.ask(body | {"stream": True}, path)
    house.main.held[0].begin()
    house.settle()
    house.main.held[0].die()
    house.wait(2)  # until its slot is known to be idle
    (_, held) = house.main.held
    held.begin()
    held.send(*again) if path == CHAT else held.say(*again)
    held.finish()
    house.settle()
    assert b"[DONE]" in browser.body
    assert last(house)["resent"] == 1


def test_a_server_that_goes_away_in_the_middle_cuts_the_answer() -> None:
    """After content the connection is cut, so that it does not look whole."""
    house = Household.built()
    browser = house.ask(chat(stream=True), CHAT)
    held = house.main.held[0]
    held.begin()
    held.send(*HELLO[:3])
    house.settle()
    held.die()
    house.settle()
    assert browser.wire.aborted
    assert b"[DONE]" not in browser.body


def test_a_failure_within_a_stream() -> None:
    """Once the status is sent the error is a chunk."""
    house = Household.built()
    browser = house.ask(chat(stream=True), CHAT)
    house.wait(1)
    house.main.held[0].refuse(500, {"error": {"type": "server_error", "message": "Compute error."}})
    house.settle()
    assert "Compute error." in browser.chunks[-1]["error"]["message"]
    assert browser.chunks[-1]["error"]["type"] == "server_error"


def test_a_schema_binds_the_answer() -> None:
    """`response_format` is held by a grammar, as a Messages schema is."""
    house = Household.built()
    schema = {
        "type": "object",
        "properties": {"title": {"type": "string"}},
        "required": ["title"],
        "additionalProperties": False,
    }
    house.main.completions = ['{"title": "Tea"}']
    form = {"type": "json_schema", "json_schema": {"name": "t", "schema": schema, "strict": True}}
    browser = house.ask(chat(response_format=form), CHAT)
    assert browser.json["choices"][0]["message"]["content"] == '{"title": "Tea"}'
    asked = dict(house.main.asked)["/completion"]
    assert "title" in asked["grammar"]


def test_any_json_object() -> None:
    """A `json_object` is held by a grammar that lets any object through."""
    house = Household.built()
    house.main.completions = ['{"a": ["b\\n", null]}']
    browser = house.ask(chat(response_format={"type": "json_object"}), CHAT)
    assert browser.json["choices"][0]["message"]["content"] == '{"a": ["b\\n", null]}'


def test_a_schema_that_cannot_be_held() -> None:
    """It is refused at its place in the chat call."""
    house = Household.built()
    form = {"type": "json_schema", "json_schema": {"name": "t", "schema": {"not": {}}}}
    browser = house.ask(chat(response_format=form), CHAT)
    assert browser.status == 400
    assert browser.json["error"]["message"].startswith("response_format.json_schema.schema: not")


# --- a bare prompt --------------------------------------------------------------------------------


def test_a_bare_prompt_is_gone_on_with() -> None:
    """It goes as it is, through the line, and is written down as what it is."""
    house = Household.built()
    browser = house.ask(prompt(max_tokens=2, seed=5, stop="."), COMPLETE, **SDK)
    (held,) = house.main.held
    assert held.body == {
        "prompt": "Once",
        "n_predict": 2,
        "cache_prompt": True,
        "stop": ["."],
        "seed": 5,
        "stream": True,
    }
    assert house.line().running == 1
    held.begin()
    held.say(*ONCE)
    held.finish()
    house.settle()
    said = browser.json
    assert (said["object"], said["choices"][0]["text"]) == ("text_completion", " upon a")
    assert said["choices"][0]["finish_reason"] == "length"
    assert said["usage"]["prompt_tokens"] == 9
    assert browser.headers["x-claudegw-call"] == "other"
    assert (last(house)["cached"], last(house)["output"]) == (3, 2)
    assert house.line().running == 0


def test_a_bare_prompt_is_streamed() -> None:
    """Its pieces come as they are generated."""
    house = Household.built()
    browser = house.ask(prompt(stream=True), COMPLETE)
    (held,) = house.main.held
    held.begin()
    held.say(ONCE[0])
    house.settle()
    assert [chunk["choices"][0]["text"] for chunk in browser.chunks] == [" upon"]
    held.say(*ONCE[1:])
    held.finish()
    house.settle()
    assert [chunk["choices"][0]["text"] for chunk in browser.chunks] == [" upon", " a", ""]
    assert browser.ended


def test_a_stop_word_and_an_end_of_its_own() -> None:
    """Both are `stop`."""
    for kind in ("word", "eos"):
        house = Household.built()
        browser = house.ask(prompt(), COMPLETE)
        house.main.held[0].begin()
        house.main.held[0].say(ONCE[0], {**ONCE[2], "stop_type": kind, "stopping_word": "."})
        house.main.held[0].finish()
        house.settle()
        assert browser.json["choices"][0]["finish_reason"] == "stop"


def test_a_bare_prompt_that_does_not_fit() -> None:
    """It is counted as it is, and refused without a place in the line."""
    house = Household.built(main=FakeLlama(n_ctx=64))
    browser = house.ask(prompt("x" * 64), COMPLETE)
    assert browser.status == 400
    assert browser.json["error"]["code"] == "context_length_exceeded"
    assert browser.json["error"]["message"] == "prompt is too long: 64 tokens > 63 maximum"
    assert "/apply-template" not in house.main.paths()


def test_a_bare_prompt_on_the_small_tier_is_no_housekeeping() -> None:
    """It gets what it asked for, where a side call of Claude Code would be cut short."""
    house = Household.built()
    house.ask(prompt(max_tokens=1900) | {"model": "claudegw-small"}, COMPLETE)
    assert house.small.held[0].body["n_predict"] == 1900


@pytest.mark.parametrize(
    ("path", "body"),
    [(COMPLETE, prompt() | {"logit_bias": {}}), (EMBED, {"model": "m", "input": ""})],
)
def test_what_is_nested_too_deep(path: str, body: Json) -> None:
    """What could not be written again is refused."""
    raw = orjson.dumps(body)
    deep = b"[" * 300 + b"]" * 300
    raw = raw.replace(b'"logit_bias":{}', b'"logit_bias":' + deep)
    raw = raw.replace(b'"input":""', b'"input":' + deep)
    browser = Household.built().ask(raw, path)
    assert browser.status == 400
    assert browser.json["error"]["message"] == "The body is nested too deep."


def test_tokens_need_no_counting() -> None:
    """A prompt of tokens is as long as it is."""
    house = Household.built(main=FakeLlama(n_ctx=64))
    browser = house.ask(prompt() | {"prompt": [1] * 64}, COMPLETE)
    assert browser.json["error"]["code"] == "context_length_exceeded"
    assert "/tokenize" not in house.main.paths()


def test_a_bare_prompt_leaves_room_for_itself() -> None:
    """What may be generated is bounded by what the prompt leaves of the window."""
    house = Household.built(main=FakeLlama(n_ctx=64))
    house.ask(prompt("x" * 50, max_tokens=40), COMPLETE)
    assert house.main.held[0].body["n_predict"] == 14


@pytest.mark.parametrize(
    "events",
    [[{"error": {"code": 500, "message": "Compute error.", "type": "server_error"}}], [[]], [{}]],
)
def test_a_bare_prompt_that_fails(events: Json) -> None:
    """What the server says of it, or what makes no sense, is an error."""
    house = Household.built()
    browser = house.ask(prompt(), COMPLETE)
    house.main.held[0].begin()
    house.main.held[0].say(*events)
    house.settle()
    assert browser.status == 500
    assert browser.json["error"]["type"] == "server_error"


# --- embeddings -----------------------------------------------------------------------------------


def test_embeddings() -> None:
    """A server that has them gives them, in its turn."""
    house = Household.built()
    house.main.embeds = True
    body = {"model": "claudegw-main", "input": ["a", "b"], "encoding_format": "float"}
    browser = house.ask(body, EMBED, **SDK)
    assert browser.status == 200
    assert browser.json["data"][0]["embedding"] == [0.5, -0.5]
    assert dict(house.main.asked)[EMBED] == body
    record = last(house)
    assert [record[name] for name in ("kind", "tier", "input", "outcome")] == [
        "other",
        "main",
        3,
        "answered",
    ]


def idle(house: Household) -> bool:
    """Whether every permit of the main tier is back."""
    line = house.line()
    return (line.running, line.settling, line.waiting) == (0, 0, 0)


def test_embeddings_wait_for_their_turn() -> None:
    """While a slot works nothing is asked of it, and the ledger knows how long that was."""
    house = Household.built()
    house.main.embeds = True
    house.ask(turn())
    browser = house.ask({"model": "m", "input": "a"}, EMBED)
    house.wait(5)
    assert EMBED not in house.main.paths()
    house.main.held[0].answer()
    house.settle()
    assert browser.status == 200
    waited = {each["kind"]: each["waited"] for each in house.api.dispatch.status()["last"]}
    assert waited == {"turn": 0, "other": 5}
    assert idle(house)


def test_embeddings_that_a_person_ends() -> None:
    """Their client is told so, and they no longer wait."""
    house = Household.built()
    house.main.embeds = True
    house.ask(turn())
    browser = house.ask({"model": "m", "input": "a"}, EMBED)
    [call] = [each for each in house.api.dispatch.status()["calls"] if each["kind"] == "other"]
    assert house.api.dispatch.end(call["id"])
    house.settle()
    assert browser.status == 400
    assert "by hand" in browser.json["error"]["message"]
    assert house.line().waiting == 0


def test_a_server_without_embeddings() -> None:
    """Its own words say how to get them."""
    house = Household.built()
    browser = house.ask({"model": "m", "input": "a"}, EMBED)
    assert browser.status == 400
    assert "--embeddings" in browser.json["error"]["message"]
    assert browser.json["error"]["type"] == "invalid_request_error"
    assert idle(house)


def test_a_server_that_goes_away_over_embeddings() -> None:
    """It is asked again, and blamed on the call when it goes away once more."""
    house = Household.built()
    house.main.hangs = {EMBED}
    browser = house.ask({"model": "m", "input": "a"}, EMBED)
    for _ in range(2):
        house.api.dispatch.tiers["main"].client.hang_up()
        house.wait(2)
    assert browser.status == 500
    assert house.main.paths().count(EMBED) == 2


def test_a_server_that_goes_away_once_over_embeddings() -> None:
    """The second answer is the answer."""
    house = Household.built()
    house.main.hangs = {EMBED}
    browser = house.ask({"model": "m", "input": "a"}, EMBED)
    house.main.embeds, house.main.hangs = True, set()
    house.api.dispatch.tiers["main"].client.hang_up()
    house.wait(2)
    assert browser.json["data"][0]["embedding"] == [0.5, -0.5]
    assert last(house)["resent"] == 1


def test_embeddings_that_are_asked_for_again_keep_their_place() -> None:
    """Who was cut off and comes back at once goes before who came meanwhile."""
    house = Household.built()
    house.main.hangs = {EMBED}
    leaver = house.ask({"model": "m", "input": "a"}, EMBED)
    house.ask(turn())
    leaver.leave()
    house.main.embeds, house.main.hangs = True, set()
    house.ask({"model": "m", "input": "a"}, EMBED)
    house.wait(1.5)
    asked = [path for path in house.main.paths() if path in (EMBED, "/v1/messages")]
    assert asked == [EMBED, EMBED, "/v1/messages"]


def test_a_client_that_leaves_its_embeddings() -> None:
    """The server is hung up on."""
    house = Household.built()
    house.main.hangs = {EMBED}
    browser = house.ask({"model": "m", "input": "a"}, EMBED)
    browser.leave()
    house.settle()
    assert (house.line().running, house.line().settling) == (0, 1)
    assert last(house)["outcome"] == "cancelled"


# --- models ---------------------------------------------------------------------------------------


def got(house: Household, path: str, **headers: str) -> Browser:
    browser = house.browser()
    browser.get(path, **headers)
    house.settle()
    return browser


def test_models_in_either_shape() -> None:
    """Who shows a bearer token alone gets OpenAI's list, everybody else Anthropic's."""
    house = Household.built()
    theirs = got(house, "/v1/models", **SDK).json
    assert theirs["object"] == "list"
    assert [(each["id"], each["object"], each["max_model_len"]) for each in theirs["data"]] == [
        ("claudegw-main", "model", 4096),
        ("claudegw-small", "model", 2048),
    ]
    for headers in ({}, {"x-api-key": "x"}, {**SDK, "anthropic-version": "2023-06-01"}):
        assert got(house, "/v1/models", **headers).json["data"][0]["type"] == "model"


def test_a_silent_server_among_the_models() -> None:
    """The list waits 3 s for all of them together; then the silent are what they were last."""
    house = Household.built()
    house.main.hangs = house.small.hangs = {"/props"}
    browser = got(house, "/v1/models")
    assert house.main.paths() == house.small.paths() == ["/props"]
    house.wait(3)
    listed = [(each["display_name"], each["max_input_tokens"]) for each in browser.json["data"]]
    assert listed == [("main: not running", None), ("small: not running", None)]
    house.main.hangs = house.small.hangs = set()
    got(house, "/v1/models")
    house.wait(60)
    house.small.hangs = {"/props"}
    browser = got(house, "/v1/models")
    house.wait(3)
    listed = [(each["display_name"], each["max_input_tokens"]) for each in browser.json["data"]]
    assert listed == [("main: fake", 4096), ("small: fake", 2048)]


def test_who_asks_for_the_models_leaves() -> None:
    """No server is waited for any further."""
    house = Household.built()
    house.main.hangs = house.small.hangs = {"/props"}
    browser = got(house, "/v1/models")
    browser.leave()
    house.settle()
    assert house.clock.getDelayedCalls() == []


@pytest.mark.parametrize("headers", [{}, SDK])
def test_one_model(headers: dict[str, str]) -> None:
    """A model by its name is what the list says of it; others there are none."""
    house = Household.built()
    found = got(house, "/v1/models/claudegw-small", **headers).json
    assert found == got(house, "/v1/models", **headers).json["data"][1]
    for name in ("small", "claudegw-large", "claudegw-"):
        browser = got(house, f"/v1/models/{name}", **headers)
        assert browser.status == 404
        assert "claudegw-main" in browser.json["error"]["message"]
        assert ("request_id" in browser.json) is (headers == {})


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, COMPLETE, EMBED])
@pytest.mark.parametrize(
    ("raw", "status", "says"),
    [(b"{", 400, "valid JSON"), (b"{}", 400, "model: Field required"), (b" " * 200, 413, "200")],
)
def test_errors_have_its_shape(path: str, raw: bytes, status: int, says: str) -> None:
    """Whoever refuses, the answer is an error object as OpenAI's clients read it."""
    house = Household.built(body_limit=100)
    browser = house.ask(raw, path)
    assert browser.status == status
    assert set(browser.json) == {"error"}
    assert set(browser.json["error"]) == {"message", "type", "param", "code"}
    assert says in browser.json["error"]["message"]


def test_a_token_is_wanted_here_too() -> None:
    """Without it 401, with it the way is free."""
    house = Household.built(token="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}):
        browser = house.ask(chat(), CHAT, **headers)
        assert browser.status == 401
        assert browser.json["error"]["code"] == "invalid_api_key"
    house.ask(chat(), CHAT, authorization="Bearer secret")
    assert len(house.main.held) == 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("DELETE", EMBED, 405), ("GET", "/v1/responses", 404)],
)
def test_what_is_not_there(method: str, path: str, status: int) -> None:
    """A wrong method and an unknown path are named."""
    browser = Household.built().browser()
    browser.get(path, method, **SDK)
    assert browser.status == status
    assert browser.json["error"]["message"] == f"There is no {method} {path} here."


def test_a_full_line_is_503() -> None:
    """This API has no 529; when to come again stands in the header."""
    house = Household.built(max_waiting=0)
    house.ask(chat("a"), CHAT)
    browser = house.ask(chat("b"), CHAT)
    assert browser.status == 503
    assert int(browser.headers["retry-after"]) > 0
    assert browser.json["error"]["type"] == "server_error"
