"""
Recordings of real sessions, without what the client's makers wrote.

`Redactor` takes the prose out of what `tests.e2e.recorder` heard.  What stays is the shape: keys,
types, names, numbers, and the few words by which a call is known (`MARKS`).  Each other stretch of
a line becomes a placeholder, ``{123:1a2b3c}``: its length, and a hash of it.  Whoever is told by
an id or a path gets another one.

`recordings` makes requests of the fixtures again.  A placeholder becomes made-up words of its
length, the same for the same hash: equal lines are equal again, a text that began as another one
did does so again, and everything is as long as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any, Final

import attrs
import orjson

Json = Any

FOLDER: Final = Path(__file__).with_name("recordings")

#: What stays of a text, wherever it stands in it: the marks of calls, and of parts of prompts.
MARKS: Final = (
    # What a call is (docs/protocol.md, "What a call is").
    "You are Claude Code",
    "You are a Claude agent",
    "for Claude Code, Anthropic's official CLI",
    "You are naming a coding session",
    "Analyze if this message indicates",
    "You are evaluating a hook",
    "You are evaluating a stop-condition hook",
    "Based on the conversation transcript above",
    "You are a security monitor",
    "You are a file search specialist",
    "You are an agent",
    "You run a web search",
    "Perform a web search",
    "Web page content:",
    "CRITICAL: Respond with TEXT ONLY",
    "Your task is to create",
    "tasked with summarizing conversations",
    "The user stepped away and is coming back",
    "[SUGGESTION MODE",
    "Extract any file paths",
    "Your task is to process",
    "You are an expert at analyzing",
    "Files modified by user:",
    "Files modified by other users:",
    # What is volatile in a prompt, or has a place of its own.
    "# Environment",
    "Today's date is",
    "You are powered by the model",
    "gitStatus:",
    "[SYSTEM NOTIFICATION - NOT USER INPUT]",
    "The user sent a new message",
    "Result of calling the",
    "ARGUMENTS:",
    "Command:",
    "Output:",
)

#: What stays where it is a whole line.
LINES: Final = ("Hi", "foo", "---", "{", "}")

_TAGS: Final = (
    "system-reminder",
    "session",
    "block",
    "category",
    "reason",
    "thinking",
    "transcript",
    "user_claude_md",
    "policy_spec",
    "analysis",
    "summary",
    "filepaths",
    "task-notification",
    "tool_use_error",
    "local-command-caveat",
    "local-command-stdout",
    "command-name",
    "command-message",
    "command-args",
)

#: The block that names the client; its numbers belong to it.
_BILLING: Final = (
    r"x-anthropic-billing-header: cc_version=[\w.]+; cc_entrypoint=[\w-]+;"
    r"(?: cch=\w+;)?(?: cc_is_subagent=true;)?"
)

_KEPT: Final = re.compile(
    "|".join(
        [
            _BILLING,
            rf"</?(?:{'|'.join(_TAGS)})>",
            *(rf"(?<!\w){re.escape(mark)}(?!\w)" for mark in sorted(MARKS, key=len, reverse=True)),
        ]
    )
)

#: Signs without a letter or a digit, at both ends of a stretch: indents, rules, quotes.
_EDGES: Final = re.compile(r"(\W{0,12})(.*?)(\W{0,12})", re.DOTALL)

PLACEHOLDER: Final = re.compile(r"\{(=?)(\d+):([0-9a-f]{6})\}")

#: Keys whose value is a name out of a protocol, and no prose.
_NAMES: Final = frozenset(
    {"type", "role", "name", "model", "tool_name", "media_type", "effort", "display", "keep", "ttl"}
    | {"format", "$schema", "$ref", "enum", "required", "subagent_type", "permission_mode"}
    | {"stop_sequences", "platform", "scope"}
)

_NAME: Final = re.compile(r"[A-Za-z0-9_$#<>][A-Za-z0-9_.:/#$<>\-]{0,63}")

_IDS: Final = frozenset({"id", "tool_use_id", "user_id", "session_id", "agent_id", "signature"})

#: Such an id, or several of them in JSON.
_ID_VALUE: Final = re.compile(r'[\w{}":,.-]*')

#: A session, a tool's use, an agent or a device.
_ID: Final = re.compile(
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
    r"|toolu_\w+"
    r"|(?<![0-9a-f])[0-9a-f]{16,64}(?![0-9a-f])"
)

_BASE64: Final = re.compile(r"[A-Za-z0-9+/]{8,}={0,2}")

#: The headers that say something about a call.
_HEADERS: Final = re.compile(r"user-agent|anthropic-beta|anthropic-version|x-app|x-claude-code-.*")


#: A header's value: names and numbers, or the client's own name.
_HEADER: Final = re.compile(r"[\w.,/+*=;-]+|claude-cli/[\w.]+ \([\w, .-]+\)")


# --- one way: from a recording to a fixture -------------------------------------------------------


@attrs.define
class Redactor:
    """Takes the prose out of one recording; the same id becomes the same other id."""

    _known: dict[str, str] = attrs.field(factory=dict, init=False)

    def text(self, text: str) -> str:
        """`text` with marks and placeholders only."""
        return "\n".join(map(_line, text.split("\n")))

    def value(self, value: Json, key: str = "") -> Json:
        """A JSON value of the same shape; `key` is where it stands."""
        match value:
            case dict():
                return {_key(name): self.value(each, name) for name, each in value.items()}
            case list():
                return [self.value(each, key) for each in value]
            case str() if key in _IDS and _ID_VALUE.fullmatch(value):
                return self.identity(value)
            case str() if key in _NAMES and _NAME.fullmatch(value):
                return value
            case str() if key == "data" and _BASE64.fullmatch(value):
                return _solid(value)
            case str():
                return self.text(value)
        return value

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Those that say something about a call."""
        kept = {name: value for name, value in headers.items() if _HEADERS.fullmatch(name)}
        return {name: self.identity(value) for name, value in sorted(kept.items())}

    def identity(self, value: str) -> str:
        """`value` with other ids in it."""
        return _ID.sub(lambda found: self._other(found[0]), value)

    def _other(self, identity: str) -> str:
        if identity not in self._known:
            digits = f"{len(self._known) + 1:x}"
            start = "toolu_" if identity.startswith("toolu_") else ""
            zeros = re.sub(r"[^-]", "0", identity[len(start) :])
            self._known[identity] = start + zeros[: -len(digits)] + digits
        return self._known[identity]


def _key(name: str) -> str:
    """A key as it is, if it is a name; tools may have others in their arguments."""
    return name if _NAME.fullmatch(name) else _line(name)


def _line(line: str) -> str:
    if line.strip() in LINES:
        return line
    parts, at = [], 0
    for mark in _KEPT.finditer(line):
        parts += [_gap(line[at : mark.start()]), mark[0]]
        at = mark.end()
    return "".join([*parts, _gap(line[at:])])


def _gap(words: str) -> str:
    """What stands between two marks; signs at its ends stay, so that marks end where they did."""
    found = _EDGES.fullmatch(words)
    assert found is not None
    start, middle, end = found.groups()
    return f"{start}{{{len(middle)}:{_hash(middle)}}}{end}" if middle else start + end


def _solid(data: str) -> str:
    """Data that has no words."""
    return f"{{={len(data)}:{_hash(data)}}}"


def _hash(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=3).hexdigest()


# --- the fixture ----------------------------------------------------------------------------------


@attrs.frozen
class Call:
    """
    One call of a recorded session.

    Attributes:
        step: what was done when it came.
        kind: what it is.
        path: with its query.
        headers: names in lower case.
        body: of the request.
    """

    step: str
    kind: str
    path: str
    headers: Mapping[str, str]
    body: Json


#: What occurs again and again, by the first letter of its names.
_TABLES: Final = ("headers", "fields", "systems", "tools", "kits", "messages")


def fixture(client: str, sessions: Mapping[str, Sequence[Call]]) -> Json:
    """The fixture of a recording: what occurs again and again stands in it once."""
    redactor = Redactor()
    tables = {name: _Table(name[0]) for name in _TABLES}

    def told(call: Call) -> Json:
        body = redactor.value(call.body)
        line = {"step": call.step, "kind": call.kind, "path": call.path}
        line["headers"] = tables["headers"].put(redactor.headers(call.headers))
        if "system" in body:
            line["system"] = tables["systems"].put(body.pop("system"))
        if "tools" in body:
            kit = [tables["tools"].put(tool) for tool in body.pop("tools")]
            line["kit"] = tables["kits"].put(" ".join(kit))
        messages = " ".join(tables["messages"].put(each) for each in body.pop("messages"))
        return {**line, "fields": tables["fields"].put(body), "messages": messages}

    calls = [{"name": name, "calls": [told(each) for each in of]} for name, of in sessions.items()]
    return {
        "client": client,
        **{name: each.rows for name, each in tables.items()},
        "sessions": calls,
    }


@attrs.define
class _Table:
    """Values, each once, under a name."""

    letter: str
    rows: dict[str, Json] = attrs.field(factory=dict, init=False)
    _names: dict[bytes, str] = attrs.field(factory=dict, init=False)

    def put(self, value: Json) -> str:
        raw = orjson.dumps(value)
        if raw not in self._names:
            self._names[raw] = f"{self.letter}{len(self._names) + 1}"
            self.rows[self._names[raw]] = value
        return self._names[raw]


def written(made: Json) -> str:
    """A fixture as its file has it: a line for each call and for each value of a table."""
    lines = ["{", f'"client": {_json(made["client"])},']
    for name in _TABLES:
        rows = [f" {_json(key)}: {_json(value)}" for key, value in made[name].items()]
        lines += [f'"{name}": {{', ",\n".join(rows), "},"]
    sessions = []
    for session in made["sessions"]:
        calls = ",\n".join(f"  {_json(call)}" for call in session["calls"])
        sessions.append(f' {{"name": {_json(session["name"])}, "calls": [\n{calls}\n ]}}')
    return "\n".join([*lines, '"sessions": [', ",\n".join(sessions), "]", "}", ""])


def _json(value: Json) -> str:
    return orjson.dumps(value).decode()


# --- and back: from a fixture to requests ---------------------------------------------------------


@attrs.frozen
class Session:
    """The calls of one session, in the order in which they came."""

    name: str
    calls: Sequence[Call]


@attrs.frozen
class Recording:
    """What one version of the client did."""

    client: str
    sessions: Sequence[Session]

    @property
    def calls(self) -> Sequence[Call]:
        return [call for session in self.sessions for call in session.calls]

    def session(self, name: str) -> Session:
        """The session of this name."""
        return next(session for session in self.sessions if session.name == name)


@cache
def recordings() -> Sequence[Recording]:
    """All that there are.  Nobody may change what is in them."""
    return [
        expanded(orjson.loads(path.read_bytes()))
        for path in sorted(FOLDER.glob("claude-code-*.json"))
    ]


def recording(client: str) -> Recording:
    """That of one version of the client."""
    return next(each for each in recordings() if each.client == client)


def expanded(made: Json) -> Recording:
    """The recording that a fixture was made of, in other words."""
    sessions = [
        Session(session["name"], [_call(made, call) for call in session["calls"]])
        for session in made["sessions"]
    ]
    return Recording(made["client"], sessions)


def _call(made: Json, call: Json) -> Call:
    body = dict(made["fields"][call["fields"]])
    if "system" in call:
        body["system"] = made["systems"][call["system"]]
    if "kit" in call:
        body["tools"] = [made["tools"][name] for name in made["kits"][call["kit"]].split()]
    body["messages"] = [made["messages"][name] for name in call["messages"].split()]
    headers = made["headers"][call["headers"]]
    return Call(call["step"], call["kind"], call["path"], headers, filled(body))


def filled(value: Json) -> Json:
    """A redacted value with words in the place of its placeholders."""
    match value:
        case dict():
            return {filled(key): filled(each) for key, each in value.items()}
        case list():
            return [filled(each) for each in value]
        case str():
            return PLACEHOLDER.sub(_fill, value)
    return value


def _fill(found: re.Match[str]) -> str:
    return filler(int(found[2]), found[3], "" if found[1] else " ")


@cache
def filler(length: int, seed: str, between: str = " ") -> str:
    """Made-up words, `length` characters of them."""
    chosen = Random(seed)
    text = ""
    while len(text) < length:
        syllables = chosen.choices(SYLLABLES, k=chosen.choice((1, 1, 2, 2, 2, 3, 3, 4)))
        text += "".join(syllables) + between
    text = text[:length]
    return text if not text.endswith(" ") else text[:-1] + "a"


SYLLABLES: Final = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]


# --- what is left of the client's words -----------------------------------------------------------


def prose(made: Json) -> Iterator[str]:
    """Every string of a fixture that has words beside placeholders, marks and names."""
    for table in ("fields", "systems", "tools", "messages"):
        yield from _prose(made.get(table, {}))
    for headers in made.get("headers", {}).values():
        yield from (value for value in headers.values() if not _HEADER.fullmatch(value))


def _prose(value: Json, key: str = "") -> Iterator[str]:
    match value:
        case dict():
            for name, each in value.items():
                if not _NAME.fullmatch(name) and not _is_empty(name):
                    yield name
                yield from _prose(each, name)
        case list():
            for each in value:
                yield from _prose(each, key)
        case str():
            is_name = key in _NAMES and _NAME.fullmatch(value)
            is_id = key in _IDS and _ID_VALUE.fullmatch(value)
            if not is_name and not is_id and not _is_empty(value):
                yield value


def _is_empty(text: str) -> bool:
    """Whether nothing is in it but placeholders and marks."""
    rest = (
        "" if line.strip() in LINES else _KEPT.sub("", PLACEHOLDER.sub("", line))
        for line in text.split("\n")
    )
    return not any(re.search(r"\w", each) for each in rest)


def marks(value: Json) -> frozenset[str]:
    """The marks in a value, redacted or not."""
    match value:
        case dict():
            return frozenset().union(*map(marks, value.values()))
        case list():
            return frozenset().union(*map(marks, value))
        case str():
            found = (mark[0] for line in value.split("\n") for mark in _KEPT.finditer(line))
            # The billing block has numbers in it that differ each time.
            return frozenset(mark.partition(": cc_version")[0] for mark in found)
    return frozenset()
