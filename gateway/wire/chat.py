"""
Messages shape -> chat (OpenAI) shape, exactly as llama-server converts it itself.

``/apply-template`` wants the chat shape, ``/v1/messages`` takes the Messages shape and converts it
inside (llama.cpp `tools/server/server-chat.cpp`, `server_chat_convert_anthropic_to_oai`).  A count
that is taken here must equal the usage of the call that is made there, so this conversion follows
that one step by step, what it drops included; what it drops or misplaces is mended before, in
`gateway.policy.prefix`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

Json = Any

#: More tokens than any window has: the bound of a call that says none.
AS_MANY_AS_FIT: Final = 2**31 - 1

#: How a token is chosen; strict servers do not know the last.
SAMPLING: Final = ("temperature", "top_p", "top_k")


def from_messages(body: Mapping[str, Json]) -> dict[str, Json]:
    """The chat-shaped body for ``/apply-template`` that renders as `body` does."""
    messages: list[Json] = []
    system = body.get("system")
    if system is not None:
        text = system if isinstance(system, str) else "".join(_texts(system))
        messages.append({"role": "system", "content": text})
    for message in body["messages"]:
        messages.extend(_message(message))
    chat: dict[str, Json] = {"messages": messages}
    if "tools" in body:
        chat["tools"] = [_tool(tool) for tool in body["tools"]]
    choice = (body.get("tool_choice") or {}).get("type")
    if choice == "auto":
        chat["tool_choice"] = "auto"
    elif choice in ("any", "tool"):
        chat["tool_choice"] = "required"
    if "chat_template_kwargs" in body:
        chat["chat_template_kwargs"] = body["chat_template_kwargs"]
    return chat


def _texts(blocks: list[Json]) -> list[str]:
    return [block["text"] for block in blocks if block.get("type") == "text"]


def _tool(tool: Json) -> Json:
    return {
        "type": "function",
        "function": {
            "name": tool.get("name", ""),
            "description": tool.get("description", ""),
            "parameters": tool.get("input_schema", {}),
        },
    }


def _message(message: Json) -> list[Json]:
    role, content = message["role"], message["content"]
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    parts: list[Json] = []
    calls: list[Json] = []
    results: list[Json] = []
    reasoning = ""
    for block in content:
        kind = block.get("type")
        if kind == "text":
            parts.append(block)
        elif kind == "thinking":
            reasoning += block["thinking"]
        elif kind == "image":
            parts.extend(_image(block))
        elif kind == "tool_use":
            calls.append(_call(block))
        elif kind == "tool_result":
            results.append(_result(block))
    found: list[Json] = []
    if parts or calls or reasoning:
        new: dict[str, Json] = {"role": role, "content": parts or ""}
        if calls:
            new["tool_calls"] = calls
        if reasoning:
            new["reasoning_content"] = reasoning
        found.append(new)
    return found + results


def _call(block: Json) -> Json:
    arguments = orjson.dumps(block["input"]).decode()
    return {
        "id": block["id"],
        "type": "function",
        "function": {"name": block["name"], "arguments": arguments},
    }


def _image(block: Json) -> list[Json]:
    source = block["source"]
    if source["type"] == "base64":
        url = f"data:{source['media_type']};base64,{source['data']}"
    elif source["type"] == "url":
        url = source["url"]
    else:
        return []
    return [{"type": "image_url", "image_url": {"url": url}}]


def _result(block: Json) -> Json:
    content = block.get("content") or ""
    if not isinstance(content, str):
        parts: list[Json] = []
        for part in content:
            if part.get("type") == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part.get("type") == "image":
                parts.extend(_image(part))
        has_image = any(part["type"] == "image_url" for part in parts)
        content = parts if has_image else "".join(part["text"] for part in parts)
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}


# --- for servers of the chat API ------------------------------------------------------------------


def request(body: Mapping[str, Json], *, strict: bool) -> dict[str, Json]:
    """
    The request to ``/v1/chat/completions`` that means what `body` does, to be streamed.

    Beside `from_messages`, which says what llama-server does, this one says what the chat API
    itself has (https://platform.openai.com/docs/api-reference/chat/create): words are strings, tool
    results hold no images (those follow in a turn of the user), and ids lose the ``toolu_`` that
    they were given for the client.

    Args:
        body: a body that `gateway.policy.prefix` has prepared, perhaps with an ``output_config``.
        strict: whether the server refuses what OpenAI's own does not know.
    """
    plain = from_messages(body)
    chat: dict[str, Json] = {
        "messages": _plain(plain["messages"], strict),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if body["max_tokens"] < AS_MANY_AS_FIT:
        chat["max_completion_tokens" if strict else "max_tokens"] = body["max_tokens"]
    if plain.get("tools"):
        chat["tools"] = plain["tools"]
        if "tool_choice" in plain:
            chat["tool_choice"] = plain["tool_choice"]
    if body.get("stop_sequences"):
        chat["stop"] = body["stop_sequences"]
    wanted = (body.get("output_config") or {}).get("format")
    if wanted:
        chat["response_format"] = response_format(wanted["schema"])
    known = SAMPLING[:-1] if strict else (*SAMPLING, "chat_template_kwargs")
    for name in known:
        if name in body:
            chat[name] = body[name]
    return chat


def response_format(schema: Json) -> dict[str, Json]:
    """What holds an answer to `schema`."""
    held = {"name": "answer", "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": held}


def _plain(messages: list[Json], strict: bool) -> list[Json]:
    found: list[Json] = []
    shown: list[Json] = []  # by tools, whose results must stand together
    for message in messages:
        said = dict(message)
        if said["role"] == "tool":
            said["tool_call_id"] = said["tool_call_id"].removeprefix("toolu_")
            if not isinstance(said["content"], str):
                shown += [part for part in said["content"] if part["type"] == "image_url"]
                words = [part for part in said["content"] if part["type"] == "text"]
                said["content"] = words or "What it shows follows."
        elif shown:
            found.append({"role": "user", "content": shown})
            shown = []
        if not isinstance(said["content"], str):
            said["content"] = _parts(said["content"])
        if strict:
            said.pop("reasoning_content", None)
        if "tool_calls" in said:
            said["tool_calls"] = [
                {**call, "id": call["id"].removeprefix("toolu_")} for call in said["tool_calls"]
            ]
        found.append(said)
    return [*found, {"role": "user", "content": shown}] if shown else found


def _parts(parts: list[Json]) -> str | list[Json]:
    """Words alone as one string; servers that know only strings are many."""
    if all(part["type"] == "text" for part in parts):
        text = ""
        for part in parts:
            apart = text and not text.endswith("\n") and not part["text"].startswith("\n")
            text += "\n" + part["text"] if apart else part["text"]
        return text
    return [
        {"type": "text", "text": part["text"]} if part["type"] == "text" else part for part in parts
    ]
