"""
A Messages API request: read, checked, and never changed.

`parse` turns the bytes of a body into a `MessagesRequest` or raises the 400 that says where the
mistake is, by its path (``messages.0.content.1.text``), as the Messages API does.  It checks what
we or llama-server would stumble over and nothing else: unknown fields, block types and betas are
somebody's future and pass (https://docs.anthropic.com/en/api/messages; the fields that Claude Code
sends are listed in docs/protocol.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
import orjson

from gateway.wire.checks import (
    Check,
    by_type,
    each,
    fields,
    filled,
    integer,
    is_a,
    number,
    one_of,
    text_or,
)
from gateway.wire.errors import invalid

Json = Any


@attrs.frozen
class MessagesRequest:
    """
    A read-only view of a parsed and checked body.

    Attributes:
        body: the body as it came.  Whoever wants another one makes a copy.
        size: its length in bytes, on the wire.
        is_converted: whether it came in another API's words.
    """

    body: Mapping[str, Json]
    size: int
    is_converted: bool = attrs.field(default=False, kw_only=True)

    @property
    def model(self) -> str:
        """The client's own name for the model; it comes back in the answer."""
        return str(self.body["model"])

    @property
    def stream(self) -> bool:
        """Whether the answer is wanted as it comes."""
        return bool(self.body.get("stream", False))

    @property
    def max_tokens(self) -> int:
        """The longest answer in tokens; 0 in a count, which needs none."""
        return int(self.body.get("max_tokens") or 0)

    @property
    def messages(self) -> Sequence[Mapping[str, Json]]:
        """The conversation, as it came."""
        return self.body["messages"]  # type: ignore[no-any-return]  # checked by parse()

    @property
    def tools(self) -> Sequence[Mapping[str, Json]]:
        """The tools that the model may call."""
        return self.body.get("tools") or ()

    @property
    def system(self) -> Sequence[str]:
        """The texts of the system prompt, one a block."""
        system = self.body.get("system") or ()
        if isinstance(system, str):
            return (system,)
        return tuple(block["text"] for block in system)

    @property
    def schema(self) -> Mapping[str, Json] | None:
        """The JSON schema that the answer must fit, if one was asked for."""
        config = self.body.get("output_config") or {}
        wanted = config.get("format") or self.body.get("output_format") or {}
        if wanted.get("type") != "json_schema":
            return None
        return wanted["schema"]  # type: ignore[no-any-return]  # checked by parse()

    @property
    def is_bound(self) -> bool:
        """Whether the whole answer must fit a schema; beside tools only its last words must."""
        return self.schema is not None and not self.tools

    def without_tools(self) -> MessagesRequest:
        """The same request, as one that can be answered in words alone."""
        body = {key: self.body[key] for key in self.body if key not in ("tools", "tool_choice")}
        return attrs.evolve(self, body=body)


def parse(raw: bytes, *, counting: bool = False) -> MessagesRequest:
    """
    The request in `raw`.

    Args:
        raw: the body as received.
        counting: for ``count_tokens``, which has no ``max_tokens``.

    Raises:
        ApiError: 400, with the path of the first mistake.
    """
    return checked(load(raw), len(raw), counting=counting)


def load(raw: bytes) -> dict[str, Json]:
    """The JSON object in `raw`; raises ApiError, 400, if there is none."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise invalid("The body must be a JSON object.")
    return body


def not_too_deep(body: Mapping[str, Json]) -> None:
    """Raise ApiError, 400, if `body` could not be written again."""
    try:
        orjson.dumps([[[[body]]]])  # what is made of it may be nested a little deeper
    except TypeError:
        raise invalid("The body is nested too deep.") from None


def checked(body: dict[str, Json], size: int, *, counting: bool = False) -> MessagesRequest:
    """As `parse`, for a body that is loaded already, of `size` bytes on the wire."""
    not_too_deep(body)
    _check_body(body, counting)
    return MessagesRequest(body, size)


# --- what a body must be ----------------------------------------------------------------------

#: What is known of each type of block; blocks hold others, so it is filled below.
_BLOCKS: Final[dict[str, Check]] = {}
_content = text_or(each(by_type(_BLOCKS)))

_text_block = fields({"text": is_a(str)})
_image_block = fields(
    {
        "source": by_type(
            {
                "base64": fields({"media_type": is_a(str), "data": is_a(str)}),
                "url": fields({"url": is_a(str)}),
            }
        )
    }
)
_document_block = fields(
    {
        "source": by_type(
            {
                "text": fields({"data": is_a(str)}),
                "content": fields({"content": _content}),
            }
        )
    },
    {"title": is_a(str), "context": is_a(str)},
)
_search_result_block = fields(
    {"title": is_a(str), "source": is_a(str), "content": each(by_type(_BLOCKS))}
)
_reference_block = fields({"tool_name": filled})
_change_block = fields({"tool": fields({"name": filled})})
_result_block = fields(
    {"tool_use_id": filled},
    {"content": _content, "is_error": is_a(bool)},
)
_BLOCKS.update(
    {
        "text": _text_block,
        "image": _image_block,
        "document": _document_block,
        "search_result": _search_result_block,
        "tool_reference": _reference_block,
        "thinking": fields({"thinking": is_a(str)}),
        "tool_use": fields({"id": filled, "name": filled, "input": is_a(dict)}),
        "tool_result": _result_block,
        "tool_addition": _change_block,
        "tool_removal": _change_block,
    }
)
_message = fields({"role": one_of("user", "assistant", "system"), "content": _content})


_system_block = fields({"type": one_of("text"), "text": is_a(str)})
_any_tool = fields(
    {"name": filled}, {"type": filled, "description": is_a(str), "defer_loading": is_a(bool)}
)
_custom_tool = fields({"input_schema": is_a(dict)})
_any_choice = fields(
    {"type": one_of("auto", "any", "tool", "none")}, {"disable_parallel_tool_use": is_a(bool)}
)
_named = fields({"name": filled})
_any_thinking = fields({"type": one_of("enabled", "disabled", "adaptive")})
_budgeted = fields({"budget_tokens": integer(1)})


def _tool(value: Json, path: str) -> None:
    _any_tool(value, path)
    if (value.get("type") or "custom") == "custom":
        _custom_tool(value, path)


def _tool_choice(value: Json, path: str) -> None:
    _any_choice(value, path)
    if value["type"] == "tool":
        _named(value, path)


def _thinking(value: Json, path: str) -> None:
    _any_thinking(value, path)
    if value["type"] == "enabled":
        _budgeted(value, path)


_format = fields({"type": one_of("json_schema"), "schema": is_a(dict)})
_body = fields(
    {"model": filled, "messages": each(_message)},
    {
        "system": text_or(each(_system_block)),
        "tools": each(_tool),
        "tool_choice": _tool_choice,
        "thinking": _thinking,
        "stop_sequences": each(is_a(str)),
        "temperature": number(0, 2),
        "top_p": number(0, 1),
        "top_k": integer(0),
        "stream": is_a(bool),
        "metadata": is_a(dict),
        "output_config": fields({}, {"format": _format, "effort": is_a(str)}),
        "output_format": _format,
        "max_tokens": integer(1),
        "chat_template_kwargs": is_a(dict),
    },
)
_bounded = fields({"max_tokens": integer(1)})


def _check_body(body: dict[str, Json], counting: bool) -> None:
    _body(body, "")
    if not counting:
        _bounded(body, "")
    if all(message["role"] == "system" for message in body["messages"]):
        raise invalid("messages: at least one message of the user is required")
    names = [tool["name"] for tool in body.get("tools") or ()]
    for name in _repeated(names):
        raise invalid(f"tools: Tool names must be unique; {name!r} stands there twice")
    choice = body.get("tool_choice") or {}
    if choice.get("type") == "tool" and choice["name"] not in names:
        raise invalid(f"tool_choice.name: there is no tool named {choice['name']!r} in tools")
    if choice.get("type") == "any" and not names:
        raise invalid("tool_choice: 'any' needs at least one tool in tools")
    thread = body.get("thread")
    if isinstance(thread, dict) and thread.get("type") == "continue":
        raise invalid("thread: only whole conversations are supported; send all messages")


def _repeated(names: Sequence[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield name
        seen.add(name)
