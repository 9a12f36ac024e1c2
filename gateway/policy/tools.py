"""
The tools that a model is offered.

1. First stand those that Claude Code gives its agents too, then all others, each in an order of
   their own: the client puts a new one anywhere, and the tools of an agent are the main
   conversation's without some.  So both begin with the same tools.
2. Tools that were loaded late (``defer_loading``) stand after all others, in the order in which the
   conversation loaded them, so that a further one only adds to the end.  The placeholder that the
   client sends for them is dropped.
3. A named ``tool_choice`` offers that tool alone and asks for any; ``none`` offers none.
   llama-server enforces neither otherwise.
4. Tools that Anthropic runs itself are dropped; nobody here can run them.  A call that has no
   others is refused: an answer without the tool would pass for one.
5. Tools that Anthropic defined and the client runs get their published schema.
6. Examples of inputs become a part of the description.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import orjson

from gateway.wire.errors import invalid
from gateway.wire.request import MessagesRequest

Json = Any

#: What Claude Code offers in place of the tools that are still to be loaded.
_PLACEHOLDER: Final = "DeferredToolPlaceholder"

#: What agents of Claude Code are given, from what each of them has to what the fewest have (2.1.36
#: to 2.1.331: the summary of the older one, agents that only search, then those that do anything).
#: Those of the web come last among what all have: their words change with the month, and with
#: whether tools are loaded late.
_OF_AGENTS: Final = {
    name: place
    for place, name in enumerate(
        (
            *("Read", "Bash", "Glob", "Grep", "Skill"),
            *("TaskCreate", "TaskGet", "TaskList", "TaskUpdate"),
            *("EnterWorktree", "ExitWorktree", "Monitor", "SendMessage"),
            *("WebFetch", "WebSearch"),
            *("Edit", "NotebookEdit", "Write", "Agent", "TaskStop"),
        )
    )
}

_TEXT: Final = {"type": "string"}
_NUMBER: Final = {"type": "integer"}
_LINES: Final = {"type": "array", "items": _NUMBER}

#: What tools that change text files take, beside their command.
_EDITING: Final[Mapping[str, Json]] = {
    "path": _TEXT,
    "view_range": _LINES,
    "file_text": _TEXT,
    "old_str": _TEXT,
    "new_str": _TEXT,
    "insert_line": _NUMBER,
    "insert_text": _TEXT,
}


def _commands(*names: str) -> Json:
    return {"type": "string", "enum": list(names)}


def _object(required: Sequence[str], properties: Mapping[str, Json]) -> Json:
    return {"type": "object", "properties": properties, "required": list(required)}


#: The beginning of a type -> what the model is told of it
#: (https://docs.anthropic.com/en/docs/agents-and-tools/tool-use).
_CLIENT_SIDE: Final[Mapping[str, tuple[str, Json]]] = {
    "bash_": (
        "Runs a command in a shell that stays open between the calls.",
        _object((), {"command": _TEXT, "restart": {"type": "boolean"}}),
    ),
    "text_editor_": (
        "Shows, creates and changes text files.",
        _object(
            ("command", "path"),
            {"command": _commands("view", "create", "str_replace", "insert"), **_EDITING},
        ),
    ),
    "memory_": (
        "Keeps notes in files under /memories that outlive the conversation.",
        _object(
            ("command",),
            {
                "command": _commands("view", "create", "str_replace", "insert", "delete", "rename"),
                **_EDITING,
                "old_path": _TEXT,
                "new_path": _TEXT,
            },
        ),
    ),
}


def offered(request: MessagesRequest) -> tuple[list[Json], Json | None]:
    """
    The tools and the ``tool_choice`` that llama-server gets.

    Raises:
        ApiError: 400, all tools are run by Anthropic.
    """
    choice = request.body.get("tool_choice")
    kind = (choice or {}).get("type")
    usable = list(_usable(request))
    if request.tools and not usable:
        names = ", ".join(sorted(tool["name"] for tool in request.tools))
        raise invalid(
            f"tools: only Anthropic's own servers can run {names}; offer tools of your own,"
            " and in Claude Code deny WebSearch in the permissions"
        )
    if kind == "none":
        return [], None
    if kind == "tool":
        assert choice is not None
        return [tool for tool in usable if tool["name"] == choice["name"]], {"type": "any"}
    return usable, choice


def takes_one_call(request: MessagesRequest) -> bool:
    """Whether the answer may hold one tool call at most; llama-server does not know this."""
    choice = request.body.get("tool_choice") or {}
    return choice.get("disable_parallel_tool_use") is True


def _usable(request: MessagesRequest) -> Iterator[Json]:
    loaded = {name: place for place, name in enumerate(_loaded(request))}

    def place(tool: Mapping[str, Json]) -> tuple[int, int, str]:
        name = tool["name"]
        if tool.get("defer_loading"):
            return 1, loaded.get(name, len(loaded)), name
        return 0, _OF_AGENTS.get(name, len(_OF_AGENTS)), name

    for tool in sorted(request.tools, key=place):
        if tool["name"] == _PLACEHOLDER:
            continue
        known = _known(tool)
        if known is not None:
            yield known


def _known(tool: Mapping[str, Json]) -> Json | None:
    """A tool as llama-server takes it, or None where nobody here can run it."""
    kind = tool.get("type") or "custom"
    if kind == "custom":
        described = tool.get("description") or ""
        if tool.get("input_examples"):
            examples = orjson.dumps(tool["input_examples"]).decode()
            described = f"{described}\n\nExamples of inputs: {examples}"
        return {
            "name": tool["name"],
            "description": described,
            "input_schema": tool["input_schema"],
        }
    for prefix, (described, schema) in _CLIENT_SIDE.items():
        if kind.startswith(prefix):
            return {"name": tool["name"], "description": described, "input_schema": schema}
    return None


def _loaded(request: MessagesRequest) -> Iterator[str]:
    """The names of tools that the conversation loaded, in its order, each once."""
    names: dict[str, None] = {}
    for message in request.messages:
        if isinstance(message["content"], list):
            for block in message["content"]:
                names.update(dict.fromkeys(_references(block)))
    yield from names


def _references(block: Mapping[str, Json]) -> Iterator[str]:
    match block["type"]:
        case "tool_reference":
            yield block["tool_name"]
        case "tool_addition":
            yield block["tool"]["name"]
        case "tool_result" if isinstance(block.get("content"), list):
            for part in block["content"]:
                yield from _references(part)
