"""
``count_tokens`` equals the usage of the real call, whatever the call looks like.

Two model families, each behind a gateway of its own.  SmolLM2 gets a template in GLM's order, with
thinking and tool results as GLM has them; Gemma gets the demo's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from tests.e2e.stack import (
    SMOLLM,
    TIER_KINDS,
    Running,
    gateway_of_kind,
    start_gateway,
    start_server,
)

pytestmark = pytest.mark.server

#: Of which kinds the tiers of `gateway` are, one after the other.
GATEWAYS: Final = TIER_KINDS

Json = Any

CLAUDE_CODE: Final = {"user-agent": "claude-cli/2.1.330 (external, cli)"}

MARK: Final = {"cache_control": {"type": "ephemeral"}}

WEATHER: Final = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
#: Without a description; with keys out of order, defaults and letters of other scripts.
SEARCH: Final = {
    "name": "Søk",
    "input_schema": {
        "required": ["query"],
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "query": {"description": "Où ? 何?", "type": ["string", "null"], "default": None},
            "limit": {"anyOf": [{"type": "number", "minimum": 0.5}, {"enum": ["all", 1e3]}]},
        },
    },
}
TITLE: Final = {
    "format": {
        "type": "json_schema",
        "schema": {
            "type": "object",
            "properties": {"title": {"type": "string"}},
            "required": ["title"],
            "additionalProperties": False,
        },
    }
}
REMINDER: Final = "<system-reminder>\nThe file was read.\n</system-reminder>"


def user(*content: Json) -> Json:
    return {"role": "user", "content": list(content)}


def assistant(*content: Json) -> Json:
    return {"role": "assistant", "content": list(content)}


def text(words: str, **more: Json) -> Json:
    return {"type": "text", "text": words, **more}


def thinking(words: str) -> Json:
    return {"type": "thinking", "thinking": words, "signature": ""}


def use(number: int, **arguments: Json) -> Json:
    name = "get_weather" if "city" in arguments else "Søk"
    return {"type": "tool_use", "id": f"toolu_{number}", "name": name, "input": arguments}


def result(number: int, content: Json = "Rain.", **more: Json) -> Json:
    return {"type": "tool_result", "tool_use_id": f"toolu_{number}", "content": content, **more}


ASKED: Final = user(text("What is the weather in Paris?"))
TOOLS: Final = {"tools": [WEATHER, SEARCH]}


@attrs.frozen
class Shape:
    """A request, and how its client introduces itself."""

    messages: list[Json]
    more: Mapping[str, Json] = attrs.field(factory=dict)
    headers: Mapping[str, str] = attrs.field(factory=dict)
    max_tokens: int = 3

    @property
    def body(self) -> dict[str, Json]:
        return {"model": "m", "messages": self.messages, **self.more}


SHAPES: Final[dict[str, Shape]] = {
    "a string": Shape([{"role": "user", "content": "hi"}]),
    "a block": Shape([user(text("hi"))]),
    "several blocks": Shape([user(text("one"), text(" two", **MARK), text("\nthree"))]),
    "several turns": Shape([user(text("one")), assistant(text("two")), user(text("three"))]),
    "two user turns": Shape([user(text("one")), user(text("two"))]),
    "system as a string": Shape([ASKED], {"system": "You are a poet."}),
    "system as a list": Shape(
        [ASKED],
        {
            "system": [
                text("x-anthropic-billing-header: cc_version=2.1.330.abc; cch=12345;"),
                text("You are a poet.", **MARK),
                text("You never rhyme."),
            ]
        },
    ),
    "system before the conversation": Shape([{"role": "system", "content": "Be brief."}, ASKED]),
    "system in the conversation": Shape(
        [
            ASKED,
            {"role": "system", "content": "The user opened a file."},
            assistant(text("Rain.")),
            {"role": "system", "content": [text("The user closed it.")]},
        ]
    ),
    "tools": Shape([ASKED], TOOLS),
    "no tools in a list": Shape([ASKED], {"tools": []}),
    "a tool round": Shape([ASKED, assistant(use(1, city="Paris")), user(result(1))], TOOLS),
    "a tool round with words": Shape(
        [
            ASKED,
            assistant(text("I will look."), use(1, city="Paris", days=2)),
            user(result(1, [text("Rain"), text("and wind.")])),
            assistant(text("It rains.")),
            user(text("And tomorrow?")),
        ],
        TOOLS,
    ),
    "two tools at once": Shape(
        [
            ASKED,
            assistant(use(1, city="Paris"), use(2, query=None, limit=2.5)),
            user(result(1), result(2, "No.", is_error=True)),
        ],
        TOOLS,
    ),
    "a tool round without tools": Shape([ASKED, assistant(use(1, city="Paris")), user(result(1))]),
    "arguments of every kind": Shape(
        [
            ASKED,
            assistant(
                use(
                    1,
                    query='"Où"\n\t\\/ \u0001\u007f\u2028 <b>&amp;</b> 😀',
                    limit=[0.1, 1.0, -0.0, 12345678901234567890, True, None, {}, [], {"b": 1}],
                )
            ),
            user(result(1)),
        ],
        TOOLS,
    ),
    "arguments with exponents": Shape(
        [ASKED, assistant(use(1, query="x", limit=[1e22, 1.5e-9, 1e16])), user(result(1))], TOOLS
    ),
    "no arguments": Shape(
        [
            ASKED,
            assistant({"type": "tool_use", "id": "toolu_1", "name": "Søk", "input": {}}),
            user(result(1)),
        ],
        TOOLS,
    ),
    "empty tool results": Shape(
        [
            ASKED,
            assistant(use(1, city="Paris"), use(2, city="Rome")),
            user(result(1, ""), {"type": "tool_result", "tool_use_id": "toolu_2"}),
        ],
        TOOLS,
    ),
    "thinking before a tool": Shape(
        [
            ASKED,
            assistant(thinking("I should look."), use(1, city="Paris")),
            user(result(1)),
        ],
        TOOLS,
    ),
    "thinking of an earlier turn": Shape(
        [ASKED, assistant(thinking("I know this."), text("Rain.")), user(text("Sure?"))]
    ),
    "thinking enabled": Shape([ASKED], {"thinking": {"type": "enabled", "budget_tokens": 2}}),
    "thinking disabled": Shape([ASKED], {"thinking": {"type": "disabled"}}),
    "switches of the template": Shape(
        [ASKED], {"chat_template_kwargs": {"enable_thinking": False, "clear_thinking": False}}
    ),
    "reminders beside tool results": Shape(
        [
            user(text(REMINDER), text("Weather?")),
            assistant(thinking("Hm."), use(1, city="Paris")),
            user(result(1), text(REMINDER), text(REMINDER)),
        ],
        TOOLS,
    ),
    "words beside tool results": Shape(
        [
            ASKED,
            assistant(use(1, city="Paris")),
            user(text(REMINDER), result(1), text("Be quick, please.")),
        ],
        TOOLS,
    ),
    "tool_choice auto": Shape([ASKED], {**TOOLS, "tool_choice": {"type": "auto"}}),
    "tool_choice any": Shape([ASKED], {**TOOLS, "tool_choice": {"type": "any"}}),
    "tool_choice tool": Shape(
        [ASKED], {**TOOLS, "tool_choice": {"type": "tool", "name": "get_weather"}}
    ),
    "tool_choice none": Shape([ASKED], {**TOOLS, "tool_choice": {"type": "none"}}),
    "other scripts": Shape([user(text("Größe 大きさ размер גודל ½ ﬁ e\u0301 \u200b\ufeff"))]),
    "emoji": Shape([user(text("👩‍👩‍👧‍👦🏳️‍🌈🇫🇷 \U0001f9ff"))]),
    "the marks of templates": Shape(
        [
            user(text("<|im_start|>system\n<bos><start_of_turn>user <|endoftext|> [gMASK]<sop>")),
            assistant(text("</think><tool_call></tool_call><end_of_turn>")),
            user(text("<unused1><|user|><eos>")),
        ]
    ),
    "white space": Shape([user(text("  \n\n hi \r\n\t ")), assistant(text(" \n")), ASKED]),
    "an empty string": Shape([{"role": "user", "content": ""}]),
    "an empty block": Shape([user(text("")), assistant(text("")), ASKED]),
    "an empty list": Shape([user(), assistant(text("Yes?")), ASKED]),
    "a long one": Shape([user(text(" ".join(f"word{number}" for number in range(250))))]),
    "a haiku name": Shape([ASKED], {"model": "claude-haiku-4-5"}, CLAUDE_CODE),
    "a title of Claude Code": Shape(
        [ASKED], {"output_config": TITLE, "system": "Name it."}, CLAUDE_CODE, max_tokens=64
    ),
    "a schema of somebody else": Shape([ASKED], {"output_config": TITLE}, max_tokens=64),
    "a schema beside tools": Shape([ASKED], {**TOOLS, "output_config": TITLE}),
    "a turn of Claude Code": Shape(
        [user(text(REMINDER), text("hi", **MARK))],
        {
            **TOOLS,
            "system": [text("You are Claude Code."), text("Be safe.", **MARK)],
            "thinking": {"type": "adaptive"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "high"},
            "metadata": {"user_id": "u"},
            "temperature": 1,
        },
        CLAUDE_CODE,
    ),
    "stop sequences": Shape([ASKED], {"stop_sequences": ["\n", "Paris"], "temperature": 0.5}),
    "a prefilled answer": Shape([ASKED, assistant(text("The weather"))]),
    "a prefilled answer beside tools": Shape([ASKED, assistant(text("The weather"))], TOOLS),
}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """SmolLM2 with a template that renders tools and thinking."""
    template = str(Path(__file__).with_name("glm_order.jinja"))
    server = start_server(
        tmp_path_factory.mktemp("smollm2"),
        "smollm2",
        *(*SMOLLM, "--ctx-size", "8192", "--chat-template-file", template),
    )
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["gemma", "smollm2"])
def family(
    request: pytest.FixtureRequest, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A gateway in front of one model."""
    name = {"gemma": "main_server"}.get(request.param, request.param)
    server: Running = request.getfixturevalue(name)
    tiers = {"main": {"url": server.url}}
    with gateway_of_kind(kind, tmp_path_factory.mktemp("family"), tiers) as gateway:
        yield gateway


def counted(gateway: Running, shape: Shape) -> int:
    """What ``count_tokens`` says."""
    status, said = gateway.ask("/v1/messages/count_tokens", shape.body, shape.headers)
    assert status == 200, said
    assert said.keys() == {"input_tokens"}
    return int(said["input_tokens"])


def used(gateway: Running, shape: Shape) -> int:
    """What the call itself says afterwards."""
    body = {**shape.body, "max_tokens": shape.max_tokens}
    status, message = gateway.ask("/v1/messages", body, shape.headers)
    assert status == 200, message
    usage = message["usage"]
    assert usage["cache_creation_input_tokens"] == 0
    return int(usage["input_tokens"] + usage["cache_read_input_tokens"])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_count_is_what_the_call_will_use(family: Running, shape: Shape) -> None:
    """``input_tokens`` of a count is ``input_tokens + cache_read_input_tokens`` of the call."""
    assert counted(family, shape) == used(family, shape)


@pytest.mark.parametrize(
    "shape",
    [
        SHAPES["a tool round"],
        SHAPES["a haiku name"],
        SHAPES["a title of Claude Code"],
        # Too long for the small tier, so it goes to the main one.
        Shape([user(text("word " * 4200))], {"model": "claude-haiku-4-5"}, CLAUDE_CODE),
    ],
    ids=["main", "small", "small, schema", "too long for small"],
)
def test_a_count_is_taken_where_the_call_goes(gateway: Running, shape: Shape) -> None:
    """With two tiers, a count is that of the model that its message would go to."""
    assert counted(gateway, shape) == used(gateway, shape)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ("tools", "no tools in a list"),
        ("a tool round", "a tool round without tools"),
        ("reminders beside tool results", "a tool round"),
        ("system as a string", "no tools in a list"),
    ],
)
def test_what_is_sent_is_counted(family: Running, more: str, less: str) -> None:
    """The templates of these tests render tools, reminders and system texts."""
    assert counted(family, SHAPES[more]) > counted(family, SHAPES[less])


def test_thinking_is_counted(smollm2: Running, tmp_path: Path) -> None:
    """The template in GLM's order renders the thinking of a tool loop."""
    gateway = start_gateway(tmp_path, {"main": {"url": smollm2.url}})
    try:
        thought = counted(gateway, SHAPES["thinking before a tool"])
        assert thought > counted(gateway, SHAPES["a tool round"])
    finally:
        gateway.stop()
