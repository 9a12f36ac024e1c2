"""A tier that is another server of the Messages API."""

from __future__ import annotations

from typing import Any, Final

import orjson
import pytest
from twisted.logger import LogEvent, formatEvent

from tests.house import CLAUDE_CODE, HELLO, Browser, turn
from tests.remote.scene import Scene
from tests.web.test_kinds import VERDICT

Json = Any

MESSAGES: Final = "/prefix/v1/messages"
COUNT: Final = "/prefix/v1/messages/count_tokens"

#: What no preparation would leave as it is.
RICH: Final[Json] = turn(
    system=[
        {"type": "text", "text": "x-anthropic-billing-header: cc=1"},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
    ],
    thinking={"type": "enabled", "budget_tokens": 1024},
    output_config={"effort": "max", "format": {"type": "json_schema", "schema": {"$ref": "#"}}},
    tools=[{"type": "web_search_20250305", "name": "web_search"}],
    context_management={"edits": []},
    something_new=[1, 2, {"x": None}],
)


def test_the_body_goes_as_it_came() -> None:
    """All of it, whatever it holds; only the answer is always a stream."""
    scene = Scene.of("anthropic")
    scene.house.ask(RICH, **CLAUDE_CODE)
    ((body, _),) = scene.there.sent(MESSAGES)
    assert body == {**RICH, "stream": True}


def test_the_model_has_the_name_that_it_has_there() -> None:
    """The client reads its own in the answer."""
    scene = Scene.of("anthropic", model="theirs")
    browser = scene.house.ask(RICH)
    ((body, _),) = scene.there.sent(MESSAGES)
    assert body == {**RICH, "model": "theirs", "stream": True}
    scene.there.held[0].answer()
    scene.house.settle()
    assert browser.json["model"] == "my-model"
    assert browser.json["content"] == [{"type": "text", "text": "Hello"}]


def test_housekeeping_is_not_bounded() -> None:
    """What a tiny model would not end by itself, this one does."""
    scene = Scene.of("anthropic", answer_tokens=16)
    scene.house.ask(turn("Web page content:\n---\n", max_tokens=5000), **CLAUDE_CODE)
    ((body, _),) = scene.there.sent(MESSAGES)
    assert body["max_tokens"] == 5000


def test_a_hook_keeps_its_tools() -> None:
    """A server that has them in its cache would have to read all else anew."""
    scene = Scene.of("anthropic")
    schema: Json = {"output_config": {"format": {"type": "json_schema", "schema": VERDICT}}}
    system = "You are evaluating a hook in Claude Code."
    hook = turn(system=system, tools=RICH["tools"], **schema)
    browser = scene.house.ask(hook, **CLAUDE_CODE)
    ((body, _),) = scene.there.sent(MESSAGES)
    assert body == {**hook, "stream": True}
    scene.there.held[0].answer()
    scene.house.settle()
    assert browser.headers["x-claudegw-call"] == "hook"


@pytest.mark.parametrize(
    ("auth", "name", "value"),
    [(None, "x-api-key", "secret"), ("bearer", "authorization", "Bearer secret")],
)
def test_the_key_is_the_tiers(
    monkeypatch: pytest.MonkeyPatch, auth: str | None, name: str, value: str
) -> None:
    """The client's own never goes on; what else it says of the call does."""
    monkeypatch.setenv("THEIR_KEY", "secret\n")
    scene = Scene.of("anthropic", api_key_env="THEIR_KEY", auth=auth)
    scene.house.ask(
        turn(),
        authorization="Bearer mine",
        x_api_key="mine",
        cookie="mine",
        anthropic_beta="a,b",
        anthropic_version="2023-06-01",
    )
    ((_, headers),) = scene.there.sent(MESSAGES)
    assert headers[name] == value
    assert "mine" not in " ".join(headers.values())
    assert headers["anthropic-beta"] == "a,b"
    assert headers["anthropic-version"] == "2023-06-01"
    assert headers["host"] == "there.example"
    assert len({"authorization", "x-api-key"} & headers.keys()) == 1


def test_the_version_of_the_api_is_always_said() -> None:
    """Servers insist on it: the client's, or where it says none, one that they all know."""
    scene = Scene.of("anthropic")
    scene.there.counts[COUNT] = {"input_tokens": 123}
    scene.house.ask(turn(), "/v1/messages/count_tokens")
    scene.house.ask(turn("a"))
    scene.house.ask(turn("b"), anthropic_version="2099-01-01")
    said = {path: headers["anthropic-version"] for path, _, headers in scene.there.asked}
    assert said == dict.fromkeys(said, "2023-06-01")
    assert said.keys() == {"/prefix/v1/models", COUNT, MESSAGES}
    scene.there.held[0].answer()
    scene.house.settle()
    assert scene.there.asked[-1][2]["anthropic-version"] == "2099-01-01"


def test_a_stream_is_told_as_it_comes() -> None:
    """With what only such a server says: blocks of its own tools, and what its cache cost."""
    scene = Scene.of("anthropic")
    browser = scene.house.ask(turn(stream=True))
    used = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}}
    query = {"type": "input_json_delta", "partial_json": '{"query":"x"}'}
    usage = {"input_tokens": 4, "cache_creation_input_tokens": 9, "cache_read_input_tokens": 2}
    start = {**HELLO[0], "message": {**HELLO[0]["message"], "usage": usage}}
    events: list[Json] = [
        start,
        {"type": "content_block_start", "index": 0, "content_block": used},
        {"type": "content_block_delta", "index": 0, "delta": query},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "pause_turn", "stop_sequence": None, "stop_details": {"x": 1}},
            "usage": {"output_tokens": 5},
        },
        {"type": "message_stop"},
    ]
    scene.there.held[0].answer(*events)
    scene.house.settle()
    assert browser.ended
    assert browser.events[1:4] == events[1:4]
    assert browser.events[4] == {**events[4], "usage": {**usage, "output_tokens": 5}}


def test_a_whole_message_has_the_input_of_a_servers_tool() -> None:
    """As that of any other."""
    scene = Scene.of("anthropic")
    browser = scene.house.ask(turn())
    used = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}}
    query = {"type": "input_json_delta", "partial_json": '{"query":"x"}'}
    scene.there.held[0].answer(
        HELLO[0],
        {"type": "content_block_start", "index": 0, "content_block": used},
        {"type": "content_block_delta", "index": 0, "delta": query},
        *HELLO[3:],
    )
    scene.house.settle()
    assert browser.json["content"] == [{**used, "input": {"query": "x"}}]


def test_a_count_is_the_servers() -> None:
    """Asked with the same body, but for what no count has; and once."""
    scene = Scene.of("anthropic", model="theirs")
    scene.there.counts[COUNT] = {"input_tokens": 123}
    for _ in range(2):
        body = {**RICH, "temperature": 1}
        browser = scene.house.ask(body, "/v1/messages/count_tokens", anthropic_beta="a,b")
        assert browser.json == {"input_tokens": 123}
    ((body, headers),) = scene.there.sent(COUNT)
    assert headers["anthropic-beta"] == "a,b"
    asked = {name: RICH[name] for name in RICH if name != "max_tokens"}
    assert body == {**asked, "model": "theirs"}


def test_nobody_makes_up_a_count() -> None:
    """Without the endpoint it is a 404, on which the client counts in its own way."""
    browser = Scene.of("anthropic").house.ask(turn(), "/v1/messages/count_tokens")
    assert browser.status == 404
    assert browser.json["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("models", "keys", "window", "warned"),
    [
        ([{"id": "theirs", "max_model_len": 5000}], {}, 5000, False),
        ([{"id": "theirs", "max_input_tokens": 6000}], {}, 6000, False),
        ([{"id": "theirs", "meta": {"n_ctx": 7000}}], {}, 7000, False),
        ([{"id": "theirs", "max_model_len": 5000}], {"window": 4000}, 4000, False),
        ([{"id": "a", "max_model_len": 1}, {"id": "b", "max_model_len": 2}], {"model": "b"}, 2, 0),
        ([{"id": "a", "max_model_len": 1}], {"model": "b"}, 200_000, True),
        ([{"id": "theirs"}], {}, 200_000, True),
        ([], {}, 200_000, True),
        (5, {}, 200_000, True),
        ({"theirs": True}, {}, 200_000, True),
        ([{"id": "theirs", "max_model_len": True}], {}, 200_000, True),
        (404, {}, 200_000, True),
        (500, {}, 200_000, True),
        (404, {"window": 4000}, 4000, False),
    ],
)
def test_the_window(
    models: Json, keys: Json, window: int, warned: object, logged: list[LogEvent]
) -> None:
    """What the configuration says, else the server, else what such models have, and a warning."""
    scene = Scene.of("anthropic", **keys)
    scene.there.models = models
    for _ in range(2):
        browser = scene.house.browser()
        browser.get("/v1/models")
        scene.house.settle()
        assert browser.json["data"][0]["max_input_tokens"] == window
        scene.house.wait(31)
    warnings = [event for event in logged if "set window in" in str(event.get("log_format"))]
    assert len(warnings) == bool(warned)


def test_a_prompt_beyond_the_window_is_the_servers_to_refuse() -> None:
    """What is known of it may be wrong, and nobody counts here."""
    scene = Scene.of("anthropic", window=300)
    browser = scene.house.ask(turn("x" * 5000))
    said = {"type": "invalid_request_error", "message": "prompt is too long: 5 tokens > 4 maximum"}
    scene.there.held[0].refuse(400, {"type": "error", "error": said})
    scene.house.settle()
    assert browser.status == 400
    assert browser.json["error"] == said


@pytest.mark.parametrize("status", [429, 529])
def test_when_to_come_again_is_passed_on(status: int) -> None:
    """The permit is back at once."""
    scene = Scene.of("anthropic")
    browser = scene.house.ask(turn())
    scene.there.held[0].request.setHeader("retry-after", "7")
    scene.there.held[0].refuse(status, {"error": {"type": "x", "message": "Later."}})
    scene.house.settle()
    assert (browser.status, browser.headers["retry-after"]) == (status, "7")
    assert scene.house.line().running == 0


def test_a_wrong_key_is_said_before_anything_is_sent() -> None:
    """As soon as the server refuses it."""
    scene = Scene.of("anthropic", api_key="sk-wrong")
    scene.there.models = 401
    browser = scene.house.ask(turn())
    assert (browser.status, browser.headers["x-should-retry"]) == (502, "false")
    assert "sk-wrong" not in browser.body.decode()
    assert scene.there.held == []
    error = scene.tier.status()["error"]
    assert not error["passes"]
    assert "refuses the gateway's key (401)" in error["message"]
    assert "sk-wrong" not in error["message"]


def test_a_client_that_leaves_is_hung_up_for() -> None:
    """And its permit is back at once: there are no slots that could be asked."""
    scene = Scene.of("anthropic")
    browser = scene.house.ask(turn(stream=True))
    scene.there.held[0].begin()
    scene.house.settle()
    browser.leave()
    scene.house.settle()
    assert scene.there.held[0].left
    assert (scene.house.line().running, scene.house.line().settling) == (0, 0)


def answered_once_it_is_there(scene: Scene, browser: Browser) -> None:
    """The server comes, and answers `browser`."""
    scene.there.models = []
    scene.house.wait(3)
    scene.there.held[0].answer()
    scene.house.settle()
    assert browser.status == 200


@pytest.mark.parametrize("retry_after", [None, b"\xff"])
def test_a_server_that_is_gone_is_waited_for(retry_after: bytes | None) -> None:
    """As long as for any other that somebody else starts; also if its header is no text."""
    scene = Scene.of("anthropic", startup_patience=60)
    scene.there.models, scene.there.retry_after = 503, retry_after
    browser = scene.house.ask(turn())
    assert browser.status is None
    answered_once_it_is_there(scene, browser)


def test_a_fault_of_ours_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, logged: list[LogEvent]
) -> None:
    """Who waits for the server is told, and so is who comes next."""
    scene = Scene.of("anthropic", startup_patience=60)
    scene.there.models = 503
    browsers = [scene.house.ask(turn()), scene.house.ask(turn())]
    with monkeypatch.context() as patch:
        patch.setattr(type(scene.tier.remote), "props", lambda _: 1 / 0)
        scene.house.wait(1)
    assert [browser.status for browser in browsers] == [500, 500]
    assert [formatEvent(event) for event in logged if "log_failure" in event] == [
        "tier main: its server cannot be asked"
    ]
    logged.clear()
    assert scene.house.line().waiting == 0
    answered_once_it_is_there(scene, scene.house.ask(turn()))


def test_a_server_that_is_there_and_has_no_time_is_not_asked_again_at_once() -> None:
    """The client hears when to come again."""
    scene = Scene.of("anthropic")
    browser = scene.house.ask(turn())
    scene.there.held[0].refuse(503, {"error": {"message": "Busy."}})
    scene.house.settle()
    assert (browser.status, browser.headers["retry-after"]) == (503, "5")
    assert len(scene.there.held) == 1


def test_a_server_that_goes_away_again_and_again_makes_no_call_poison() -> None:
    """Between here and there is a network."""
    scene = Scene.of("anthropic", resends=3)
    browser = scene.house.ask(turn())
    for number in range(3):
        scene.there.held[number].die()
        scene.house.settle()
    scene.there.held[3].answer()
    scene.house.settle()
    assert browser.status == 200
    assert scene.tier.status()["refused"] == []


def test_an_answer_that_is_no_stream_is_refused() -> None:
    """And not asked for again and again."""
    scene = Scene.of("anthropic")
    browser = scene.house.ask(turn())
    held = scene.there.held[0]
    held.request.setHeader("content-type", "application/json")
    held.request.write(orjson.dumps({"type": "message"}))
    held.finish()
    scene.house.settle()
    assert (browser.status, browser.headers["x-should-retry"]) == (502, "false")
    assert len(scene.there.held) == 1


def test_nothing_is_asked_of_it_that_only_a_llama_server_has() -> None:
    """Neither slots nor templates, while a prompt is evaluated and after it."""
    scene = Scene.of("anthropic")
    scene.house.ask(turn())
    scene.house.wait(20)
    scene.there.held[0].answer()
    scene.house.wait(60)
    assert {path for path, *_ in scene.there.asked} == {MESSAGES, "/prefix/v1/models"}
    assert scene.tier.cache.advice() == []


# --- the OpenAI API -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "m", "prompt": "a"}),
        ("/v1/embeddings", {"model": "m", "input": "a"}),
    ],
)
def test_what_is_no_conversation_is_refused(path: str, body: Json) -> None:
    """Bare prompts and embeddings go to llama-servers alone."""
    browser = Scene.of("anthropic").house.ask(body, path)
    assert browser.status == 400
    assert "'main' is no llama-server" in browser.json["error"]["message"]


def test_a_chat_without_a_bound_gets_what_fits() -> None:
    """What the prompt leaves of the window, where the server counts; else half of it."""
    chat = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    counted, uncounted = (Scene.of("anthropic", window=1000) for _ in range(2))
    counted.there.counts[COUNT] = {"input_tokens": 100}
    bounds = []
    for scene in (counted, uncounted):
        scene.house.ask(chat, "/v1/chat/completions")
        ((body, _),) = scene.there.sent(MESSAGES)
        bounds.append(body["max_tokens"])
    assert bounds == [900, 500]


@pytest.mark.parametrize(
    ("listed", "bound"), [({"max_model_len": 90_000}, 8192), ({"max_tokens": 32_000}, 32_000)]
)
def test_a_chat_without_a_bound_in_a_long_window(listed: Json, bound: int) -> None:
    """The server is told as much as it says that an answer may have, else a modest number."""
    chat = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    scene = Scene.of("anthropic")
    scene.there.models = [{"id": "theirs", **listed}]
    scene.house.ask(chat, "/v1/chat/completions")
    ((body, _),) = scene.there.sent(MESSAGES)
    assert body["max_tokens"] == bound


def test_a_chat_is_said_as_the_messages_api_has_it() -> None:
    """Nothing goes along that its client did not ask for, or that such servers refuse."""
    chat = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Hello.", "reasoning_content": "Hm."},
            {"role": "assistant", "reasoning_content": "Alone."},
            {"role": "user", "content": "And?"},
            {"role": "system", "content": "It is late."},
        ],
        "max_tokens": 100,
        "temperature": 1.5,
        "top_p": 0.9,
        "chat_template_kwargs": {"enable_thinking": True},
    }
    scene = Scene.of("anthropic")
    scene.house.ask(chat, "/v1/chat/completions")
    ((body, _),) = scene.there.sent(MESSAGES)
    reminder = "\n\n<system-reminder>\nIt is late.\n</system-reminder>"
    assert body == {
        "model": "m",
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]},
            {
                "role": "user",
                "content": [{"type": "text", "text": "And?"}, {"type": "text", "text": reminder}],
            },
        ],
        "max_tokens": 100,
        "temperature": 1,
        "top_p": 0.9,
        "stream": True,
    }


@pytest.mark.parametrize(
    ("effort", "thinking"),
    [(None, None), ("none", {"type": "disabled"}), ("high", {"type": "adaptive"})],
)
def test_a_chat_thinks_there_if_its_client_says_how_much(
    effort: str | None, thinking: Json
) -> None:
    """Many models there know no thinking, and refuse a call that mentions it."""
    chat = {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 9}
    scene = Scene.of("anthropic")
    scene.house.ask(chat | ({"reasoning_effort": effort} if effort else {}), "/v1/chat/completions")
    ((body, _),) = scene.there.sent(MESSAGES)
    assert body.get("thinking") == thinking
    assert body.get("output_config") == ({"effort": "high"} if effort == "high" else None)
