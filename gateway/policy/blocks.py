"""
Content blocks, said so that llama-server takes them.

Its ``/v1/messages`` takes text, thinking, tool calls and their results, and images where the model
has eyes; it drops every other block without a word (docs/protocol.md, "What llama-server drops").
What can be said in words is; what cannot leaves a note in square brackets, so that the model can
say that it is missing.  Each block is told in the same words wherever it comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import orjson

from gateway.policy.template import Template

Json = Any

#: Beginnings of results that say by themselves that they are errors.
_SAYS_ERROR: Final = ("error", "<tool_use_error>", "<error>")


def told(content: str | list[Json], template: Template) -> list[Json]:
    """The blocks of a message for a server with this template."""
    if isinstance(content, str):
        return [_text(content)]
    return [part for block in content for part in _told(block, template)]


def _text(text: str) -> Json:
    return {"type": "text", "text": text}


def _note(text: str) -> list[Json]:
    return [_text(f"[{text}]")]


def _told(block: Mapping[str, Json], template: Template) -> list[Json]:
    kind = block["type"]
    if kind in _TOLD:
        return _TOLD[kind](block, template)
    if kind.endswith("_tool_result"):  # of a tool that a server ran
        return [_text("\n".join(_strings(block.get("content"))))]
    for key in ("text", "content"):
        if isinstance(block.get(key), str):
            return [_text(block[key])]
    return _note(f"a block of type {kind} is missing: the model's server cannot take it")


# --- one kind of block each -----------------------------------------------------------------------


def _words(block: Mapping[str, Json], _: Template) -> list[Json]:
    return [_text(block["text"])]


def _as_it_is(block: Mapping[str, Json], _: Template) -> list[Json]:
    return [{key: value for key, value in block.items() if key != "cache_control"}]


def _nothing(_: Mapping[str, Json], __: Template) -> list[Json]:
    """Encrypted for somebody else."""
    return []


def _image(block: Mapping[str, Json], template: Template) -> list[Json]:
    source = block["source"]
    if source["type"] not in ("base64", "url"):
        return _note(f"an image is missing: its source is a {source['type']}")
    if template.vision:
        return [{"type": "image", "source": source}]
    kind = source.get("media_type", "image")
    return _note(f"an image ({kind}) is missing: the model cannot see")


def _document(block: Mapping[str, Json], template: Template) -> list[Json]:
    source = block["source"]
    title = block.get("title") or "document"
    match source["type"]:
        case "text":
            inside = [_text(source["data"])]
        case "content":
            inside = told(source["content"], template)
        case other:
            kind = source.get("media_type", other)
            inside = _note(f"its content ({kind}) is missing: the model's server takes text only")
    context = f' context="{block["context"]}"' if block.get("context") else ""
    return [_text(f'<document title="{title}"{context}>\n'), *inside, _text("\n</document>")]


def _search_result(block: Mapping[str, Json], template: Template) -> list[Json]:
    start = _text(f'<search_result title="{block["title"]}" source="{block["source"]}">\n')
    return [start, *told(block["content"], template), _text("\n</search_result>")]


def _tool_result(block: Mapping[str, Json], template: Template) -> list[Json]:
    inside = told(block.get("content") or [], template)
    if block.get("is_error"):
        words = "".join(part["text"] for part in inside if part["type"] == "text")
        if not words.lstrip().lower().startswith(_SAYS_ERROR):
            inside.insert(0, _text("Error: " if words else "Error"))
    return [{"type": "tool_result", "tool_use_id": block["tool_use_id"], "content": inside}]


def _reference(block: Mapping[str, Json], _: Template) -> list[Json]:
    return [_text(f"The tool {block['tool_name']} is loaded now: you can call it.\n")]


def _addition(block: Mapping[str, Json], _: Template) -> list[Json]:
    return [_text(f"The tool {block['tool']['name']} is there now: you can call it.\n")]


def _removal(block: Mapping[str, Json], _: Template) -> list[Json]:
    return [_text(f"The tool {block['tool']['name']} is gone: do not call it any more.\n")]


def _server_call(block: Mapping[str, Json], _: Template) -> list[Json]:
    asked = orjson.dumps(block.get("input") or {}).decode()
    return _note(f"{block.get('name', 'a tool')} was run with {asked}")


_TOLD: Final[Mapping[str, Callable[[Mapping[str, Json], Template], list[Json]]]] = {
    "text": _words,
    "thinking": _as_it_is,
    "redacted_thinking": _nothing,
    "image": _image,
    "document": _document,
    "search_result": _search_result,
    "tool_use": _as_it_is,
    "tool_result": _tool_result,
    "tool_reference": _reference,
    "tool_addition": _addition,
    "tool_removal": _removal,
    "server_tool_use": _server_call,
    "mcp_tool_use": _server_call,
}

#: Keys under which results of servers' tools have something to read.
_READABLE: Final = ("title", "url", "text", "stdout", "stderr", "error_code")


def _strings(content: Json) -> Iterator[str]:
    """What a person could read in a result of a tool that a server ran."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            yield from _strings(part)
    elif isinstance(content, dict):
        for key, value in content.items():
            if key in _READABLE and isinstance(value, str):
                yield value
            elif isinstance(value, list | dict):
                yield from _strings(value)
