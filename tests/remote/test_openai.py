"""A tier that is a server of the chat-completions API."""

from __future__ import annotations

from typing import Any, Final

import attrs
import orjson
import pytest

from gateway.policy import grammar
from gateway.policy.schema import read
from tests.house import CLAUDE_CODE, Household, turn
from tests.remote.scene import Scene
from tests.web.test_kinds import VERDICT

Json = Any

CHAT: Final = "/v1/chat/completions"
URL: Final = "http://there.example/v1"

TOOL: Final = {"name": "look", "description": "Looks.", "input_schema": {"type": "object"}}


def sent(body: Json, **keys: Any) -> Json:
    """What the server gets for `body`."""
    scene = Scene.of("openai", URL, **keys)
    scene.house.ask(body)
    ((asked, _),) = scene.there.sent(CHAT)
    return asked


def stream(scene: Scene, *chunks: Json) -> None:
    """Answer the call that is held."""
    held = scene.there.held[-1]
    held.begin()
    for chunk in chunks:
        held.request.write(b"data: %b\n\n" % orjson.dumps(chunk))
    held.request.write(b"data: [DONE]\n\n")
    held.finish()
    scene.house.settle()


def test_a_turn() -> None:
    """Words are strings, and the usage is asked for."""
    asked = sent(
        turn(
            system="Be brief.",
            stop_sequences=["END"],
            temperature=0.5,
            top_k=3,
            cache_control={"type": "ephemeral"},
        ),
        model="theirs",
    )
    told = asked.pop("chat_template_kwargs")
    assert told["enable_thinking"] is False
    assert asked == {
        "model": "theirs",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 100,
        "stop": ["END"],
        "temperature": 0.5,
        "top_k": 3,
    }


def test_a_strict_server_is_told_what_openai_knows() -> None:
    """And nothing else, so that it refuses nothing."""
    thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    said = [thought, {"type": "text", "text": "Hello."}]
    asked = sent(
        turn(messages=[*turn()["messages"], {"role": "assistant", "content": said}], top_k=3),
        strict=True,
    )
    assert asked["messages"][1:] == [{"role": "assistant", "content": "Hello."}]
    assert asked.keys() == {
        *("model", "messages", "stream", "stream_options", "max_completion_tokens")
    }


def test_tools_and_what_they_said() -> None:
    """Calls keep their ids, less what was put before them for the client."""
    call = {"type": "tool_use", "id": "toolu_call_1", "name": "look", "input": {"at": "it"}}
    seen = {"type": "tool_result", "tool_use_id": "toolu_call_1", "content": "A cat."}
    asked = sent(
        turn(
            messages=[
                {"role": "user", "content": "Look."},
                {"role": "assistant", "content": [call]},
                {"role": "user", "content": [seen]},
            ],
            tools=[TOOL],
            tool_choice={"type": "any"},
        )
    )
    function = {"name": "look", "arguments": '{"at":"it"}'}
    assert asked["messages"][1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "A cat."},
    ]
    offered = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
    assert asked["tools"] == [{"type": "function", "function": offered}]
    assert asked["tool_choice"] == "required"


def test_pictures() -> None:
    """As data URLs; those that tools show follow when all of their results are said."""
    picture = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": "AA=="},
    }
    shown = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    calls = [{"type": "tool_use", "id": f"toolu_{n}", "name": "look", "input": {}} for n in "ab"]
    results = [
        {"type": "tool_result", "tool_use_id": "toolu_a", "content": [picture]},
        {
            "type": "tool_result",
            "tool_use_id": "toolu_b",
            "content": [{"type": "text", "text": "This:"}, picture],
        },
    ]
    asked = sent(
        turn(
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "Look."}, picture]},
                {"role": "assistant", "content": calls},
                {"role": "user", "content": results},
                {"role": "assistant", "content": "Cats."},
                {"role": "user", "content": "And?"},
            ]
        )
    )
    first, _, *rest = asked["messages"]
    assert first["content"] == [{"type": "text", "text": "Look."}, shown]
    assert rest == [
        {"role": "tool", "tool_call_id": "a", "content": "What it shows follows."},
        {"role": "tool", "tool_call_id": "b", "content": "This:"},
        {"role": "user", "content": [shown, shown]},
        {"role": "assistant", "content": "Cats."},
        {"role": "user", "content": "And?"},
    ]


def test_a_picture_that_was_just_shown_is_the_last_that_is_said() -> None:
    """Where the results end the conversation."""
    source = {"type": "url", "url": "https://example.org/a.png"}
    shown = [{"type": "image", "source": source}]
    call = {"type": "tool_use", "id": "toolu_a", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "toolu_a", "content": shown}
    asked = sent(
        turn(
            messages=[
                *turn()["messages"],
                {"role": "assistant", "content": [call]},
                {"role": "user", "content": [result]},
            ]
        )
    )
    url = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    assert asked["messages"][-1] == {"role": "user", "content": [url]}


def test_thinking_of_earlier_turns_goes_back() -> None:
    """As the reasoning of that message."""
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    said = [thought, {"type": "text", "text": "Hello."}]
    asked = sent(
        turn(
            messages=[
                *turn()["messages"],
                {"role": "assistant", "content": said},
                {"role": "user", "content": "And?"},
            ],
            thinking={"type": "adaptive"},
        )
    )
    assert asked["messages"][1] == {
        "role": "assistant",
        "content": "Hello.",
        "reasoning_content": "Hm.",
    }
    assert asked["chat_template_kwargs"]["enable_thinking"] is True


# --- under a schema -------------------------------------------------------------------------------

LLAMA: Final = [{"id": "theirs", "owned_by": "llamacpp", "max_model_len": 5000}]
UNDER: Final[Json] = {"output_config": {"format": {"type": "json_schema", "schema": VERDICT}}}


def held(schema: Json) -> Json:
    """What holds an answer to `schema` in the chat API's words."""
    wanted = {"name": "answer", "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": wanted}


def bound_for(characters: int, tokens: int) -> Json:
    """`VERDICT` with the bound of an answer of `tokens`."""
    reason = {"type": "string", "maxLength": characters}
    return {
        "max_tokens": tokens,
        "response_format": held(
            {**VERDICT, "properties": {"ok": {"type": "boolean"}, "reason": reason}}
        ),
    }


def say(scene: Scene, text: str, why: str = "stop", by: str = "content") -> None:
    """Answer the call that is held with `text`."""
    usage = {"prompt_tokens": 9, "completion_tokens": 4}
    stream(
        scene,
        {"choices": [{"index": 0, "delta": {by: text}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": why}], "usage": usage},
    )


def asked_of(scene: Scene) -> list[Json]:
    return [body for body, _ in scene.there.sent(CHAT)]


@pytest.mark.parametrize("models", [LLAMA, [{"id": "theirs"}]], ids=["llama-server", "another"])
@pytest.mark.parametrize("streamed", [True, False])
def test_an_answer_that_fits_is_told_whole(models: Json, streamed: bool) -> None:
    """A stream too begins to tell it once it is known to fit."""
    scene = Scene.of("openai", URL)
    scene.there.models = models
    browser = scene.house.ask(turn(stream=streamed, **UNDER))
    say(scene, '{"ok": true}')
    usage = {"input_tokens": 9, "output_tokens": 4}
    if streamed:
        (delta,) = [e["delta"] for e in browser.events if e["type"] == "content_block_delta"]
        assert delta["text"] == '{"ok": true}'
        ending = browser.events[-2]
        assert ending["delta"]["stop_reason"] == "end_turn"
        assert usage.items() <= ending["usage"].items()
    else:
        assert browser.json["content"] == [{"type": "text", "text": '{"ok": true}'}]
        assert browser.json["stop_reason"] == "end_turn"
        assert usage.items() <= browser.json["usage"].items()
    assert len(asked_of(scene)) == 1
    assert scene.house.line().running == 0


@pytest.mark.parametrize("model", [None, "a name of ours"])
def test_a_llama_server_gets_a_grammar(model: str | None) -> None:
    """In the place of the schema, of which it would hold a part; nothing else ends the answer."""
    scene = Scene.of("openai", URL, model=model)
    scene.there.models = LLAMA
    scene.house.ask(turn(stop_sequences=["}"], temperature=0, **UNDER))
    (asked,) = asked_of(scene)
    assert asked["grammar"] == grammar.write(read(VERDICT).shape, 200)
    assert (asked["max_tokens"], asked["temperature"]) == (100, 0)
    assert not {"response_format", "stop"} & asked.keys()


def test_another_server_gets_the_schema_with_bounds() -> None:
    """Of the sizes that a grammar would have."""
    scene = Scene.of("openai", URL)
    scene.house.ask(turn(**UNDER))
    (asked,) = asked_of(scene)
    assert asked | bound_for(56, 100) == asked
    assert "grammar" not in asked


@pytest.mark.parametrize("models", [LLAMA, [{"id": "theirs"}]])
def test_a_strict_server_gets_the_schema_as_it_is(models: Json) -> None:
    """OpenAI's own knows no grammar, and refuses some bounds."""
    scene = Scene.of("openai", URL, strict=True)
    scene.there.models = models
    scene.house.ask(turn(**UNDER))
    (asked,) = asked_of(scene)
    assert asked["response_format"] == held(VERDICT)
    assert asked["max_completion_tokens"] == 100
    assert "grammar" not in asked


@pytest.mark.parametrize("models", [LLAMA, [{"id": "theirs"}]])
def test_an_answer_that_is_cut_off_is_asked_for_in_less_room(models: Json) -> None:
    """And not as the client would have it sampled: the same would come again."""
    scene = Scene.of("openai", URL)
    scene.there.models = models
    browser = scene.house.ask(turn(temperature=0, **UNDER))
    say(scene, '{"ok": true, "reason": "aaa', "length")
    say(scene, '{"ok": true}')
    assert browser.json["content"][0]["text"] == '{"ok": true}'
    _, second = asked_of(scene)
    if models is LLAMA:
        assert second["grammar"] == grammar.write(read(VERDICT).shape, 25)
    else:
        assert second | bound_for(20, 100) == second
    assert "temperature" not in second


@pytest.mark.parametrize("streamed", [True, False])
def test_a_server_that_holds_nothing_is_found_out(streamed: bool) -> None:
    """What does not fit twice is an error, and nothing of it is told."""
    scene = Scene.of("openai", URL)
    browser = scene.house.ask(turn(stream=streamed, **UNDER))
    say(scene, "Yes, it is fine.")
    say(scene, '{"ok": "yes"}')
    said = browser.raw.decode()
    assert "no answer that fits the schema in 2 attempts" in said
    assert "yes" not in said.lower()
    assert scene.house.line().running == 0


def test_an_answer_that_is_taken_for_thoughts_is_one() -> None:
    """Some templates make a server do so; thoughts beside an answer are none."""
    scene = Scene.of("openai", URL)
    browser = scene.house.ask(turn(**UNDER))
    say(scene, '{"ok": true}', by="reasoning_content")
    assert browser.json["content"] == [{"type": "text", "text": '{"ok": true}'}]


def test_what_cannot_be_held_is_refused_before_it_is_sent() -> None:
    """As for a llama-server, with the place."""
    scene = Scene.of("openai", URL)
    schema = {"type": "object", "properties": {"a": {"not": {}}}}
    wanted = {"format": {"type": "json_schema", "schema": schema}}
    browser = scene.house.ask(turn(output_config=wanted))
    assert browser.status == 400
    assert "properties.a: not is not supported" in browser.json["error"]["message"]
    assert asked_of(scene) == []


@pytest.mark.parametrize("models", [LLAMA, [{"id": "theirs"}]])
def test_words_beside_tools_that_do_not_fit_are_asked_for_again(models: Json) -> None:
    """Behind the same prompt, in which the tools are still; a llama-server answers freely first."""
    scene = Scene.of("openai", URL)
    scene.there.models = models
    browser = scene.house.ask(turn(tools=[TOOL], **UNDER))
    say(scene, "Yes.")
    say(scene, '{"ok": true}')
    assert browser.json["content"] == [{"type": "text", "text": '{"ok": true}'}]
    first, second = asked_of(scene)
    assert first["tools"] == second["tools"]
    assert "tool_choice" not in first
    assert second["tool_choice"] == "none"
    if models is LLAMA:
        assert not {"response_format", "grammar"} & first.keys()
    else:
        assert first["response_format"] == held(VERDICT)


def test_a_call_needs_no_schema() -> None:
    """It is told as it is."""
    scene = Scene.of("openai", URL)
    browser = scene.house.ask(turn(tools=[TOOL], **UNDER))
    call = {"index": 0, "id": "call_1", "function": {"name": "look", "arguments": "{}"}}
    stream(
        scene,
        {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    )
    assert [block["name"] for block in browser.json["content"]] == ["look"]
    assert len(asked_of(scene)) == 1


def test_a_schema_has_a_bound_where_the_client_sets_none() -> None:
    """A tiny model would write on as long as its form lets it: half the window, if none counts."""
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": VERDICT}}
    chat = {"model": "m", "messages": [{"role": "user", "content": "a"}], "response_format": schema}
    scene = Scene.of("openai", URL)
    scene.house.ask(chat, CHAT)
    (asked,) = asked_of(scene)
    assert asked["max_tokens"] == 2500


def test_an_answer_that_breaks_off_is_asked_for_anew() -> None:
    """The server went away in the middle; that is no attempt."""
    scene = Scene.of("openai", URL)
    browser = scene.house.ask(turn(**UNDER))
    (broken,) = scene.there.held
    broken.begin()
    broken.say({"choices": [{"index": 0, "delta": {"content": '{"ok": tr'}}]})
    broken.finish()
    scene.house.settle()
    say(scene, '{"ok": true}')
    assert browser.json["content"][0]["text"] == '{"ok": true}'


def test_a_client_that_leaves_is_hung_up_for_under_a_schema() -> None:
    """In the middle of an answer of which it has seen nothing."""
    scene = Scene.of("openai", URL)
    browser = scene.house.ask(turn(**UNDER))
    (asked,) = scene.there.held
    asked.begin()
    asked.say({"choices": [{"index": 0, "delta": {"content": "{"}}]})
    scene.house.settle()
    browser.leave()
    scene.house.settle()
    assert asked.left
    assert (scene.house.line().running, scene.house.line().settling) == (0, 0)


def test_a_schema_is_held_here_where_main_stands_in() -> None:
    """The server that would have been told of it is gone, and main's is a llama-server."""
    house, scene = Household.built(), Scene.of("openai", URL)
    house.api.dispatch = attrs.evolve(
        house.api.dispatch, tiers={**house.api.dispatch.tiers, "small": scene.tier}
    )
    house.main.completions = ['{"ok": true}']
    scene.there.gone = True
    wanted = {"format": {"type": "json_schema", "schema": VERDICT}}
    system = "You are evaluating a hook in Claude Code."
    browser = house.ask(turn(system=system, output_config=wanted), **CLAUDE_CODE)
    for each in (scene.house, house) * 2:
        each.settle()
    assert browser.json["content"] == [{"type": "text", "text": '{"ok": true}'}]
    assert browser.headers["x-claudegw-tier"] == "main"


def test_a_schema_is_left_to_the_server_that_stands_in() -> None:
    """One that gets what the client sent holds its answers itself, whatever was asked before."""
    house, scene = Household.built(), Scene.of("anthropic", URL)
    house.api.dispatch = attrs.evolve(
        house.api.dispatch, tiers={**house.api.dispatch.tiers, "main": scene.tier}
    )
    house.small.gone = True
    system = "You are evaluating a hook in Claude Code."
    house.ask(turn(system=system, **UNDER), **CLAUDE_CODE)
    for each in (scene.house, house) * 2:
        each.settle()
    ((asked, _),) = scene.there.sent("/v1/messages")
    assert asked["output_config"] == UNDER["output_config"]


def test_blocks_of_words_do_not_run_into_each_other() -> None:
    """Where nothing stands between them, a line ends."""
    blocks = [{"type": "text", "text": text} for text in ("One.", "Two.\n", "Three.", "\n\nFour.")]
    asked = sent(turn(messages=[{"role": "user", "content": blocks}]))
    assert asked["messages"][0]["content"] == "One.\nTwo.\nThree.\n\nFour."


def test_an_answer() -> None:
    """Thinking, words, a tool and the usage, as the Messages API has them."""
    scene = Scene.of("openai", URL)
    browser = scene.house.ask(turn(stream=True, tools=[TOOL]))
    call = {"index": 0, "id": "call_1", "function": {"name": "look", "arguments": "{}"}}
    deltas = [{"reasoning": "Hm."}, {"content": "Yes."}, {"tool_calls": [call]}]
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    stream(
        scene,
        *({"choices": [{"index": 0, "delta": delta}]} for delta in deltas),
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
        {"choices": [], "usage": usage},
    )
    opened = [e["content_block"] for e in browser.events if e["type"] == "content_block_start"]
    assert [block["type"] for block in opened] == ["thinking", "text", "tool_use"]
    assert opened[2]["id"] == "toolu_call_1"
    ending = browser.events[-2]
    assert ending["delta"]["stop_reason"] == "tool_use"
    assert ending["usage"] == {
        "input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 5,
        "output_tokens": 4,
    }
    assert browser.ended


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("stage", ["before the status", "in prefill", "mid-answer"])
def test_a_client_that_leaves_is_hung_up_for(stage: str, streamed: bool) -> None:
    """Wherever its answer is; its permit is back at once, as there are no slots to ask."""
    scene = Scene.of("openai", URL)
    browser = scene.house.ask(turn(stream=streamed))
    (held,) = scene.there.held
    if stage != "before the status":
        held.begin()
    if stage == "mid-answer":
        held.say({"choices": [{"index": 0, "delta": {"content": "Yes"}}]})
    scene.house.settle()
    assert scene.house.line().running == 1
    browser.leave()
    scene.house.settle()
    assert held.left
    assert (scene.house.line().running, scene.house.line().settling) == (0, 0)


@pytest.mark.parametrize(
    ("path", "answer", "tokens"),
    [
        ("/v1/chat/completions/input_tokens", {"input_tokens": 17}, 17),
        ("/tokenize", {"count": 18, "tokens": []}, 18),
        ("/tokenize", {"tokens": []}, None),
        ("/nowhere", {}, None),
    ],
)
def test_a_count(path: str, answer: Json, tokens: int | None) -> None:
    """llama-server's way, vLLM's way, or none: nothing is made up."""
    scene = Scene.of("openai", URL)
    scene.there.counts[path] = answer
    browser = scene.house.ask(turn(tools=[TOOL]), "/v1/messages/count_tokens")
    if tokens is None:
        assert (browser.status, browser.json["error"]["type"]) == (404, "not_found_error")
        assert browser.json["error"]["message"] == "The server of tier 'main' counts no tokens."
        assert len(scene.there.sent("/tokenize")) == 1
        return
    assert browser.json == {"input_tokens": tokens}
    ((body, _),) = scene.there.sent(path)
    assert body.keys() == {"model", "messages", "tools", "chat_template_kwargs"}


def test_its_key_is_shown_as_a_bearers() -> None:
    """And nothing that the client said of the other API goes along."""
    scene = Scene.of("openai", URL, api_key="secret")
    scene.house.ask(turn(), anthropic_beta="a", x_api_key="mine")
    ((_, headers),) = scene.there.sent(CHAT)
    assert headers["authorization"] == "Bearer secret"
    assert not {"anthropic-beta", "x-api-key"} & headers.keys()


def test_housekeeping_is_bounded() -> None:
    """A tiny model may be behind it."""
    scene = Scene.of("openai", URL, answer_tokens=16)
    scene.house.ask(turn("Web page content:\n---\n", max_tokens=5000), **CLAUDE_CODE)
    ((body, _),) = scene.there.sent(CHAT)
    assert body["max_tokens"] == 16


@pytest.mark.parametrize(
    ("words", "wanted", "counts", "bound"),
    [
        (10, 100, None, 100),
        (10, 4990, 40, 4960),
        (10, 9000, None, 5000),
        (4000, 100, 4950, 50),
        (9000, 100, None, 100),
    ],
)
def test_an_answer_has_the_room_that_the_prompt_leaves(
    words: int, wanted: int, counts: int | None, bound: int
) -> None:
    """Counted where the size does not tell, and where that can be had."""
    scene = Scene.of("openai", URL)
    if counts is not None:
        scene.there.counts["/tokenize"] = {"count": counts}
    scene.house.ask(turn("x" * words, max_tokens=wanted))
    ((body, _),) = scene.there.sent(CHAT)
    assert body["max_tokens"] == bound
    assert bool(scene.there.sent("/tokenize")) == (words + wanted > 4000)


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_sent() -> None:
    """With the numbers on which the client compacts."""
    scene = Scene.of("openai", URL)
    scene.there.counts["/tokenize"] = {"count": 5000}
    browser = scene.house.ask(turn("x" * 9000))
    assert browser.status == 400
    assert browser.json["error"]["message"] == "prompt is too long: 5000 tokens > 4999 maximum"
    assert scene.there.held == []


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("counts", [{}, {f"{CHAT}/input_tokens": {"input_tokens": 4000}}])
@pytest.mark.parametrize("words", ["a", "a" * 6000])
def test_a_chat_without_a_bound_has_none_there(words: str, counts: Json, strict: bool) -> None:
    """Its server knows best how long its answers may be."""
    chat = {"model": "m", "messages": [{"role": "user", "content": words}]}
    scene = Scene.of("openai", URL, strict=strict)
    scene.there.counts = counts
    scene.house.ask(chat, CHAT)
    ((body, _),) = scene.there.sent(CHAT)
    assert not {"max_tokens", "max_completion_tokens"} & body.keys()
