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
8. The opening turn goes from what changes least to what changes most: what ``system`` messages say
   of the place, its agents and skills, then the user's instructions, then other reminders, then
   those that change from session to session, then the user's words.  So a second session in the
   same folder shares all but the end.
9. What the system prompt says of the folder and of the repository's state becomes such reminders:
   there the next folder, or the next commit, would take along all that stands behind it, in many
   templates the tools too.  Claude Code itself says it now here, now there.
10. Tools stand in an order that a later request only adds to, and that begins alike for agents
    (`gateway.policy.tools`); blocks are said in one way (`gateway.policy.blocks`), and so are
    switches (`gateway.policy.template`).

Each later request of a conversation only adds to the end (docs/prompt-cache.md).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gateway.policy import template as templates
from gateway.policy import tools
from gateway.policy.blocks import told
from gateway.policy.template import Template
from gateway.wire.request import MessagesRequest

Json = Any

_ATTRIBUTION: Final = "x-anthropic-billing-header:"
_REMINDER: Final = "<system-reminder>"

#: Marks a reminder that is the same for every session in a folder, before and after a summary.
_OF_THIS_FOLDER: Final = "Codebase and user instructions"

#: Marks a reminder that changes with every commit or session (docs/protocol.md).
_OF_THIS_SESSION: Final = "gitStatus"

#: Passages of Claude Code's system prompts that name a folder: its memory, and in older clients
#: its environment.  Each begins with plain words, which `re` finds many times faster than the
#: beginning of a line; that they stand at one is looked at behind them.
_FOLDERS: Final = (
    re.compile(
        r"# (?<=^# )(?:auto )?[Mm]emory\n\n"
        r"You have a persistent [^`\n]*`[^`\n]+`.*?(?=^# |\Z)",
        re.MULTILINE | re.DOTALL,
    ),
    re.compile(
        r"Here is useful (?<=^Here is useful )information about the environment[^\n]*\n<env>\n"
        # Line by line up to its end or the next one's beginning: however often it begins, one look.
        r"(?:(?!</env>|Here is useful information about the environment)[^\n]*\n)*+</env>(?:\n|\Z)",
        re.MULTILINE,
    ),
)

#: How older clients end their system prompts.
_STATE: Final = (
    re.compile(r"gitStatus: (?<=^gitStatus: )This is the git status.*", re.MULTILINE | re.DOTALL),
)

#: What llama-server's ``/v1/messages`` takes over from a body as it is (llama.cpp
#: `tools/server/server-chat.cpp`).
_PASSED_ON: Final = ("stop_sequences", "max_tokens", "temperature", "top_p", "top_k")


def prepare(request: MessagesRequest, template: Template) -> dict[str, Json]:
    """
    The body that a llama-server with `template` gets for `request`.

    The request's own body is not changed.  ``model`` and ``stream`` are not in it: the one means
    nothing to llama-server, the other is for who sends it.

    Raises:
        ApiError: 400, nobody here can do what is asked for.
    """
    body: dict[str, Json] = {}
    system, messages = _messages(request, template)
    if system:
        body["system"] = "\n\n".join(system)
    body["messages"] = messages
    offered, choice = tools.offered(request)
    if offered:
        body["tools"] = offered
        if choice is not None:
            body["tool_choice"] = choice
    for name in _PASSED_ON:
        if request.body.get(name) is not None:
            body[name] = request.body[name]
    thinking = request.body.get("thinking") or {}
    if thinking.get("type") == "enabled":
        body["thinking"] = thinking  # its budget is all that llama-server reads
    switches = templates.switches(request, template)
    if switches:
        body["chat_template_kwargs"] = switches
    return body


def _messages(request: MessagesRequest, template: Template) -> tuple[list[str], list[Json]]:
    """The system texts, those before the first turn included, and the conversation."""
    system = [text for text in request.system if text and not text.startswith(_ATTRIBUTION)]
    said = deque(
        (message["role"], told(message["content"], template)) for message in request.messages
    )
    while said[0][0] == "system":
        system.append(_joined(said.popleft()[1]))
    turns: list[Json] = []
    if said[0][0] == "user" and not _results(said[0][1]):
        _, blocks = said.popleft()
        places = _taken_out(system, _FOLDERS)
        state = _taken_out(system, _STATE)
        while said and said[0][0] == "system":
            places.append(_reminder(_joined(said.popleft()[1])))
        turns.append({"role": "user", "content": _opening(blocks, places, state)})
    for role, blocks in said:
        if role == "system":
            _remind(turns, _reminder(_joined(blocks)))
        elif role == "user":
            turns.extend(_user_turns(blocks))
        else:
            turns.append({"role": "assistant", "content": blocks})
    return system, turns


def _taken_out(system: list[str], passages: Sequence[re.Pattern[str]]) -> list[str]:
    """What `passages` find in these texts, as reminders; the texts do without it from now on."""
    found: list[str] = []
    for passage in passages:
        for text in system:
            found += passage.findall(text)
        if found:
            rest = (passage.sub("", text).rstrip() for text in system)
            system[:] = [text for text in rest if text]
    return [_reminder(each.strip()) for each in found]


def _opening(blocks: list[Json], places: list[str], state: list[str]) -> list[Json]:
    """The blocks of the first turn, what `places` say beside it and the `state`: rules 8 and 9."""
    reminders = [*(block for block in blocks if _is_reminder(block)), *map(_text, state)]
    if not reminders and not places:
        return blocks
    reminders.sort(key=_how_soon_it_changes)
    words = [block for block in blocks if not _is_reminder(block)]
    first, *others = [*map(_text, places), *reminders, *words]
    return [
        first,
        *(_apart(block["text"]) if block["type"] == "text" else block for block in others),
    ]


def _user_turns(blocks: list[Json]) -> list[Json]:
    """A user message as one turn, or as the tool results first and the user's own words after."""
    results = _results(blocks)
    if not results:
        return [{"role": "user", "content": blocks}]
    words: list[Json] = []
    for block in blocks:
        if _is_reminder(block):
            results[-1]["content"].append(_apart(block["text"]))
        elif block["type"] != "tool_result":
            words.append(block)
    turns = [{"role": "user", "content": results}]
    if words:
        turns.append({"role": "user", "content": words})
    return turns


def _remind(turns: list[Json], reminder: str) -> None:
    """Put a reminder to the end of the last user turn, opening one where there is none."""
    if not turns or turns[-1]["role"] != "user":
        turns.append({"role": "user", "content": [_text(reminder)]})
        return
    content = turns[-1]["content"]
    last = content[-1] if content else None
    if last is not None and last["type"] == "tool_result":
        last["content"].append(_apart(reminder))
    else:
        content.append(_apart(reminder))


# --- blocks ---------------------------------------------------------------------------------------


def _results(blocks: Sequence[Json]) -> list[Json]:
    return [block for block in blocks if block["type"] == "tool_result"]


def _is_reminder(block: Mapping[str, Json]) -> bool:
    return block["type"] == "text" and str(block["text"]).lstrip().startswith(_REMINDER)


def _how_soon_it_changes(reminder: Json) -> int:
    """Of a reminder in the opening turn, the later the sooner."""
    text: str = reminder["text"]
    if _OF_THIS_SESSION in text:
        return 2
    return 0 if _OF_THIS_FOLDER in text else 1


def _joined(blocks: Sequence[Json]) -> str:
    return "\n\n".join(block["text"] for block in blocks if block["type"] == "text")


def _reminder(text: str) -> str:
    """A `system` text as a reminder, unless it says already that it is one."""
    if text.lstrip().startswith(_REMINDER):
        return text
    return f"{_REMINDER}\n{text}\n</system-reminder>"


def _text(text: str) -> Json:
    return {"type": "text", "text": text}


def _apart(text: str) -> Json:
    """A text block that does not run into what stands before it."""
    return _text(f"\n\n{text}")
