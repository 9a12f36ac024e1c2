"""Requests of the OpenAI API as Messages requests."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.chat import AS_MANY_AS_FIT
from gateway.wire.errors import ApiError
from gateway.wire.openai import read_chat, read_completion, read_embedding

Json = Any

HI = {"role": "user", "content": "hi"}
WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": True,
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
}
PIXEL = "iVBORw0KGgo="


def read(*messages: Json, **more: Json) -> dict[str, Json]:
    """The Messages body that a chat body becomes."""
    body = {"model": "m", "messages": list(messages) or [HI], **more}
    return dict(read_chat(orjson.dumps(body), 0)[0].body)


def refused(body: Json, reader: Any = read_chat) -> str:
    """The sentence with which a body is refused."""
    with pytest.raises(ApiError) as caught:
        reader(orjson.dumps(body), 0)
    assert caught.value.status == 400
    return caught.value.message


# --- the conversation -----------------------------------------------------------------------------


def test_the_least_that_a_call_says() -> None:
    """A plain question has no bound but the window, and the model may think."""
    assert read() == {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_tokens": AS_MANY_AS_FIT,
        "thinking": {"type": "adaptive"},
    }


def test_what_stands_before_the_first_turn_is_the_system_prompt() -> None:
    """`system` and `developer` messages go there in their order; a later one stays in its place."""
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]
    body = read(
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": parts},
        HI,
        {"role": "system", "content": "It is late."},
    )
    texts = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    assert body["system"] == texts
    assert [message["role"] for message in body["messages"]] == ["user", "system"]
    assert body["messages"][1]["content"] == "It is late."


def test_a_round_of_tools() -> None:
    """Calls are `tool_use` blocks after thought and text; results that follow are one message."""
    other = {**CALL, "id": "call_2", "function": {"name": "get_weather", "arguments": " "}}
    body = read(
        HI,
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Where?",
            "tool_calls": [CALL, other],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "Sun."}]},
        HI,
        tools=[WEATHER],
    )
    assert body["messages"][1:3] == [
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Where?", "signature": ""},
                {"type": "text", "text": "Let me see."},
                {
                    "type": "tool_use",
                    "id": "call_1",
                    "name": "get_weather",
                    "input": {"city": "Oslo"},
                },
                {"type": "tool_use", "id": "call_2", "name": "get_weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "call_1",
                    "content": [{"type": "text", "text": "Rain."}],
                },
                {
                    "type": "tool_result",
                    "tool_use_id": "call_2",
                    "content": [{"type": "text", "text": "Sun."}],
                },
            ],
        },
    ]
    assert body["tools"] == [
        {
            "name": "get_weather",
            "description": "The weather in a city.",
            "input_schema": WEATHER["function"]["parameters"],
        }
    ]


def test_results_of_two_rounds_stay_apart() -> None:
    """What follows another message of the assistant is a message of its own."""
    asks = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "Rain."}
    body = read(HI, asks, result, asks, result)
    assert [len(message["content"]) for message in body["messages"]] == [1, 1, 1, 1, 1]


def test_an_assistant_that_said_nothing_is_left_out() -> None:
    """Neither null nor an empty text makes a message."""
    nothing: list[Json] = [
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": ""},
        {"role": "assistant"},
    ]
    assert len(read(HI, *nothing)["messages"]) == 1


def test_images_and_other_parts() -> None:
    """An image comes along, by data or by address; what nobody here can take leaves its name."""
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    linked = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    sound = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
    refusal = {"type": "refusal", "refusal": "No."}
    content = read({"role": "user", "content": [shown, linked, sound, refusal]})["messages"][0]
    source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
    assert content["content"][0] == {"type": "image", "source": source}
    assert content["content"][1]["source"] == {"type": "url", "url": "https://example.org/a.png"}
    assert content["content"][2]["type"] == "openai:input_audio"
    assert content["content"][3] == {"type": "text", "text": "No."}


# --- what is wanted of the answer -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"stop": "x"}, {"stop_sequences": ["x"]}),
        ({"stop": ["x", ""]}, {"stop_sequences": ["x"]}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"top_p": 0.5, "top_k": 4}, {"top_p": 0.5, "top_k": 4}),
        ({"stream": True}, {"stream": True}),
        ({"user": "u"}, {"metadata": {"user_id": "u"}}),
        ({"user": "u", "prompt_cache_key": "k"}, {"metadata": {"user_id": "k"}}),
        ({"chat_template_kwargs": {"a": 1}}, {"chat_template_kwargs": {"a": 1}}),
        ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}),
        ({"reasoning_effort": "minimal"}, {"thinking": {"type": "disabled"}}),
        (
            {"reasoning_effort": "high"},
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}},
        ),
        ({"tools": [WEATHER]}, {"tool_choice": {"type": "auto"}}),
        ({"tools": [WEATHER], "tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
        ({"tools": [WEATHER], "tool_choice": "none"}, {"tool_choice": {"type": "none"}}),
        (
            {"tools": [WEATHER], "parallel_tool_calls": False},
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        ),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
            },
            {"tool_choice": {"type": "tool", "name": "get_weather"}},
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}},
            {"output_config": {"format": {"type": "json_schema", "schema": {"a": 1}}}},
        ),
        (
            {"response_format": {"type": "json_object"}},
            {
                "output_config": {
                    "format": {
                        "type": "json_schema",
                        "schema": {"type": "object", "additionalProperties": True},
                    }
                }
            },
        ),
    ],
)
def test_what_is_wanted(given: Json, found: Json) -> None:
    """Each wish has its place in a Messages request."""
    body = read(**given)
    assert {name: body[name] for name in found} == found


@pytest.mark.parametrize(
    "harmless",
    [
        {"n": 1, "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "modalities": ["text"]},
        {"n": None, "tools": None, "tool_choice": None, "stop": None, "response_format": None},
        {"seed": 1, "presence_penalty": 0.5, "store": False, "metadata": {}, "service_tier": "x"},
        {"response_format": {"type": "text"}, "tool_choice": "auto", "tools": []},
        {"parallel_tool_calls": True, "functions": [], "function_call": "none"},
    ],
)
def test_what_changes_nothing(harmless: Json) -> None:
    """What asks for nothing, or cannot be passed on and only colours an answer, is passed over."""
    assert read(**harmless) == read()


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        ({"n": 2}, "n: only one answer"),
        ({"logprobs": True}, "logprobs: "),
        ({"top_logprobs": 3}, "top_logprobs: "),
        ({"logit_bias": {"1": 5}}, "logit_bias: "),
        ({"modalities": ["text", "audio"]}, "modalities: "),
        ({"audio": {}}, "audio: "),
        ({"functions": [{}]}, "functions: say tools"),
        ({"function_call": "auto"}, "function_call: say tool_choice"),
        ({"web_search_options": {}}, "web_search_options: "),
        ({"model": ""}, "model: "),
        ({"messages": []}, "messages: at least one message"),
        ({"messages": [{"role": "function", "content": ""}]}, "messages.0.role: "),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages.0.tool_call_id: "),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: "),
        ({"tools": [{"type": "function"}]}, "tools.0.function: Field required"),
        ({"tools": [WEATHER, WEATHER]}, "tools: Tool names must be unique"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice: "),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type: "),
        ({"response_format": {"type": "grammar"}}, "response_format.type: "),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: "),
        ({"reasoning_effort": "much"}, "reasoning_effort: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"temperature": 3}, "temperature: "),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage: "),
        ({"stop": [1]}, "stop.0: "),
    ],
)
def test_what_is_refused(wish: Json, named: str) -> None:
    """What is wrong, or cannot be given, is refused by its name."""
    assert refused({"model": "m", "messages": [HI], **wish}).startswith(named)


@pytest.mark.parametrize("arguments", ["{", "[]", "null", "5", 5, None])
def test_arguments_that_are_no_object(arguments: Json) -> None:
    """What a call was given must be the JSON of an object."""
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    message = refused({"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert message.startswith("messages.0.tool_calls.0.function.arguments: ")


@pytest.mark.parametrize("url", ["data:image/png,abc", "data:;base64,abc", "data:image/png;base64"])
def test_data_that_is_no_image(url: str) -> None:
    """A data URL has a type and base64."""
    part = {"type": "image_url", "image_url": {"url": url}}
    message = refused({"model": "m", "messages": [{"role": "user", "content": [part]}]})
    assert message.startswith("messages.0.content.0.image_url.url: ")


@pytest.mark.parametrize("reader", [read_chat, read_completion])
def test_what_is_no_body(reader: Any) -> None:
    """What is no JSON object is refused before anything else."""
    for raw in (b"", b"[]", b"{"):
        with pytest.raises(ApiError, match="The body"):
            reader(raw, 0)
    with pytest.raises(ApiError, match="The body"):
        read_embedding(b"[]")


def test_arguments_that_are_nested_too_deep() -> None:
    """JSON inside of JSON is held to the same depth."""
    deep = '{"a":' + "[" * 300 + "]" * 300 + "}"
    call = {**CALL, "function": {"name": "f", "arguments": deep}}
    body = {"model": "m", "messages": [HI, {"role": "assistant", "tool_calls": [call]}]}
    assert refused(body) == "The body is nested too deep."


# --- a bare prompt --------------------------------------------------------------------------------


def test_a_bare_prompt() -> None:
    """It has 16 tokens where nobody says more, and its sampling comes along."""
    raw = {"model": "m", "prompt": "Once", "seed": 7, "logit_bias": {"1": 2}, "stop": "."}
    request, _ = read_completion(orjson.dumps(raw), 0)
    assert request.prepared == {
        "prompt": "Once",
        "messages": [{"role": "prompt", "content": [{"type": "text", "text": "Once"}]}],
        "max_tokens": 16,
        "stop": ["."],
        "seed": 7,
        "logit_bias": {"1": 2},
    }
    assert (request.model, request.stream) == ("m", False)


@pytest.mark.parametrize(
    ("given", "found"),
    [("a", "a"), (["a"], "a"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2])],
)
def test_the_shapes_of_a_prompt(given: Json, found: Json) -> None:
    """A text or tokens, in a list of its own or not."""
    request, _ = read_completion(orjson.dumps({"model": "m", "prompt": given}), 0)
    assert request.prepared["prompt"] == found


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        ({"prompt": ["a", "b"]}, "prompt: "),
        ({"prompt": []}, "prompt: "),
        ({"prompt": 5}, "prompt: "),
        ({"prompt": [True]}, "prompt: "),
        ({"n": 2}, "n: "),
        ({"best_of": 2}, "best_of: "),
        ({"logprobs": 0}, "logprobs: "),
        ({"echo": True}, "echo: "),
        ({"suffix": "x"}, "suffix: "),
        ({"max_tokens": -1}, "max_tokens: "),
    ],
)
def test_what_a_bare_prompt_cannot_have(wish: Json, named: str) -> None:
    """Several prompts, several answers and what is around them are refused by name."""
    message = refused({"model": "m", "prompt": "a", **wish}, read_completion)
    assert message.startswith(named)


@pytest.mark.parametrize("said", ["text", ["a", "b"], [1, 2]])
def test_embeddings_go_as_they_are(said: Json) -> None:
    """The server gets the body as it came."""
    body = {"model": "m", "input": said, "dimensions": 5}
    request = read_embedding(orjson.dumps(body))
    assert request.prepared == body
    assert request.model == "m"


def test_embeddings_of_nothing() -> None:
    """What is to be embedded must be there."""
    with pytest.raises(ApiError, match="input: Field required"):
        read_embedding(b'{"model": "m"}')


# --- any conversation -----------------------------------------------------------------------------

_WORD = st.text(min_size=1, max_size=8)
_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORD, inner, max_size=3),
    max_leaves=6,
)
_ROUND = st.tuples(_WORD, st.lists(st.dictionaries(_WORD, _VALUE, max_size=3), max_size=3), _WORD)


@given(st.lists(_ROUND, min_size=1, max_size=4))
def test_nothing_of_a_conversation_is_lost(rounds: list[Any]) -> None:
    """Texts, calls, arguments, results and ids are there, in their order, and nothing else."""
    messages: list[Json] = []
    expected: list[Json] = []
    number = 0
    for words, inputs, said in rounds:
        messages.append({"role": "user", "content": words})
        expected.append(("text", words))
        calls: list[Json] = []
        results: list[Json] = []
        for given_input in inputs:
            number += 1
            arguments = orjson.dumps(given_input).decode()
            function = {"name": f"f{number}", "arguments": arguments}
            calls.append({"id": f"c{number}", "type": "function", "function": function})
            results.append({"role": "tool", "tool_call_id": f"c{number}", "content": f"r{number}"})
        expected.append(("text", said))
        expected += [
            ("tool_use", call["id"], call["function"]["name"], given_input)
            for call, given_input in zip(calls, inputs, strict=True)
        ]
        expected += [("tool_result", each["tool_call_id"], each["content"]) for each in results]
        spoken: Json = {"role": "assistant", "content": said}
        messages += [spoken | ({"tool_calls": calls} if calls else {}), *results]
    found: list[Json] = []
    for message in read(*messages)["messages"]:
        for block in message["content"]:
            match block["type"]:
                case "text":
                    found.append(("text", block["text"]))
                case "tool_use":
                    found.append(("tool_use", block["id"], block["name"], block["input"]))
                case _:
                    (inside,) = block["content"]
                    found.append(("tool_result", block["tool_use_id"], inside["text"]))
    assert found == expected
