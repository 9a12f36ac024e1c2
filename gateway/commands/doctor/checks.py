"""
What the doctor finds: pure functions over `Facts`, in one table.

Each says what it saw, and of what is wrong, how to mend it.  A remedy names a change of the
configuration as ``Set `key = value` in [table]`` and a command in back quotes as it is typed.
``problem`` means that Claude Code would not work; a ``warning`` costs time, room or safety.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from gateway.commands.doctor.facts import MARK, Facts, Source, TierFacts, mapping, number
from gateway.commands.settings import compacts_at
from gateway.config import MIB
from gateway.daemon import longest_stop
from gateway.policy.routes import MAIN

Json = Any
Status = Literal["ok", "warning", "problem", "skipped"]

#: The oldest Python that we run on.
_PYTHON: Final = (3, 11)

#: Tokens that Claude Code says by itself before its user says anything, and a window for work.
_PROMPT: Final = 24_000
_WINDOW: Final = 65_536

#: Seconds after which Claude Code gives up on mere pings, on silence, and without a status; and
#: how early the gateway must be.
_PINGS: Final = 600.0
_EARLY: Final = 30.0

#: Bytes that a disk should have left beside the snapshots.
_ROOM: Final = 1024 * MIB

#: The oldest client that was seen to work.
_CLIENT: Final = (2, 1, 36)

#: What the lack of a flag costs.
_COSTS: Final[Mapping[str, str]] = {
    "--slot-prompt-similarity": "a subagent takes the main conversation's slot over, and the end"
    " of that conversation is evaluated again",
    "--slot-save-path": "the slot is not saved, and after each start the first prompt is evaluated"
    " whole",
    "--cache-ram": "a conversation larger than 8 GiB is dropped when another takes the slot",
    "--sse-ping-interval": "for half a minute nothing tells a server that works from one that hangs",
}

#: Variables that keep Claude Code from compacting a conversation.
_NO_COMPACTION: Final = (
    "DISABLE_AUTO_COMPACT",
    "DISABLE_COMPACT",
    "CLAUDE_CODE_DISABLE_UNKNOWN_MODEL_WINDOW_ENFORCEMENT",
)


@attrs.frozen
class Finding:
    """
    What one look found.

    Attributes:
        check: its name; that of a tier's begins with the tier's.
        status: ``problem`` where Claude Code would not work.
        found: what was seen.
        remedy: what mends it; "" where nothing is wrong.
    """

    check: str
    status: Status
    found: str
    remedy: str = ""


Say = Callable[..., Finding]


def findings(facts: Facts) -> list[Finding]:
    """All that is found, in the order of the table."""
    found = [each for name, check in _CHECKS for each in check(facts, partial(Finding, name))]
    for tier in facts.tiers:
        for name, look in _TIER_CHECKS:
            found += look(facts, tier, partial(Finding, f"{tier.name}.{name}"))
    return found


def would_work(found: list[Finding]) -> bool:
    """Whether Claude Code would work."""
    return all(each.status != "problem" for each in found)


# --- the house ------------------------------------------------------------------------------------


def _python(facts: Facts, say: Say) -> Iterator[Finding]:
    shown = ".".join(map(str, facts.python))
    if facts.python < _PYTHON:
        yield say("problem", f"Python {shown}", "Install Python 3.11 or newer, and claudegw in it.")
    else:
        yield say("ok", f"Python {shown}")


def _packages(facts: Facts, say: Say) -> Iterator[Finding]:
    wrong = [each for each in facts.packages if not each.will_do]
    for each in wrong:
        there = f"version {each.found}" if each.found else "missing"
        wanted = shlex.quote(f"{each.name}{each.wanted}")
        yield say("problem", f"{each.name} is {there}", f"Run: `python -m pip install {wanted}`")
    if not wrong:
        yield say("ok", f"all {len(facts.packages)} that claudegw needs")


def _config(facts: Facts, say: Say) -> Iterator[Finding]:
    path = shlex.quote(str(facts.path))
    if facts.config is not None:
        yield say("ok", str(facts.path))
    elif not facts.path.exists():
        yield say(
            "problem",
            f"{facts.path} is not there",
            f"Run: `cp etc/gw.toml {path}` in claudegw's folder and adapt it, or say where yours is"
            " with --config FILE",
        )
    else:
        for mistake in facts.mistakes:
            key, _, _ = mistake.partition(":")
            what = "Remove that key" if "unknown key" in mistake else f"Correct {key}"
            yield say("problem", mistake, f"{what} in {path}; etc/gw.toml explains every key")


def _token(facts: Facts, say: Say) -> Iterator[Finding]:
    config = facts.config
    if config is None:
        return
    secrets = config.gateway.token, *(tier.api_key for tier in config.tier.values())
    if any(secrets) and facts.mode & 0o077:
        yield say(
            "warning",
            f"others on this machine can read the keys in {facts.path} (mode {facts.mode:04o})",
            f"Run: `chmod 600 {shlex.quote(str(facts.path))}`",
        )
    elif config.gateway.token is None:
        yield say("ok", "none is needed: the gateway listens on loopback alone")
    else:
        yield say("ok", "there is one, and nobody else can read it")


def _state(facts: Facts, say: Say) -> Iterator[Finding]:
    for folder in facts.state:
        path = shlex.quote(str(folder.path))
        if not folder.exists:
            yield say("ok", f"{folder.path} will be made at the start")
        elif not folder.writable:
            yield say(
                "problem" if folder is facts.state[0] else "warning",
                f"{folder.path} cannot be written to (mode {folder.mode:04o}): nothing is saved",
                f"Run: `chmod 700 {path}`",
            )
        elif folder.mode & 0o077:
            yield say(
                "warning",
                f"others can look into {folder.path} (mode {folder.mode:04o}), where prompts lie",
                f"Run: `chmod 700 {path}`",
            )
        else:
            yield say("ok", str(folder.path))


def _disk(facts: Facts, say: Say) -> Iterator[Finding]:
    if facts.config is None:
        return
    budget, free = facts.config.gateway.snapshot_budget, facts.free // MIB
    used = sum(
        number(mapping(tier.status.get("cache")).get("snapshot_bytes")) for tier in facts.tiers
    )
    fits = max(0, (facts.free + used - _ROOM) // MIB)
    if budget > fits:
        yield say(
            "warning",
            f"{free} MiB are free, and saved slots may take {budget} MiB",
            f"Set `snapshot_budget = {fits}` in [gateway], or make room on that disk",
        )
    else:
        yield say("ok", f"{free} MiB are free")


def _gateway(facts: Facts, say: Say) -> Iterator[Finding]:
    if facts.config is None:
        yield say("skipped", "the configuration cannot be read")
        return
    path = shlex.quote(str(facts.path))
    other = f'Set `listen = "tcp:{facts.free_port}:interface=127.0.0.1"` in [gateway]'
    if facts.no_url:
        yield say("problem", facts.no_url, other)
    elif facts.listener is None:
        yield say(
            "problem",
            f"nobody listens at {facts.url}",
            f"Start the gateway: `twistd -n claudegw --config {path}`",
        )
    elif facts.is_up:
        yield say("ok", f"claudegw {mapping(facts.status.said).get('version')} at {facts.url}")
    elif facts.status.status == 401:
        yield say(
            "problem",
            f"what runs at {facts.url} wants another token than {facts.path} has",
            "Restart the gateway with this configuration, or name its own with --config FILE",
        )
    else:
        who = _who(facts.listener.name, facts.listener.pid)
        yield say(
            "problem",
            f"the port of {facts.url} is taken by {who}, which is no claudegw",
            f"End it, or: {other}; then start the gateway: `twistd -n claudegw --config {path}`",
        )


def _clocks(facts: Facts, say: Say) -> Iterator[Finding]:
    if facts.config is None:
        return
    fine = True
    if (after := facts.config.gateway.start_after) > _PINGS - _EARLY:
        fine = False
        yield say(
            "warning",
            f"answers are begun after {after:.0f} s, and Claude Code gives up at {_PINGS:.0f} s:"
            " a long prefill can be lost",
            "Set `start_after = 500` in [gateway]",
        )
    for name, tier in facts.config.tier.items():
        if tier.startup_patience < 60:
            fine = False
            yield say(
                "warning",
                f"tier {name} waits {tier.startup_patience:.0f} s for a server that loads: calls"
                " fail at each start",
                f"Set `startup_patience = 900` in [tier.{name}]",
            )
    if fine:
        yield say("ok", f"answers are begun after {after:.0f} s, before Claude Code gives up")


def _grace(facts: Facts, say: Say) -> Iterator[Finding]:
    if facts.config is None or not (facts.agent or facts.unit):
        return
    needs = ceil(longest_stop(facts.config.longest_grace))
    path = shlex.quote(str(facts.path))
    if facts.agent and number(facts.agent.get("ExitTimeOut")) < needs:
        yield say(
            "warning",
            f"launchd kills the gateway {number(facts.agent.get('ExitTimeOut'))} s after it is told"
            f" to stop, and it may need {needs} s",
            f"Run: `claudegw launchd --install --config {path}`",
        )
    elif facts.unit and "Type=notify" not in facts.unit:
        yield say(
            "warning",
            f"systemd is not told that the gateway may need {needs} s to stop",
            "Take Type=notify and TimeoutStopSec from etc/systemd/claudegw.service",
        )
    else:
        yield say("ok", f"the gateway gets the {needs} s that it may need to stop")


# --- the client -----------------------------------------------------------------------------------


def _client(facts: Facts, say: Say) -> Iterator[Finding]:
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


def _settings(facts: Facts, say: Say) -> Iterator[Finding]:
    """Whether the settings that the client would use of itself lead here, and keep it well."""
    if not facts.url:
        return
    path = shlex.quote(str(facts.path))
    by_name: dict[str, tuple[str, Source]] = {}
    for source in facts.client.sources:
        by_name |= {name: (value, source) for name, value in source.env.items()}
    url, where = by_name.get("ANTHROPIC_BASE_URL", ("", None))
    start = f"`claudegw settings --config {path}` prints what belongs into its settings"
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
    for name, least in (("API_TIMEOUT_MS", 600_000), ("CLAUDE_STREAM_IDLE_TIMEOUT_MS", 300_000)):
        value, source = by_name.get(name, ("", None))
        if source is not None and str(value).isdecimal() and int(value) < least:
            wrong.append(say("warning", *_change(name, str(value), "3600000", source)))
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
    value, source = by_name.get(name, ("", by_name["ANTHROPIC_BASE_URL"][1]))
    known = int(value) if str(value).isdecimal() else 0
    if window and not 0 < known <= window:
        yield say("problem", *_change(name, str(value), str(window), source))


def _change(name: str, value: str, wanted: str, source: Source) -> tuple[str, str]:
    found = f"{name} is {value or 'not set'} in {source.name}, and should be {wanted}"
    return found, f"Set `{name}` to `{wanted}` under env in {source.name}"


def _names_of(url: str) -> tuple[str, ...]:
    return url, url.replace("127.0.0.1", "localhost")


# --- a tier ---------------------------------------------------------------------------------------


def _server(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    url = tier.config.url
    build = mapping(tier.props.said).get("build_info")
    if tier.is_llama:
        yield say("ok", f"llama-server, build {build}, at {url}")
    elif tier.is_loading:
        yield say("warning", f"the server at {url} loads its model", "Wait, then look again")
    elif tier.listener is None and tier.props.status == 0:
        yield say("problem", f"no server answers at {url}", _start(facts, tier))
    elif tier.props.status in (401, 403):
        yield say(
            "problem",
            f"the server at {url} wants another key",
            f"Set `api_key` in [tier.{tier.name}] to what the server's --api-key is",
        )
    elif tier.props.status == 0 and tier.listener and _looks_like_llama(tier):
        yield say(
            "problem",
            f"the llama-server at {url} does not answer: {tier.props.why}",
            f"Restart it, process {tier.listener.pid}",
        )
    else:
        who = _who(tier.listener.name, tier.listener.pid) if tier.listener else "something"
        free = f'Set `url = "http://127.0.0.1:{tier.free_port}"` in [tier.{tier.name}]'
        yield say(
            "problem",
            f"{url} is taken by {who}, which is no llama-server",
            f"End it, or: {free}, and have the server listen there",
        )


def _start(facts: Facts, tier: TierFacts) -> str:
    """How to get the server of a tier to run."""
    if tier.config.server is None:
        port = tier.config.url.rpartition(":")[2]
        return (
            f"Start it: `llama-server --model FILE --port {port} --ctx-size {_WINDOW} --jinja`, or"
            f" give its command in [tier.{tier.name}.server], so that claudegw starts it"
        )
    if not facts.is_up:
        path = shlex.quote(str(facts.path))
        return f"Start the gateway, which starts it: `twistd -n claudegw --config {path}`"
    reason = mapping(tier.status.get("process")).get("reason")
    log = facts.config.gateway.state_dir if facts.config else ""
    return f"It does not stay up ({reason or 'no reason is known'}); its log is in {log}"


def _looks_like_llama(tier: TierFacts) -> bool:
    words = tier.listener.command if tier.listener else ()
    return "gateway.llama.embedded" in words or Path((*words, "")[0]).name == "llama-server"


def _program(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    if tier.config.server is None:
        return
    name = tier.command[0]
    if tier.program is None:
        yield say(
            "problem",
            f"there is no program {name} on the PATH",
            f"Install it (llama.cpp has llama-server), or say where it is: the first word of"
            f" command in [tier.{tier.name}.server] may be a whole path",
        )
    else:
        yield say("ok", tier.program)


def _model(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    if tier.model is None:
        yield say("skipped", "nothing here says which file it is")
    elif tier.model.wrong:
        yield say(
            "problem",
            f"{tier.model.path}: {tier.model.wrong}",
            f"Get the file once more, whole, and put it there, or correct --model of command in"
            f" [tier.{tier.name}.server]",
        )
    else:
        yield say("ok", tier.model.path)


def _window(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    window = tier.window
    if not window:
        return
    at = compacts_at(window)
    if tier.name != MAIN or at >= _PROMPT:
        yield say("ok", f"{window} tokens a slot")
        return
    size = _WINDOW * max(tier.slots, 1)
    does_not_fit = window < _PROMPT + 1024
    yield say(
        "problem" if does_not_fit else "warning",
        f"{window} tokens a slot; Claude Code's own prompt has {_PROMPT}"
        + ("" if does_not_fit else f", and it compacts a conversation at {max(0, at)}"),
        _flag(tier, f"--ctx-size {size}") + ", or give Claude Code fewer tools (--tools)",
    )


def _slots(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    there, wanted = tier.slots, tier.config.slots
    if not there:
        return
    if there < wanted:
        yield say(
            "warning",
            f"{wanted} calls are sent at once, and the server has {there} slots: the others wait"
            " where nobody sees it",
            f"Set `slots = {there}` in [tier.{tier.name}]",
        )
    elif there > wanted:
        yield say(
            "warning",
            f"the server has {there} slots and gets {wanted} calls at once: its context is divided"
            " by all of them, and no slot is saved",
            _flag(tier, f"--parallel {wanted}") + f", or set `slots = {there}` in"
            f" [tier.{tier.name}]",
        )
    else:
        yield say("ok", f"{there}, as the configuration says")


def _template(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    if not tier.is_llama:
        return
    missing = [
        words
        for words, reply in (("system messages", tier.system), ("tools", tier.tools))
        if MARK not in str(mapping(reply.said).get("prompt"))
    ]
    for words in missing:
        yield say(
            "problem" if tier.name == MAIN or words != "tools" else "warning",
            f"the model's chat template does not take {words}",
            _flag(tier, "--chat-template-file FILE")
            + ", with the template of its publisher; etc/demo-template.jinja is one for Gemma",
        )
    if not missing:
        yield say("ok", "takes tools and system messages")


def _kv(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    kind = mapping(tier.status.get("cache")).get("model_kind")
    if tier.model is not None and tier.model.model is not None:
        kind = tier.model.model.kind
    if kind in ("sliding-window", "recurrent"):
        yield say(
            "warning" if tier.name == MAIN else "ok",
            f"{kind}: a state that was kept serves only a prompt that goes on exactly where it"
            " ends; of a conversation nothing is saved but tools and system prompt",
            "For long conversations use a model that keeps every token (GLM, Qwen3): change"
            f" --model of command in [tier.{tier.name}.server]"
            if tier.name == MAIN
            else "",
        )
    elif kind:
        yield say("ok", "plain: a kept state serves every prompt that begins as it does")


def _flags(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    advice = mapping(tier.status.get("cache")).get("advice")
    said = [str(each) for each in advice] if isinstance(advice, list) else []
    for each in said:
        where = f"[tier.{tier.name}.server]"
        yield say(
            "warning", each, f"Give the server's command in {where}, so that claudegw starts it"
        )
    lacks = [flag for flag in tier.added if flag in _COSTS]
    for flag in lacks:
        value = tier.added[tier.added.index(flag) + 1]
        server = tier.config.server
        managed = server is not None and not server.manage_flags
        yield say(
            "warning",
            f"the server has no {flag}: {_COSTS[flag]}",
            f"Set `manage_flags = true` in [tier.{tier.name}.server]"
            if managed
            else _flag(tier, f"{flag} {shlex.quote(value)}"),
        )
    if tier.command and not said and not lacks:
        yield say("ok", "those that matter are there")


def _rounds(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    if not tier.rounds:
        why = "its slots are at work" if facts.is_up and tier.is_llama else "nobody can be asked"
        yield say("skipped", f"{why}: no round-trip")
        return
    grade: Status = "problem" if tier.name == MAIN else "warning"
    for kind, is_right in _ANSWERS.items():
        reply = tier.rounds.get(kind)
        if reply is None:
            continue
        if reply.status != 200:
            said = mapping(mapping(reply.said).get("error")).get("message")
            yield say(
                "problem" if kind == "text" else grade,
                f"{kind}: {said or reply.why or f'status {reply.status}'}",
                f"See what the gateway did: `claudegw status --once --config"
                f" {shlex.quote(str(facts.path))}`; then mend what is said of {tier.name} above",
            )
        elif not is_right(tier.rounds):
            yield say(grade, f"{kind}: {_WRONG[kind](tier.rounds)}", _OTHER_SERVER)
        else:
            yield say("ok", kind)


def _flag(tier: TierFacts, flag: str) -> str:
    if tier.config.server is None:
        return f"Restart the server with `{flag}`"
    return f"Put `{flag}` into command in [tier.{tier.name}.server]"


def _who(name: str, pid: int) -> str:
    return f"{name} (process {pid})" if pid else "something"


# --- answers --------------------------------------------------------------------------------------

Rounds = Mapping[str, Any]


def _blocks(rounds: Rounds, kind: str) -> list[Mapping[str, Json]]:
    content = mapping(rounds[kind].said).get("content")
    return [mapping(block) for block in content] if isinstance(content, list) else []


def _has_text(rounds: Rounds) -> bool:
    return any(block.get("type") in ("text", "thinking") for block in _blocks(rounds, "text"))


def _has_call(rounds: Rounds) -> bool:
    return any(block.get("name") == "look" for block in _blocks(rounds, "tool"))


def _has_json(rounds: Rounds) -> bool:
    text = "".join(str(block.get("text", "")) for block in _blocks(rounds, "schema"))
    return "".join(text.split()) in ('{"ok":true}', '{"ok":false}')


def _used(rounds: Rounds) -> int:
    usage = mapping(mapping(rounds["text"].said).get("usage"))
    names = "input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"
    return sum(number(usage.get(name)) for name in names)


def _counted(rounds: Rounds) -> int:
    return number(mapping(rounds["count"].said).get("input_tokens"))


_ANSWERS: Final[Mapping[str, Callable[[Rounds], bool]]] = {
    "text": _has_text,
    "count": lambda rounds: _counted(rounds) == _used(rounds),
    "tool": _has_call,
    "schema": _has_json,
}

_WRONG: Final[Mapping[str, Callable[[Rounds], str]]] = {
    "text": lambda _: "the model says nothing",
    "count": lambda rounds: (
        f"{_counted(rounds)} tokens were counted, and the call used"
        f" {_used(rounds)}: conversations are compacted too late or too early"
    ),
    "tool": lambda _: "the model was to call a tool, and did not",
    "schema": lambda _: "the answer does not fit its schema",
}

_OTHER_SERVER: Final = (
    "Use a llama-server of build 11434 or newer for this tier, with its model's own template, and"
    " nothing between it and the gateway"
)


# --- the table ------------------------------------------------------------------------------------

_CHECKS: Final[tuple[tuple[str, Callable[[Facts, Say], Iterator[Finding]]], ...]] = (
    ("python", _python),
    ("packages", _packages),
    ("config", _config),
    ("token", _token),
    ("state", _state),
    ("disk", _disk),
    ("gateway", _gateway),
    ("clocks", _clocks),
    ("grace", _grace),
    ("client", _client),
    ("settings", _settings),
)

_TIER_CHECKS: Final[
    tuple[tuple[str, Callable[[Facts, TierFacts, Say], Iterator[Finding]]], ...]
] = (
    ("server", _server),
    ("program", _program),
    ("model", _model),
    ("window", _window),
    ("slots", _slots),
    ("template", _template),
    ("kv", _kv),
    ("flags", _flags),
    ("round-trip", _rounds),
)
