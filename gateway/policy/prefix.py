"""
The same bytes for the same past.

llama-server reuses what it has evaluated as far as the new prompt begins with the same tokens.  A
prepared body therefore says the same past always in the same way, and says it so that llama-server
misplaces nothing:

1. Claude Code's attribution block is dropped: it differs between conversations.
2. ``cache_control`` is dropped: it moves from message to message.
3. Several system blocks are joined with an empty line; llama-server would join them with nothing.
4. Content is always a list of blocks; the client sends the same message in both shapes.
5. A ``system`` message inside the conversation belongs to the user turn before it, as a reminder.
6. Reminders beside tool results are appended to the last tool result.  As a user turn of their own
   they would make templates such as GLM's drop the thinking of the loop.
7. A user's own words beside tool results come after them, in a turn of their own; llama-server
   would put them before.

Each later request of a conversation only adds to the end (docs/prompt-cache.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gateway.wire.request import MessagesRequest

Json = Any

_ATTRIBUTION: Final = "x-anthropic-billing-header:"
_REMINDER: Final = "<system-reminder>"

#: What llama-server's ``/v1/messages`` takes over from a body (llama.cpp
#: `tools/server/server-chat.cpp`), beside ``system``, ``messages`` and ``tools``.
_PASSED_ON: Final = (
    "tool_choice",
    "stop_sequences",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "chat_template_kwargs",
    "thinking",
)


def prepare(request: MessagesRequest) -> dict[str, Json]:
    """
    The body that llama-server gets for `request`.

    The request's own body is not changed.  ``model`` and ``stream`` are not in it: the one means
    nothing to llama-server, the other is for who sends it.
    """
    body: dict[str, Json] = {}
    leading, messages = _messages(request)
    system = [text for text in request.system if not text.startswith(_ATTRIBUTION)] + leading
    if system:
        body["system"] = "\n\n".join(system)
    body["messages"] = messages
    if request.tools:
        body["tools"] = [_without_marks(tool) for tool in request.tools]
    for name in _PASSED_ON:
        if request.body.get(name) is not None:
            body[name] = request.body[name]
    if request.schema is not None and not request.tools:
        # The schema leaves no room to think.
        given = body.get("chat_template_kwargs") or {}
        body["chat_template_kwargs"] = {**given, "enable_thinking": False}
    return body


def _messages(request: MessagesRequest) -> tuple[list[str], list[Json]]:
    """The conversation, and the ``system`` texts that stand before its first turn."""
    leading: list[str] = []
    turns: list[Json] = []
    for message in request.messages:
        blocks = _blocks(message["content"])
        if message["role"] == "system":
            text = "\n\n".join(block["text"] for block in blocks if block["type"] == "text")
            if turns:
                _remind(turns, text)
            else:
                leading.append(text)
        elif message["role"] == "user":
            turns.extend(_user_turns(blocks))
        else:
            turns.append({"role": "assistant", "content": blocks})
    return leading, turns


def _blocks(content: str | list[Json]) -> list[Json]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_without_marks(block) for block in content]


def _without_marks(block: Mapping[str, Json]) -> dict[str, Json]:
    """A block without ``cache_control``, inside a tool result too."""
    clean = {key: value for key, value in block.items() if key != "cache_control"}
    if clean.get("type") == "tool_result":
        clean["content"] = _blocks(clean.get("content") or [])
    return clean


def _user_turns(blocks: list[Json]) -> list[Json]:
    """A user message as one turn, or as the tool results first and the user's own words after."""
    results = [block for block in blocks if block["type"] == "tool_result"]
    if not results:
        return [{"role": "user", "content": blocks}]
    words: list[Json] = []
    for block in blocks:
        if block["type"] == "tool_result":
            continue
        if block["type"] == "text" and block["text"].lstrip().startswith(_REMINDER):
            results[-1]["content"].append(_apart(block["text"]))
        else:
            words.append(block)
    turns = [{"role": "user", "content": results}]
    if words:
        turns.append({"role": "user", "content": words})
    return turns


def _remind(turns: list[Json], text: str) -> None:
    """Put a reminder to the end of the last user turn, opening one where there is none."""
    if not text.lstrip().startswith(_REMINDER):
        text = f"{_REMINDER}\n{text}\n</system-reminder>"
    if turns[-1]["role"] != "user":
        turns.append({"role": "user", "content": [{"type": "text", "text": text}]})
        return
    content = turns[-1]["content"]
    last = content[-1] if content else None
    if last is not None and last["type"] == "tool_result":
        last["content"].append(_apart(text))
    else:
        content.append(_apart(text))


def _apart(text: str) -> Json:
    """A text block that does not run into what stands before it."""
    return {"type": "text", "text": f"\n\n{text}"}
