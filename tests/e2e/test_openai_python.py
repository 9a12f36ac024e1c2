"""The ``openai`` Python SDK on a gateway, as its users use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import openai
import orjson
import pytest
from pydantic import BaseModel

from tests.e2e.clients import eventually
from tests.e2e.scripted_llama import ScriptedLlama, Text, Thinking, ToolUse
from tests.e2e.stack import SMOLLM, TIER_KINDS, Running, start_gateway, start_server

pytestmark = pytest.mark.server

#: Of which kinds the tiers of `gateway` are, one after the other.
GATEWAYS: Final = TIER_KINDS

on_a_llama_server = pytest.mark.parametrize("kind", TIER_KINDS[:1], indirect=True, scope="module")

Json = Any

HI: Final[Json] = [{"role": "user", "content": "hi"}]
WEATHER: Final[Json] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
FORCED: Final[Json] = {"type": "function", "function": {"name": "get_weather"}}


def rounds(*cities: str) -> list[Json]:
    """
    A conversation that asked for the weather in some cities, and now does for the last one.

    A tiny model goes on as it began, so its answer starts with the call of the tool.
    """
    messages: list[Json] = []
    for city in cities[:-1]:
        given = orjson.dumps({"city": city}).decode()
        function = {"name": "get_weather", "arguments": given}
        calls = [{"id": f"call_{city}", "type": "function", "function": function}]
        messages += [
            {"role": "user", "content": city},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": f"call_{city}", "content": "Rain."},
            {"role": "assistant", "content": "Rain."},
        ]
    return [*messages, {"role": "user", "content": cities[-1]}]


@contextmanager
def sdk(gateway: Running, key: str = "none") -> Iterator[openai.OpenAI]:
    """The SDK's client, which neither tries again nor heeds a proxy."""
    with openai.OpenAI(
        base_url=f"{gateway.url}/v1",
        api_key=key,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as client:
        yield client


@pytest.fixture
def client(gateway: Running) -> Iterator[openai.OpenAI]:
    """A client of a gateway with two real models."""
    with sdk(gateway) as client:
        yield client


def record(gateway: Running) -> Json:
    """What the ledger says of the last call."""
    return gateway.ask("/status")[1]["last"][0]


# --- chat -----------------------------------------------------------------------------------------


def test_a_chat_completion(client: openai.OpenAI, gateway: Running) -> None:
    """``chat.completions.create`` gives a completion under the caller's own name, with usage."""
    answer = client.chat.completions.create(model="my-own-name", max_tokens=8, messages=HI)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "my-own-name")
    (choice,) = answer.choices
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 8
    kept = record(gateway)
    assert (kept["kind"], kept["tier"], kept["outcome"]) == ("turn", "main", "answered")
    assert answer.usage.prompt_tokens == kept["input"] + kept["cached"]


def test_the_cached_share_is_told(client: openai.OpenAI) -> None:
    """A conversation that goes on finds its prompt, and the usage says so."""
    messages: Json = [{"role": "system", "content": "You are brief. " * 20}, *HI]
    first = client.chat.completions.create(model="m", max_tokens=4, messages=messages)
    said: Json = {"role": "assistant", "content": first.choices[0].message.content}
    second = client.chat.completions.create(
        model="m", max_tokens=4, messages=[*messages, said, *HI]
    )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens is not None
    # Gemma's window slides, so not all of it need be there.
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens / 2


def test_a_stream_of_text(client: openai.OpenAI) -> None:
    """``stream`` gives the same text piece by piece, and the usage at the end."""
    wanted: Json = {"model": "m", "max_tokens": 8, "messages": HI, "temperature": 0}
    whole = client.chat.completions.create(**wanted)
    stream = client.chat.completions.create(
        **wanted, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert len(pieces) > 2
    assert "".join(filter(None, pieces)) == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


@pytest.mark.parametrize("choice", ["required", FORCED], ids=["required", "named"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_forced_tool_call(client: openai.OpenAI, choice: Json, stream: bool) -> None:
    """``tool_choice`` makes the model use the tool; its arguments are JSON, however they come."""
    wanted: Json = {
        "model": "m",
        "max_tokens": 120,
        "tools": [WEATHER],
        "tool_choice": choice,
        "messages": rounds("London", "Rome", "Paris"),
        "stop": ["</tool_call>"],
        "temperature": 0,
    }
    if stream:
        with client.chat.completions.stream(**wanted) as events:
            answer: Json = events.get_final_completion()
    else:
        answer = client.chat.completions.create(**wanted)
    (said,) = answer.choices
    assert said.finish_reason == "tool_calls"
    (call,) = said.message.tool_calls
    assert call.function.name == "get_weather"
    given = orjson.loads(call.function.arguments)
    assert given.keys() == {"city"}
    assert isinstance(given["city"], str)


class Verdict(BaseModel):
    """What a structured answer is read into."""

    verdict: Literal["yes", "no"]
    reasons: list[str]


def test_a_structured_answer(client: openai.OpenAI) -> None:
    """``chat.completions.parse`` gives an object of the caller's own class."""
    answer = client.chat.completions.parse(
        model="m", max_tokens=100, messages=HI, response_format=Verdict
    )
    assert answer.choices[0].message.parsed is not None
    assert answer.choices[0].message.parsed.verdict in ("yes", "no")


def test_a_json_object(client: openai.OpenAI) -> None:
    """A ``json_object`` is one, or cut at the bound that the caller set."""
    answer = client.chat.completions.create(
        model="m",
        max_tokens=60,
        messages=[{"role": "user", "content": "Your name and age, as JSON."}],
        response_format={"type": "json_object"},
    )
    (choice,) = answer.choices
    assert choice.message.content is not None
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(orjson.loads(choice.message.content), dict)


# --- the rest of the API --------------------------------------------------------------------------


@on_a_llama_server
def test_a_bare_prompt(client: openai.OpenAI, gateway: Running) -> None:
    """``completions.create`` goes on with the prompt, the same whole as streamed."""
    wanted: Json = {"model": "m", "prompt": "One, two, three,", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**wanted)
    assert whole.choices[0].text
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage is not None
    kept = record(gateway)
    assert (kept["kind"], kept["outcome"]) == ("other", "answered")
    assert whole.usage.prompt_tokens == kept["input"] + kept["cached"] > 4
    streamed = [chunk.choices[0].text for chunk in client.completions.create(**wanted, stream=True)]
    assert "".join(streamed) == whole.choices[0].text


@pytest.mark.parametrize("kind", TIER_KINDS[1:], indirect=True, scope="module")
def test_a_server_that_takes_chats_only(client: openai.OpenAI) -> None:
    """It is said so, and of a bare prompt or embeddings it does not hear."""
    with pytest.raises(openai.BadRequestError, match="takes chats only"):
        client.completions.create(model="m", prompt="One, two,", max_tokens=8)
    with pytest.raises(openai.BadRequestError, match="takes chats only"):
        client.embeddings.create(model="m", input="hi")


@on_a_llama_server
def test_embeddings_of_a_server_that_has_none(client: openai.OpenAI) -> None:
    """The server's own sentence says how to get them, and it is not asked twice."""
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.embeddings.create(model="m", input="hi")


def test_the_models(client: openai.OpenAI) -> None:
    """``models.list`` has a model for each tier, and each can be asked for and called."""
    models = [model.id for model in client.models.list()]
    assert models == ["claudegw-main", "claudegw-small"]
    for name in models:
        assert client.models.retrieve(name).id == name
        assert client.chat.completions.create(model=name, max_tokens=1, messages=HI).model == name
    with pytest.raises(openai.NotFoundError, match="claudegw-main"):
        client.models.retrieve("gpt-6")


def test_the_small_tier(client: openai.OpenAI, gateway: Running) -> None:
    """The small model's name leads there."""
    client.chat.completions.create(model="claudegw-small", max_tokens=2, messages=HI)
    assert record(gateway)["tier"] == "small"


def test_what_cannot_be_given(client: openai.OpenAI) -> None:
    """A wish that nobody here can fulfil is a `BadRequestError` with its name."""
    with pytest.raises(openai.BadRequestError, match="only one answer") as raised:
        client.chat.completions.create(model="m", messages=HI, n=2)
    assert (raised.value.param, raised.value.type) == ("n", "invalid_request_error")


def test_a_prompt_that_is_too_long(client: openai.OpenAI) -> None:
    """It has the code by which clients know it, streamed or not."""
    messages: Json = [{"role": "user", "content": "word " * 33_000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="prompt is too long") as raised:
            client.chat.completions.create(model="m", messages=messages, stream=stream)
        assert raised.value.code == "context_length_exceeded"


def test_what_is_not_there(client: openai.OpenAI) -> None:
    """An endpoint that this gateway does not have is a `NotFoundError`."""
    with pytest.raises(openai.NotFoundError, match="POST /v1/responses"):
        client.responses.create(model="m", input="hi")


# --- a model that does as it is told --------------------------------------------------------------


def script(body: Json) -> list[Any]:
    """Thinks, speaks and calls a tool; or counts for a long time."""
    if "count" in orjson.dumps(body["messages"][-1]).decode():
        return [Text("one two three " * 2000)]
    if not body.get("tools"):
        return [Thinking("Hm, hm."), Text("Nothing to do.")]
    calls = [ToolUse("get_weather", {"city": city}) for city in ("Oslo", "Rome")]
    return [Thinking("Where?"), Text("Let me see."), *calls]


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[tuple[Running, ScriptedLlama]]:
    with ScriptedLlama(script, pace=0.001).serving() as llama:
        gateway = start_gateway(tmp_path, {"main": {"url": llama.url}})
        yield gateway, llama
        gateway.stop()


def test_thought_text_and_calls(scripted: tuple[Running, ScriptedLlama]) -> None:
    """All of an answer arrives, whole and streamed; what goes back goes up as it came."""
    gateway, llama = scripted
    wanted: Json = {"model": "m", "messages": HI, "tools": [WEATHER]}
    with sdk(gateway) as client:
        whole = client.chat.completions.create(**wanted).choices[0]
        with client.chat.completions.stream(**wanted) as stream:
            streamed = stream.get_final_completion().choices[0]
        for choice in (whole, streamed):
            assert choice.finish_reason == "tool_calls"
            said: Json = choice.message
            assert (said.content, said.reasoning_content) == ("Let me see.", "Where?")
            given = [orjson.loads(call.function.arguments) for call in said.tool_calls]
            assert given == [{"city": "Oslo"}, {"city": "Rome"}]
        back: Json = whole.message.model_dump(exclude_none=True)
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": f"Rain {number}."}
            for number, call in enumerate(back["tool_calls"])
        ]
        client.chat.completions.create(**wanted | {"messages": [*HI, back, *results]})
    thought, text, *calls = llama.asked[-1]["messages"][1]["content"]
    assert (thought["thinking"], text["text"]) == ("Where?", "Let me see.")
    assert [call["input"]["city"] for call in calls] == ["Oslo", "Rome"]
    answers = llama.asked[-1]["messages"][2]["content"]
    assert [each["tool_use_id"] for each in answers] == [call["id"] for call in calls]
    assert [each["content"][0]["text"] for each in answers] == ["Rain 0.", "Rain 1."]


def test_a_client_that_leaves_in_the_middle(scripted: tuple[Running, ScriptedLlama]) -> None:
    """Who closes a stream frees the slot: the server is hung up on, and the next call goes."""
    gateway, llama = scripted
    with sdk(gateway) as client:
        counting: Json = [{"role": "user", "content": "count"}]
        stream = client.chat.completions.create(model="m", messages=counting, stream=True)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
        assert eventually(lambda: not llama.processing, 30)
        assert record(gateway)["outcome"] == "cancelled"
        answer = client.chat.completions.create(model="m", messages=HI)
        assert answer.choices[0].message.content == "Nothing to do."
    assert llama.most_at_once == 1


# --- a server for embeddings ----------------------------------------------------------------------


def test_embeddings_of_a_server_that_has_them(tmp_path: Path) -> None:
    """Each text has its vector, and the same text the same one; the ledger counts the tokens."""
    server = start_server(tmp_path, "smollm2", *SMOLLM, "--embeddings", "--pooling", "mean")
    try:
        gateway = start_gateway(tmp_path, {"main": {"url": server.url}})
        with sdk(gateway) as client:
            found = client.embeddings.create(model="m", input=["a stone", "a river", "a stone"])
        one, other, same = (each.embedding for each in found.data)
        assert len(one) > 100
        assert one == pytest.approx(same, abs=0.01)
        assert one != pytest.approx(other, abs=0.01)
        kept = record(gateway)
        assert (kept["kind"], kept["outcome"]) == ("other", "answered")
        assert kept["input"] == found.usage.prompt_tokens > 3
        gateway.stop()
    finally:
        server.stop()
