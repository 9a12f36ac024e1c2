"""
The TypeScript SDK, ``@anthropic-ai/sdk``, on a gateway, as its users use it.

Each call is one run of sdk_client.mjs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import orjson
import pytest

from tests.e2e.clients import CLIENTS, absent, program
from tests.e2e.stack import TIER_KINDS, Running
from tests.e2e.test_sdk_python import (
    CHOICES,
    FORCED,
    HI,
    LIMIT,
    TOKEN,
    WEATHER,
    crowded,
    guarded,
)

pytestmark = [pytest.mark.client, pytest.mark.server]

#: Of which kinds the tiers of `gateway` are, one after the other.
GATEWAYS: Final = TIER_KINDS

Json = Any

SCRIPT: Final = Path(__file__).with_name("sdk_client.mjs")

#: Where bin/get-clients puts it.
SDK: Final = CLIENTS / "sdk"

TURN: Final = {"model": "my-own-name", "max_tokens": 8, "messages": HI}


def done(gateway: Running, call: str, params: Json = None, **more: str) -> Json:
    """What came of one call, as sdk_client.mjs prints it."""
    node = program("node")
    if not (SDK / "node_modules/@anthropic-ai/sdk").exists():
        absent("The TypeScript SDK")
    wanted = {"call": call, "params": params, **more}
    run = subprocess.run(
        [node, SCRIPT, SDK, gateway.url],
        input=orjson.dumps(wanted),
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode()
    return orjson.loads(run.stdout)


def result(gateway: Running, call: str, params: Json = None) -> Json:
    """The result of a call that succeeds."""
    said = done(gateway, call, params)
    assert "error" not in said, said
    return said["result"]


def error(gateway: Running, name: str, call: str, params: Json = None, **more: str) -> Json:
    """What a call that fails with the error class `name` says, in the API's envelope."""
    said = done(gateway, call, params, **more)
    assert "error" in said, said
    found = said["error"]
    assert found["class"] == name
    assert found["requestID"].startswith("req_")
    envelope = found["envelope"]
    assert envelope.keys() == {"type", "error", "request_id"}
    assert envelope["type"] == "error"
    assert envelope["request_id"] == found["requestID"]
    assert envelope["error"]["type"] == found["type"]
    return found


def sentence(found: Json) -> str:
    return str(found["envelope"]["error"]["message"])


def uses(message: Json) -> list[Json]:
    """The tool calls of a message."""
    return [block for block in message["content"] if block["type"] == "tool_use"]


# --- answers --------------------------------------------------------------------------------------


def test_a_message(gateway: Running) -> None:
    """``messages.create`` gives a message as the API describes it, under the caller's own name."""
    message = result(gateway, "create", TURN)
    assert message["id"].startswith("msg_")
    assert (message["type"], message["role"]) == ("message", "assistant")
    assert message["model"] == "my-own-name"
    (block,) = message["content"]
    assert block["type"] == "text"
    assert block["text"]
    assert message["stop_reason"] in ("end_turn", "max_tokens")
    assert message["usage"]["input_tokens"] > 0
    assert 0 < message["usage"]["output_tokens"] <= 8


def test_a_stream_of_text(gateway: Running) -> None:
    """``messages.stream`` gives the events in order, and the whole message at the end."""
    said = done(gateway, "stream", TURN)
    assert [kind for kind in said["events"] if kind != "content_block_delta"] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert said["events"].count("content_block_delta") > 1
    message = said["result"]
    assert message["content"][0]["text"]
    assert message["stop_reason"] in ("end_turn", "max_tokens")
    assert message["usage"]["output_tokens"] > 0


@pytest.mark.parametrize("choice", CHOICES, ids=["any", "tool"])
@pytest.mark.parametrize("call", ["create", "stream"])
def test_a_forced_tool_call(gateway: Running, call: str, choice: Mapping[str, str]) -> None:
    """``tool_choice`` makes the model use the tool, with arguments that fit its schema."""
    params = {**FORCED, "tool_choice": choice, "temperature": 0}
    message = result(gateway, call, params)
    assert message["stop_reason"] == "tool_use"
    (used,) = uses(message)
    assert used["id"].startswith("toolu_")
    assert used["name"] == "get_weather"
    assert used["input"].keys() == {"city"}
    assert isinstance(used["input"]["city"], str)


def test_a_count(gateway: Running) -> None:
    """``messages.countTokens`` gives what the call then uses."""
    wanted = {"model": "m", "messages": HI, "tools": [WEATHER]}
    counted = result(gateway, "countTokens", wanted)
    usage = result(gateway, "create", {**wanted, "max_tokens": 1})["usage"]
    used = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert counted == {"input_tokens": used}


def test_the_models(gateway: Running) -> None:
    """``models.list`` has a model for each tier, with the window that a call really has."""
    models = {model["id"]: model for model in result(gateway, "models")}
    assert {name: model["max_input_tokens"] for name, model in models.items()} == {
        "claudegw-main": 32768,
        "claudegw-small": 4096,
    }
    assert all("claude" in name for name in models)
    assert all(model["type"] == "model" for model in models.values())


# --- errors ---------------------------------------------------------------------------------------


def test_a_wrong_request(gateway: Running) -> None:
    """A mistake in the request is a ``BadRequestError`` that says where."""
    found = error(gateway, "BadRequestError", "create", {**TURN, "max_tokens": 0})
    assert (found["status"], found["type"]) == (400, "invalid_request_error")
    assert sentence(found).startswith("max_tokens: ")


def test_a_prompt_that_is_too_long(gateway: Running) -> None:
    """A prompt beyond the window is a ``BadRequestError`` with both numbers, streamed or not."""
    long = {"model": "m", "messages": [{"role": "user", "content": "word " * 33_000}]}
    tokens = result(gateway, "countTokens", long)["input_tokens"]
    for call in ("create", "stream"):
        found = error(gateway, "BadRequestError", call, {**long, "max_tokens": 1})
        assert sentence(found) == f"prompt is too long: {tokens} tokens > 32767 maximum"


def test_a_path_that_is_not_there(gateway: Running) -> None:
    """What this gateway does not have is a ``NotFoundError``."""
    found = error(gateway, "NotFoundError", "batches")
    assert (found["status"], found["type"]) == (404, "not_found_error")
    assert "/v1/messages/batches" in sentence(found)


def test_a_name_that_is_not_ours(gateway: Running) -> None:
    """A ``Host`` that is not one of ours is a ``PermissionDeniedError``."""
    found = error(gateway, "PermissionDeniedError", "create", TURN, host="elsewhere.example")
    assert (found["status"], found["type"]) == (403, "permission_error")
    assert "'elsewhere.example'" in sentence(found)


@pytest.fixture(scope="module")
def guarded_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One for the tests below."""
    with guarded(tmp_path_factory.mktemp("guarded")) as gateway:
        yield gateway


def test_a_wrong_key(guarded_gateway: Running) -> None:
    """A key that is not the token is an ``AuthenticationError``."""
    found = error(guarded_gateway, "AuthenticationError", "create", TURN, key="wrong")
    assert (found["status"], found["type"]) == (401, "authentication_error")
    assert TOKEN not in sentence(found)


def test_a_body_that_is_too_large(guarded_gateway: Running) -> None:
    """A body beyond the limit is a ``ContentTooLargeError`` with the limit."""
    large = {**TURN, "messages": [{"role": "user", "content": "x" * LIMIT}]}
    found = error(guarded_gateway, "ContentTooLargeError", "create", large, key=TOKEN)
    assert (found["status"], found["type"]) == (413, "request_too_large")
    assert str(LIMIT) in sentence(found)


@pytest.mark.parametrize("call", ["create", "stream"])
def test_a_server_that_is_down(guarded_gateway: Running, call: str) -> None:
    """A model server that does not run is a ``ServiceUnavailableError``, to be tried again."""
    found = error(guarded_gateway, "ServiceUnavailableError", call, TURN, key=TOKEN)
    assert "InternalServerError" in found["parents"]
    assert (found["status"], found["type"]) == (503, "api_error")
    assert int(found["retryAfter"]) > 0
    assert "'main'" in sentence(found)


def test_a_line_that_is_full(tmp_path: Path) -> None:
    """One call too many is an ``OverloadedError``, to be tried again."""
    with crowded(tmp_path) as gateway:
        for call in ("create", "stream"):
            found = error(gateway, "OverloadedError", call, TURN)
            assert (found["status"], found["type"]) == (529, "overloaded_error")
            assert int(found["retryAfter"]) > 0
