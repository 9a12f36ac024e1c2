"""What the doctor finds of Claude Code, and of the settings that it would use by itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Final

from gateway.commands.claude import Source
from gateway.commands.doctor.facts import Facts
from gateway.commands.doctor.finding import Finding, Say
from gateway.policy.routes import MAIN

#: Where no setting is.
_NOWHERE: Final[tuple[str, Source | None]] = ("", None)

#: The oldest client that was seen to work.
_CLIENT: Final = (2, 1, 36)

#: Variables that keep Claude Code from compacting a conversation.
_NO_COMPACTION: Final = (
    "DISABLE_AUTO_COMPACT",
    "DISABLE_COMPACT",
    "CLAUDE_CODE_DISABLE_UNKNOWN_MODEL_WINDOW_ENFORCEMENT",
)


def client(facts: Facts, say: Say) -> Iterator[Finding]:
    """Whether there is a client, and new enough."""
    if facts.client.program is None:
        yield say(
            "warning",
            "Claude Code is not on the PATH",
            "Run: `npm install -g @anthropic-ai/claude-code`",
        )
        return
    shown = facts.client.version
    parts = tuple(int(part) for part in shown.split(" ")[0].split(".") if part.isdecimal())
    if not parts:
        yield say(
            "warning",
            f"{facts.client.program} does not say its version",
            f"See what it says: `{shlex.quote(facts.client.program)} --version`",
        )
    elif parts < _CLIENT:
        yield say("warning", f"Claude Code {shown} is too old", "Run: `claude update`")
    else:
        yield say("ok", f"Claude Code {shown}")


def settings(facts: Facts, say: Say) -> Iterator[Finding]:
    """Whether the settings that the client would use of itself lead here, and keep it well."""
    if not facts.url:
        return
    path = shlex.quote(str(facts.path))
    by_name: dict[str, tuple[str, Source]] = {}
    for source in facts.client.sources:
        by_name |= {name: (value, source) for name, value in source.env.items()}
    url, where = by_name.get("ANTHROPIC_BASE_URL") or _NOWHERE
    start = (
        f"Start it with `claudegw claude --config {path}`, or put into its settings what"
        f" `claudegw settings --config {path}` prints"
    )
    if str(url).rstrip("/") not in _names_of(facts.url):
        managed = where is not None and where.managed
        yield say(
            "problem" if managed else "warning",
            f"Claude Code by itself would ask {url or 'Anthropic'}, not this gateway"
            + (f" ({where.name})" if where else ""),
            f"Ask who manages this machine to take ANTHROPIC_BASE_URL out of {where.name}"
            if managed and where
            else start,
        )
        return
    wrong = list(_compaction(facts, by_name, say))
    yield from wrong
    for variable, least in (
        ("API_TIMEOUT_MS", 600_000),
        ("CLAUDE_STREAM_IDLE_TIMEOUT_MS", 300_000),
    ):
        said, place = by_name.get(variable) or _NOWHERE
        if place and str(said).isdecimal() and int(said) < least:
            wrong.append(say("warning", *_change(variable, str(said), "3600000", place)))
            yield wrong[-1]
    if not wrong:
        yield say("ok", f"Claude Code asks {url}")


def _compaction(
    facts: Facts, by_name: Mapping[str, tuple[str, Source]], say: Say
) -> Iterator[Finding]:
    """Whether a conversation is compacted before the window is full."""
    for name in _NO_COMPACTION:
        if name in by_name and by_name[name][0]:
            yield say(
                "problem",
                f"{name} in {by_name[name][1].name}: a conversation ends when the window is full",
                f"Remove `{name}` from {by_name[name][1].name}",
            )
    for source in facts.client.sources:
        if source.settings.get("autoCompactEnabled") is False:
            yield say(
                "problem",
                f"autoCompactEnabled in {source.name}: a conversation ends when the window is full",
                f"Remove `autoCompactEnabled` from {source.name}",
            )
    window = next((tier.window for tier in facts.tiers if tier.name == MAIN), 0)
    name = "CLAUDE_CODE_MAX_CONTEXT_TOKENS"
    value, source = by_name.get(name) or ("", by_name["ANTHROPIC_BASE_URL"][1])
    known = int(value) if str(value).isdecimal() else 0
    if window and not 0 < known <= window:
        yield say("problem", *_change(name, str(value), str(window), source))


def _change(name: str, value: str, wanted: str, source: Source) -> tuple[str, str]:
    found = f"{name} is {value or 'not set'} in {source.name}, and should be {wanted}"
    return found, f"Set `{name}` to `{wanted}` under env in {source.name}"


def _names_of(url: str) -> tuple[str, ...]:
    return url, url.replace("127.0.0.1", "localhost")
