"""The ``anthropic`` Python SDK on a gateway, as its users use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, Final

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam, ToolUseBlock

from tests.e2e.clients import eventually
from tests.e2e.scripted_llama import Block, ScriptedLlama, Text
from tests.e2e.stack import SMOLLM, TIER_KINDS, Running, free_port, start_gateway, start_server

pytestmark = pytest.mark.server

#: Of which kinds the tiers of `gateway` are, one after the other.
GATEWAYS: Final = TIER_KINDS

Json = Any

TOKEN: Final = "a-token-of-this-test"

#: Bytes that a body may have on the `guarded` gateway.
LIMIT: Final = 2048

WEATHER: Final[ToolParam] = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
HI: Final[list[MessageParam]] = [{"role": "user", "content": "hi"}]


def rounds(*cities: str) -> list[Json]:
    """
    A conversation that asked for the weather in some cities, and now does for the last one.

    A tiny model goes on as it began, so its answer starts with the call of the tool.
    """
    messages: list[Json] = []
    for city in cities[:-1]:
        identity = f"toolu_{city}"
        call = {"type": "tool_use", "id": identity, "name": "get_weather", "input": {"city": city}}
        said = {"type": "tool_result", "tool_use_id": identity, "content": "Rain."}
        messages += [
            {"role": "user", "content": city},
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [said]},
            {"role": "assistant", "content": "Rain."},
        ]
    return [*messages, {"role": "user", "content": cities[-1]}]


#: A call whose answer starts with a use of the tool and ends there.
FORCED: Final[dict[str, Json]] = {
    "model": "m",
    "max_tokens": 120,
    "tools": [WEATHER],
    "messages": rounds("London", "Rome", "Paris"),
    "stop_sequences": ["</tool_call>"],
}
CHOICES: Final = ({"type": "any"}, {"type": "tool", "name": "get_weather"})


@contextmanager
def sdk(
    gateway: Running, key: str = "none", headers: Mapping[str, str] | None = None
) -> Iterator[anthropic.Anthropic]:
    """The SDK's client, which neither tries again nor heeds a proxy."""
    with anthropic.Anthropic(
        base_url=gateway.url,
        api_key=key,
        max_retries=0,
        default_headers=headers or {},
        http_client=anthropic.DefaultHttpxClient(trust_env=False),
    ) as client:
        yield client


@pytest.fixture
def client(gateway: Running) -> Iterator[anthropic.Anthropic]:
    """A client of a gateway with two real models."""
    with sdk(gateway) as client:
        yield client


# --- gateways that refuse, for the tests of both SDKs ---------------------------------------------


@contextmanager
def guarded(folder: Path) -> Iterator[Running]:
    """A gateway with a token and a low limit, whose model server is down and not waited for."""
    keys = f'token = "{TOKEN}"\nbody_limit = {LIMIT}'
    main = {"url": f"http://127.0.0.1:{free_port()}", "startup_patience": 0}
    gateway = start_gateway(folder, {"main": main}, keys)
    try:
        yield gateway
    finally:
        gateway.stop()


@contextmanager
def crowded(folder: Path) -> Iterator[Running]:
    """A gateway whose one slot works and in whose line nobody has room any more."""
    go_on = Event()

    def wait(_: Json) -> list[Block]:
        go_on.wait(600)
        return [Text("At last.")]

    with ScriptedLlama(wait).serving() as llama:
        gateway = start_gateway(folder, {"main": {"url": llama.url, "max_waiting": 1}})
        try:
            with sdk(gateway) as client:
                calls = [
                    client.messages.create(model="m", max_tokens=9, messages=HI, stream=True)
                    for _ in range(2)
                ]
                assert eventually(lambda: len(llama.asked) == 1, 60)
                yield gateway
                go_on.set()
                for call in calls:
                    assert [event.type for event in call][-1] == "message_stop"
        finally:
            go_on.set()
            gateway.stop()


# --- answers --------------------------------------------------------------------------------------


def test_a_message(client: anthropic.Anthropic) -> None:
    """``messages.create`` gives a message as the API describes it, under the caller's own name."""
    message = client.messages.create(model="my-own-name", max_tokens=8, messages=HI)
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "my-own-name")
    (block,) = message.content
    assert block.type == "text"
    assert block.text
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message.usage.input_tokens > 0
    assert 0 < message.usage.output_tokens <= 8
    assert message._request_id is not None
    assert message._request_id.startswith("req_")


def test_a_stream_of_text(client: anthropic.Anthropic) -> None:
    """``messages.stream`` gives the text as it comes, and the same message at the end."""
    with client.messages.stream(model="my-own-name", max_tokens=8, messages=HI) as stream:
        pieces = list(stream.text_stream)
        message = stream.get_final_message()
    assert len(pieces) > 1
    (block,) = message.content
    assert block.type == "text"
    assert block.text == "".join(pieces)
    assert message.model == "my-own-name"
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message.usage.output_tokens > 0


def test_the_raw_events_of_a_stream(client: anthropic.Anthropic) -> None:
    """``create(stream=True)`` gives the events in the order that the API promises."""
    with client.messages.create(model="m", max_tokens=8, messages=HI, stream=True) as stream:
        kinds = [event.type for event in stream if event.type != "content_block_delta"]
    assert kinds == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize("choice", CHOICES, ids=["any", "tool"])
def test_a_forced_tool_call(client: anthropic.Anthropic, choice: Json) -> None:
    """``tool_choice`` makes the model use the tool, with arguments that fit its schema."""
    message = client.messages.create(**FORCED, tool_choice=choice, extra_body={"temperature": 0})
    assert message.stop_reason == "tool_use"
    (used,) = [block for block in message.content if isinstance(block, ToolUseBlock)]
    assert used.id.startswith("toolu_")
    assert used.name == "get_weather"
    assert used.input.keys() == {"city"}
    assert isinstance(used.input["city"], str)


@pytest.mark.parametrize("choice", CHOICES, ids=["any", "tool"])
def test_a_forced_tool_call_in_a_stream(client: anthropic.Anthropic, choice: Json) -> None:
    """The arguments of a tool call come piece by piece, and their sum is the call's input."""
    with client.messages.stream(
        **FORCED, tool_choice=choice, extra_body={"temperature": 0}
    ) as stream:
        events = list(stream)
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    (used,) = [block for block in message.content if isinstance(block, ToolUseBlock)]
    assert used.id.startswith("toolu_")
    pieces = [event for event in events if event.type == "input_json"]
    assert pieces[-1].snapshot == used.input
    assert isinstance(used.input["city"], str)


@pytest.fixture(scope="module")
def obedient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway in front of a model that ends its answers by itself, where it may."""
    template = str(Path(__file__).with_name("glm_order.jinja"))
    flags = (*SMOLLM, "--ctx-size", "2048", "--chat-template-file", template)
    server = start_server(tmp_path_factory.mktemp("server"), "smollm2", *flags)
    try:
        gateway = start_gateway(tmp_path_factory.mktemp("gateway"), {"main": {"url": server.url}})
        yield gateway
        gateway.stop()
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("choice", "may_end"),
    [({"type": "auto"}, True), *((choice, False) for choice in CHOICES)],
    ids=["auto", "any", "tool"],
)
def test_a_forced_answer_may_not_end_without_the_tool(
    obedient: Running, choice: Json, may_end: bool
) -> None:
    """What ends as text with ``auto`` may not end as text where the tool is forced."""
    wanted = {"temperature": 0, "chat_template_kwargs": {"enable_thinking": False}}
    with sdk(obedient) as client:
        message = client.messages.create(
            model="m",
            max_tokens=40,
            messages=[{"role": "user", "content": "What is the weather in Paris?"}],
            tools=[WEATHER],
            tool_choice=choice,
            extra_body=wanted,
        )
    assert (message.stop_reason == "end_turn") is may_end


def test_a_count(client: anthropic.Anthropic) -> None:
    """``messages.count_tokens`` gives what the call then uses."""
    wanted: dict[str, Json] = {"model": "m", "messages": HI, "tools": [WEATHER]}
    counted = client.messages.count_tokens(**wanted)
    usage = client.messages.create(max_tokens=1, **wanted).usage
    assert usage.cache_read_input_tokens is not None
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_the_models(client: anthropic.Anthropic) -> None:
    """``models.list`` has a model for each tier, with the window that a call really has."""
    models = {model.id: model for model in client.models.list()}
    assert {name: model.max_input_tokens for name, model in models.items()} == {
        "claudegw-main": 32768,
        "claudegw-small": 4096,
    }
    for name, model in models.items():
        assert "claude" in name
        assert model.type == "model"
        assert model.display_name
        assert model.created_at.year >= 2026
        answer = client.messages.create(model=name, max_tokens=1, messages=HI)
        assert answer.model == name


# --- errors ---------------------------------------------------------------------------------------


def told(error: anthropic.APIStatusError) -> str:
    """The sentence of an error in the API's envelope."""
    assert error.request_id is not None
    assert error.request_id.startswith("req_")
    body = error.body
    assert isinstance(body, dict)
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["request_id"] == error.request_id
    assert error.api_message
    return error.api_message


def test_a_wrong_request(client: anthropic.Anthropic) -> None:
    """A mistake in the request is a `BadRequestError` that says where."""
    with pytest.raises(anthropic.BadRequestError) as raised:
        client.messages.create(model="m", max_tokens=0, messages=HI)
    assert raised.value.type == "invalid_request_error"
    assert told(raised.value).startswith("max_tokens: ")


def test_a_prompt_that_is_too_long(client: anthropic.Anthropic) -> None:
    """A prompt beyond the window is a `BadRequestError` with both numbers, streamed or not."""
    messages: list[MessageParam] = [{"role": "user", "content": "word " * 33_000}]
    tokens = client.messages.count_tokens(model="m", messages=messages).input_tokens
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError) as raised:
            client.messages.create(model="m", max_tokens=1, messages=messages, stream=stream)
        assert told(raised.value) == f"prompt is too long: {tokens} tokens > 32767 maximum"


def test_a_path_that_is_not_there(client: anthropic.Anthropic) -> None:
    """What this gateway does not have is a `NotFoundError`."""
    with pytest.raises(anthropic.NotFoundError) as raised:
        client.messages.batches.list()
    assert raised.value.type == "not_found_error"
    assert "/v1/messages/batches" in told(raised.value)


def test_a_name_that_is_not_ours(gateway: Running) -> None:
    """A ``Host`` that is not one of ours is a `PermissionDeniedError`."""
    with (
        sdk(gateway, headers={"host": "elsewhere.example"}) as client,
        pytest.raises(anthropic.PermissionDeniedError) as raised,
    ):
        client.messages.create(model="m", max_tokens=1, messages=HI)
    assert raised.value.type == "permission_error"
    assert "'elsewhere.example'" in told(raised.value)


@pytest.fixture(scope="module")
def guarded_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One for the tests below."""
    with guarded(tmp_path_factory.mktemp("guarded")) as gateway:
        yield gateway


def test_a_wrong_key(guarded_gateway: Running) -> None:
    """A key that is not the token is an `AuthenticationError`."""
    with (
        sdk(guarded_gateway, "wrong") as client,
        pytest.raises(anthropic.AuthenticationError) as no,
    ):
        client.messages.create(model="m", max_tokens=1, messages=HI)
    assert no.value.type == "authentication_error"
    assert "token" in told(no.value)
    assert TOKEN not in told(no.value)


def test_a_body_that_is_too_large(guarded_gateway: Running) -> None:
    """A body beyond the limit is a `ContentTooLargeError` with the limit."""
    messages: list[MessageParam] = [{"role": "user", "content": "x" * LIMIT}]
    with (
        sdk(guarded_gateway, TOKEN) as client,
        pytest.raises(anthropic.ContentTooLargeError) as raised,
    ):
        client.messages.create(model="m", max_tokens=1, messages=messages)
    assert str(raised.value.type) == "request_too_large"
    assert str(LIMIT) in told(raised.value)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_server_that_is_down(guarded_gateway: Running, stream: bool) -> None:
    """A model server that does not run is a `ServiceUnavailableError`, to be tried again."""
    with (
        sdk(guarded_gateway, TOKEN) as client,
        pytest.raises(anthropic.ServiceUnavailableError) as raised,
    ):
        client.messages.create(model="m", max_tokens=1, messages=HI, stream=stream)
    assert isinstance(raised.value, anthropic.InternalServerError)
    assert raised.value.type == "api_error"
    assert int(raised.value.response.headers["retry-after"]) > 0
    assert "'main'" in told(raised.value)


def test_models_of_a_server_that_is_down(guarded_gateway: Running) -> None:
    """A model whose server does not run is listed, without a window."""
    with sdk(guarded_gateway, TOKEN) as client:
        (model,) = client.models.list()
    assert model.id == "claudegw-main"
    assert model.max_input_tokens is None


def test_a_line_that_is_full(tmp_path: Path) -> None:
    """One call too many is an `OverloadedError`; those before it are answered all the same."""
    with crowded(tmp_path) as gateway, sdk(gateway) as client:
        for stream in (False, True):
            with pytest.raises(anthropic.OverloadedError) as raised:
                client.messages.create(model="m", max_tokens=1, messages=HI, stream=stream)
            assert raised.value.status_code == 529
            assert raised.value.type == "overloaded_error"
            assert int(raised.value.response.headers["retry-after"]) > 0
            assert told(raised.value)
