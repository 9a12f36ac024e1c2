"""
A Messages API request: read, checked, and never changed.

`parse` turns the bytes of a body into a `MessagesRequest` or raises the 400 that says where the
mistake is, by its path (``messages.0.content.1.text``), as the Messages API does.  It checks what
we or llama-server would stumble over and nothing else: unknown fields, block types and betas are
somebody's future and pass (https://docs.anthropic.com/en/api/messages; the fields that Claude Code
sends are listed in docs/protocol.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
import orjson

from gateway.wire.errors import invalid

type_name: Final = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
Json = Any


@attrs.frozen
class MessagesRequest:
    """
    A read-only view of a parsed and checked body.

    Attributes:
        body: the body as it came.  Whoever wants another one makes a copy.
        size: its length in bytes, on the wire.
    """

    body: Mapping[str, Json]
    size: int

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
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise invalid("The body must be a JSON object.")
    try:
        orjson.dumps([[[[body]]]])  # what is made of it may be nested a little deeper
    except TypeError:
        raise invalid("The body is nested too deep.") from None
    _check_body(body, counting)
    return MessagesRequest(body, len(raw))


# --- checks: each takes a value and its path, and raises at the first mistake -----------------

Check = Callable[[Json, str], None]


def _wrong(path: str, expected: str) -> Exception:
    return invalid(f"{path}: Input should be {expected}")


def _is(kind: type) -> Check:
    def check(value: Json, path: str) -> None:
        if not isinstance(value, kind):
            raise _wrong(path, type_name[kind])

    return check


def _one_of(*allowed: str) -> Check:
    def check(value: Json, path: str) -> None:
        if value not in allowed:
            raise _wrong(path, " or ".join(repr(each) for each in allowed))

    return check


def _integer(least: int) -> Check:
    def check(value: Json, path: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise _wrong(path, f"an integer of at least {least}")

    return check


def _number(least: float, most: float) -> Check:
    def check(value: Json, path: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(path, "a number")
        if not least <= value <= most:
            raise _wrong(path, f"between {least} and {most}")

    return check


def _filled(value: Json, path: str) -> None:
    _is(str)(value, path)
    if not value:
        raise _wrong(path, "a string of at least one character")


def _each(check: Check) -> Check:
    def check_all(value: Json, path: str) -> None:
        _is(list)(value, path)
        for number, item in enumerate(value):
            check(item, f"{path}.{number}")

    return check_all


def _fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    optional = optional or {}

    def check(value: Json, path: str) -> None:
        _is(dict)(value, path)
        prefix = f"{path}." if path else ""
        for name, check_field in required.items():
            if name not in value:
                raise invalid(f"{prefix}{name}: Field required")
            check_field(value[name], prefix + name)
        for name, check_field in optional.items():
            if value.get(name) is not None:
                check_field(value[name], prefix + name)

    return check


def _by_type(known: Mapping[str, Check]) -> Check:
    """An object with a ``type``; what else it must have depends on that, if we know it."""

    def check(value: Json, path: str) -> None:
        _fields({"type": _filled})(value, path)
        known.get(value["type"], _anything)(value, path)

    return check


def _anything(value: Json, path: str) -> None:
    """Somebody's future."""


def _text_or(blocks: Check) -> Check:
    def check(value: Json, path: str) -> None:
        if isinstance(value, str):
            return
        if not isinstance(value, list):
            raise _wrong(path, "a string or a list of content blocks")
        blocks(value, path)

    return check


_text_block = _fields({"text": _is(str)})
_image_block = _fields(
    {
        "source": _by_type(
            {
                "base64": _fields({"media_type": _is(str), "data": _is(str)}),
                "url": _fields({"url": _is(str)}),
            }
        )
    }
)
_document_block = _fields(
    {
        "source": _by_type(
            {
                "text": _fields({"data": _is(str)}),
                "content": _fields(
                    {
                        "content": _text_or(
                            _each(_by_type({"text": _text_block, "image": _image_block}))
                        )
                    }
                ),
            }
        )
    },
    {"title": _is(str), "context": _is(str)},
)
_search_result_block = _fields(
    {"title": _is(str), "source": _is(str), "content": _each(_by_type({"text": _text_block}))}
)
_reference_block = _fields({"tool_name": _filled})
_change_block = _fields({"tool": _fields({"name": _filled})})
_SHOWN: Final = {
    "text": _text_block,
    "image": _image_block,
    "document": _document_block,
    "search_result": _search_result_block,
    "tool_reference": _reference_block,
}
_result_block = _fields(
    {"tool_use_id": _filled},
    {"content": _text_or(_each(_by_type(_SHOWN))), "is_error": _is(bool)},
)
_content = _text_or(
    _each(
        _by_type(
            {
                **_SHOWN,
                "thinking": _fields({"thinking": _is(str)}),
                "tool_use": _fields({"id": _filled, "name": _filled, "input": _is(dict)}),
                "tool_result": _result_block,
                "tool_addition": _change_block,
                "tool_removal": _change_block,
            }
        )
    )
)
_message = _fields({"role": _one_of("user", "assistant", "system"), "content": _content})


def _system_block(value: Json, path: str) -> None:
    _fields({"type": _one_of("text"), "text": _is(str)})(value, path)


def _tool(value: Json, path: str) -> None:
    _fields(
        {"name": _filled}, {"type": _filled, "description": _is(str), "defer_loading": _is(bool)}
    )(value, path)
    if value.get("type", "custom") == "custom":
        _fields({"input_schema": _is(dict)})(value, path)


def _tool_choice(value: Json, path: str) -> None:
    _fields(
        {"type": _one_of("auto", "any", "tool", "none")}, {"disable_parallel_tool_use": _is(bool)}
    )(value, path)
    if value["type"] == "tool":
        _fields({"name": _filled})(value, path)


def _thinking(value: Json, path: str) -> None:
    _fields({"type": _one_of("enabled", "disabled", "adaptive")})(value, path)
    if value["type"] == "enabled":
        _fields({"budget_tokens": _integer(1)})(value, path)


def _format(value: Json, path: str) -> None:
    _fields({"type": _one_of("json_schema"), "schema": _is(dict)})(value, path)


_body = _fields(
    {"model": _filled, "messages": _each(_message)},
    {
        "system": _text_or(_each(_system_block)),
        "tools": _each(_tool),
        "tool_choice": _tool_choice,
        "thinking": _thinking,
        "stop_sequences": _each(_is(str)),
        "temperature": _number(0, 2),
        "top_p": _number(0, 1),
        "top_k": _integer(0),
        "stream": _is(bool),
        "metadata": _is(dict),
        "output_config": _fields({}, {"format": _format, "effort": _is(str)}),
        "output_format": _format,
        "max_tokens": _integer(1),
        "chat_template_kwargs": _is(dict),
    },
)


def _check_body(body: dict[str, Json], counting: bool) -> None:
    _body(body, "")
    if not counting:
        _fields({"max_tokens": _integer(1)})(body, "")
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
