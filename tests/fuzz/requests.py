"""Bodies of the three APIs: refused with the place of a mistake, or ready for llama-server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from gateway.policy import calls, prefix, routes, schema, tools, warm
from gateway.policy.divergence import diverge
from gateway.policy.grammar import write
from gateway.policy.prompt import Prompt, shared, whole
from gateway.policy.template import Template
from gateway.wire import bare, chat, openai, request
from gateway.wire.errors import ApiError
from gateway.wire.request import MessagesRequest
from tests import conversations as said
from tests.fuzz import Target
from tests.fuzz.changes import of_json
from tests.house import turn

Json = Any

_TEMPLATES: Final = (
    Template(),
    Template.of("enable_thinking reasoning_effort clear_thinking xhigh", vision=True),
)
_CLIENTS: Final[tuple[Mapping[str, str], ...]] = (
    {},
    {"user-agent": said.CLIENT, "x-claude-code-session-id": "s", "x-claude-code-agent-id": "a"},
    {"user-agent": said.CLIENT},
)
_TIERS: Final = ("main", "small")
_MARK: Final = {"cache_control": {"type": "ephemeral"}}

#: What llama-server takes of a message (docs/protocol.md, "What llama-server drops").
_TAKEN: Final = frozenset({"text", "thinking", "tool_use", "tool_result", "image"})


def check_refusal(error: ApiError) -> None:
    """A refusal of a body is a 400 with a sentence, and can be written in both APIs' words."""
    assert error.status == 400, error
    assert error.message.strip()
    orjson.dumps(error.envelope("req_1"))


# --- the Messages API -----------------------------------------------------------------------------


def messages_hold(data: bytes) -> None:
    """A body is refused, or understood, routed and prepared, and is never changed."""
    for counting in (False, True):
        try:
            wanted = request.parse(data, counting=counting)
        except ApiError as error:
            check_refusal(error)
        else:
            check_request(wanted)


def check_request(wanted: MessagesRequest) -> None:
    """All that is made of a request on its way to the line."""
    before = orjson.dumps(wanted.body)
    assert wanted.model
    assert all(isinstance(text, str) for text in wanted.system)
    assert isinstance(tools.takes_one_call(wanted), bool)
    for headers in _CLIENTS:
        call = calls.understand(wanted, headers)
        assert call.kind in calls.KINDS
        assert call == calls.understand(wanted, headers)
        assert routes.choose(call, wanted.model, (), _TIERS).tier in _TIERS
    if wanted.schema is not None:
        check_schema(wanted.schema)
    for template in _TEMPLATES:
        try:
            body = prefix.prepare(wanted, template)
        except ApiError as error:
            check_refusal(error)
            continue
        check_prepared(body)
        again = prefix.prepare(_in_another_shape(wanted), template)
        assert again == body, "marks and the shape of a content change nothing"
    assert orjson.dumps(wanted.body) == before


def _in_another_shape(wanted: MessagesRequest) -> MessagesRequest:
    """The same request, with marks of the cache, and strings as lists."""
    body = orjson.loads(orjson.dumps(wanted.body))
    if isinstance(body.get("system"), str):
        body["system"] = [{"type": "text", "text": body["system"], **_MARK}]
    for message in body["messages"]:
        content = message["content"]
        if isinstance(content, str):
            message["content"] = [{"type": "text", "text": content, **_MARK}]
            continue
        for block in content:
            if block["type"] == "tool_result" and isinstance(block.get("content"), str):
                text = {"type": "text", "text": block["content"]}
                block["content"] = [text] if block["content"] else []
            if block["type"] in _TAKEN:
                block.update(_MARK)
    return request.parse(orjson.dumps(body), counting=True)


def check_prepared(body: Mapping[str, Json]) -> None:
    """A prepared body is what llama-server takes, can be said to its helpers, and goes on."""
    assert body["messages"]
    for message in body["messages"]:
        assert message["role"] in ("user", "assistant")
        check_blocks(message["content"])
        kinds = {block["type"] for block in message["content"]}
        assert (
            message["role"] == "assistant"
            or kinds == {"tool_result"}
            or "tool_result" not in (kinds)
        )
    assert all(
        tool["name"] and isinstance(tool["description"], str) for tool in body.get("tools", ())
    )
    orjson.dumps(body)
    full = {"max_tokens": 100, **body}
    for asked in (
        chat.from_messages(body),
        chat.request(full, strict=False),
        chat.request(full, strict=True),
    ):
        assert orjson.loads(orjson.dumps(asked))["messages"] == asked["messages"]
    one, other = warm.two_beginnings(body)
    orjson.dumps([one, other])
    prompt = Prompt.of(body)
    assert diverge(prompt, prompt).how == "continued"
    assert shared(prompt.fingerprint, prompt.fingerprint) == whole(prompt.fingerprint)


def check_blocks(content: Json) -> None:
    """Blocks that llama-server takes, in the form in which it does."""
    for block in content:
        assert block["type"] in _TAKEN
        assert "cache_control" not in block
        match block["type"]:
            case "text" | "thinking" as kind:
                assert isinstance(block[kind], str)
            case "tool_use":
                assert isinstance(block["id"], str)
                assert isinstance(block["name"], str)
                assert isinstance(block["input"], dict)
            case "tool_result":
                assert isinstance(block["tool_use_id"], str)
                check_blocks(block["content"])


# --- the OpenAI API -------------------------------------------------------------------------------


def openai_holds(data: bytes) -> None:
    """A body is refused, or becomes what a body of the Messages API would."""
    try:
        wanted, _ = openai.read_chat(data, 1)
    except ApiError as error:
        check_refusal(error)
    else:
        check_request(wanted)
    try:
        one, _ = openai.read_completion(data, 1)
    except ApiError as error:
        check_refusal(error)
    else:
        assert bare.is_meant(one.prepared)
        asked = bare.completion(one.prepared)
        assert orjson.loads(orjson.dumps(asked))["n_predict"] >= 1
        Prompt.of(one.prepared)
    try:
        embedding = openai.read_embedding(data)
    except ApiError as error:
        check_refusal(error)
    else:
        assert orjson.loads(orjson.dumps(embedding.prepared)) == orjson.loads(data)


# --- schemas --------------------------------------------------------------------------------------


def schemas_hold(data: bytes) -> None:
    """A schema is refused by name, or becomes a grammar of a bounded size."""
    try:
        wanted = request.load(data)
        request.not_too_deep(wanted)
    except ApiError as error:
        check_refusal(error)
    else:
        check_schema(wanted)


def check_schema(wanted: Mapping[str, Json]) -> None:
    try:
        form = schema.read(wanted)
    except ApiError as error:
        check_refusal(error)
        return
    assert write(form.shape, 256).startswith("root ::=")
    assert form.fits("{") is False


# --- what cases are made of -----------------------------------------------------------------------

_RESULT_PARTS: Final = [
    said.text("a"),
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO"}},
    {"type": "search_result", "title": "t", "source": "s", "content": [said.text("b")]},
    {"type": "tool_reference", "tool_name": "Bash"},
]
_DOCUMENT: Final = {
    "type": "document",
    "title": "t",
    "context": "c",
    "source": {"type": "content", "content": [said.text("d"), _RESULT_PARTS[1]]},
}
_FORM: Final = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40, "pattern": "^[a-z]+$"},
        "n": {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
        "of": {"anyOf": [{"$ref": "#/$defs/a"}, {"enum": ["x", 1, None]}, {"const": True}]},
        "all": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["title"],
    "additionalProperties": False,
    "$defs": {"a": {"oneOf": [{"type": "string", "format": "date"}, {"type": "boolean"}]}},
}
BODIES: Final[list[Json]] = [
    turn(),
    turn(
        model="claude-haiku-4", output_config={"format": {"type": "json_schema", "schema": _FORM}}
    ),
    said.body(
        [
            said.system("a place"),
            said.user(said.text("<system-reminder>\ngitStatus\n</system-reminder>"), _DOCUMENT),
            said.assistant(said.thinking("h"), said.text("w"), said.call("toolu_1", a=1)),
            said.user(said.result("toolu_1", _RESULT_PARTS, is_error=True), said.text("and")),
            said.system([said.text("later")]),
            said.assistant({"type": "redacted_thinking", "data": "x"}, said.call("toolu_2")),
            said.user(said.result("toolu_2", None)),
        ],
        tools=[said.tool("Bash")],
        tool_choice={"type": "tool", "name": "Bash", "disable_parallel_tool_use": True},
        metadata={"user_id": "u"},
        stop_sequences=["</block>"],
        temperature=0.5,
        chat_template_kwargs={"enable_thinking": True},
        output_config={"effort": "xhigh"},
    ),
    said.body(
        [
            said.user(
                {"type": "tool_addition", "tool": {"name": "Cron"}},
                {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"q": 1}},
                {"type": "web_search_tool_result", "content": [{"title": "t", "url": "u"}]},
                {"type": "mcp_tool_result", "tool_use_id": "m", "content": [said.text("c")]},
            )
        ],
        tools=[
            {"type": "bash_20250124", "name": "bash"},
            {"type": "web_search_20250305", "name": "web_search"},
            said.tool("Cron", defer_loading=True, input_examples=[{"a": 1}]),
            said.tool("Bash", type="custom"),
        ],
        thinking={"type": "enabled", "budget_tokens": 1024},
    ),
]
_PART: Final = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}}
_CALL: Final = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "Bash", "arguments": '{"a": 1}'},
}
CHATS: Final[list[Json]] = [
    {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    {
        "model": "m",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "developer", "content": [said.text("d")]},
            {"role": "user", "content": [said.text("w"), _PART]},
            {"role": "assistant", "reasoning_content": "r", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "done"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "user", "content": "again"},
        ],
        "tools": [{"type": "function", "function": {"name": "Bash", "parameters": {"a": 1}}}],
        "tool_choice": {"type": "function", "function": {"name": "Bash"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"schema": _FORM}},
        "reasoning_effort": "high",
        "stop": ["a", ""],
        "max_completion_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "u",
        "n": 1,
    },
    {"model": "m", "prompt": "once", "max_tokens": 4, "stop": "x", "logit_bias": {"1": 1}},
    {"model": "m", "prompt": [1, 2, 3], "temperature": 0, "grammar": 'root ::= "a"'},
    {"model": "m", "input": ["a", "b"]},
]
_SCHEMAS: Final[list[Json]] = [
    _FORM,
    {"type": "object"},
    {"allOf": [{"type": "string"}, {"minLength": 2, "maxLength": 3}]},
    {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "number"}}}},
    {"type": "number", "exclusiveMinimum": 0.1, "exclusiveMaximum": 7.25},
]

WORDS: Final[tuple[Json, ...]] = (
    *("text", "thinking", "tool_use", "tool_result", "image", "document", "search_result"),
    *("tool_reference", "tool_addition", "tool_removal", "server_tool_use", "redacted_thinking"),
    *("x_tool_result", "custom", "bash_1", "web_search_1", "base64", "url", "content", "file"),
    *("user", "assistant", "system", "tool", "function", "any", "none", "auto", "enabled"),
    *(*_RESULT_PARTS, _DOCUMENT, _PART, _CALL, {"type": "tool_result"}, {"type": "image"}),
    *({"type": "document"}, {"type": "search_result"}, {"type": "tool_use"}, _FORM),
)
_KEYWORDS: Final[tuple[Json, ...]] = (
    *("object", "array", "string", "integer", "number", "boolean", "null", "date-time", "uuid"),
    *("#", "#/$defs/a", "#/properties/of", "^a{2,5}$", "(a|b)*", "[^\\d]", "\\u0041"),
    *({"type": "string"}, {"$ref": "#/$defs/a"}, {"enum": [1, "a"]}, {"const": {"a": []}}, True),
    *({"anyOf": [True, False]}, {"multipleOf": 1}, {"pattern": "^x+$"}, {"format": "email"}),
)


def _dumped(values: list[Json]) -> tuple[bytes, ...]:
    return tuple(map(orjson.dumps, values))


def _within(*blocks: Json, **more: Json) -> Json:
    """A turn whose only block is a result that holds these."""
    return turn() | {"messages": [said.user(said.result("toolu_1", list(blocks), **more))]}


#: What is known by its type must be complete wherever it stands, and what is empty says nothing.
_INCOMPLETE: Final[list[Json]] = [
    turn(system=""),
    turn(tools=[{"name": "a", "type": None}]),
    turn(tools=[{"name": "a", "type": None, "input_schema": {}}]),
    _within({"type": "tool_result"}),
    _within({"type": "tool_use"}),
    _within({"type": "tool_addition"}),
    _within({"type": "search_result", "title": "t", "source": "s", "content": [{"type": "image"}]}),
    _within(_DOCUMENT | {"source": {"type": "content", "content": [{"type": "document"}]}}),
    _within({"type": "thinking", "thinking": "h", "text": 5}, is_error=True),
]
_BEYOND: Final[list[Json]] = [
    {"exclusiveMaximum": 1e300},
    {"type": "integer", "exclusiveMinimum": -1e300, "maximum": 1e300},
]

MESSAGES: Final = Target(
    "messages",
    messages_hold,
    _dumped(BODIES),
    of_json(WORDS),
    kept=_dumped(_INCOMPLETE),
    cases=1000,
)
OPENAI: Final = Target("openai", openai_holds, _dumped(CHATS), of_json(WORDS), cases=1000)
SCHEMAS: Final = Target(
    "schemas",
    schemas_hold,
    _dumped(_SCHEMAS),
    of_json(_KEYWORDS),
    kept=_dumped(_BEYOND),
    cases=600,
)
