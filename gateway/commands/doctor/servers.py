"""What the doctor finds of a tier: its server, its model, and its answers."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs

from gateway.commands.doctor.facts import MARK, Facts, TierFacts, number
from gateway.commands.doctor.finding import Finding, Say, Status, who
from gateway.commands.settings import OWN_PROMPT, compacts_at
from gateway.figures import mapping
from gateway.llama.command import option
from gateway.policy.routes import MAIN

Json = Any

#: Tokens of a window for work.
_WINDOW: Final = 65_536

#: States of a server of ours that is on its way.
_COMING: Final = ("starting", "loading")

#: MiB of a server that is not told how many.
_DEFAULT_RAM: Final = 8192

#: What the lack of a flag costs.
_COSTS: Final[Mapping[str, str]] = {
    "--slot-prompt-similarity": "a subagent takes the main conversation's slot over, and the end"
    " of that conversation is evaluated again",
    "--slot-save-path": "the slot is not saved, and after each start the first prompt is evaluated"
    " whole",
    "--cache-ram": "a conversation larger than 8 GiB is dropped when another takes the slot",
    "--sse-ping-interval": "for half a minute a server that works looks like one that hangs",
}


@attrs.frozen
class _WrongFlag:
    """A flag that is there with a value that costs something; None is none."""

    names: tuple[str, ...]
    is_wrong: Callable[[str | None], bool]
    cost: str
    better: str


_WRONG_FLAGS: Final = (
    _WrongFlag(
        ("--slot-prompt-similarity", "-sps"),
        lambda value: value is not None and value.strip("0.") != "",
        _COSTS["--slot-prompt-similarity"],
        "0",
    ),
    _WrongFlag(
        ("--cache-ram", "-cram"),
        lambda value: value == "0",
        "conversations that take turns are evaluated whole at each turn",
        str(_DEFAULT_RAM),
    ),
    _WrongFlag(
        ("--sleep-idle-seconds",),
        lambda value: value not in (None, "-1"),
        "a pause unloads the model and all that it has evaluated",
        "-1",
    ),
)


def server(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    """Whether a llama-server answers."""
    url = tier.config.url
    build = mapping(tier.props.said).get("build_info")
    process = mapping(tier.status.get("process"))
    if url.rstrip("/") == facts.url:
        yield say(
            "problem",
            f"{url} is the gateway itself, not a server",
            f'Set `url = "http://127.0.0.1:{tier.free_port}"` in [tier.{tier.name}], and have the'
            " server listen there",
        )
    elif tier.is_llama:
        yield say("ok", f"llama-server, build {build}, at {url}")
    elif tier.props.status == 0 and process.get("state") in _COMING:
        yield say("warning", f"the server at {url} is starting", "Wait, then look again")
    elif tier.is_loading:
        yield say("warning", f"the server at {url} loads its model", "Wait, then look again")
    elif tier.listener is None and tier.props.status == 0:
        yield say("problem", f"no server answers at {url}", _start(facts, tier))
    elif tier.props.status in (401, 403):
        kept = tier.config.api_key_env
        where = f"`{kept}` in the environment" if kept else f"`api_key` in [tier.{tier.name}]"
        yield say(
            "problem",
            f"the server at {url} wants another key",
            f"Set {where} to what the server's --api-key is",
        )
    elif tier.props.status == 0 and tier.listener and _looks_like_llama(tier):
        yield say(
            "problem",
            f"the llama-server at {url} does not answer: {tier.props.why}",
            f"Restart it, process {tier.listener.pid}",
        )
    else:
        taker = who(tier.listener.name, tier.listener.pid) if tier.listener else "something"
        free = f'Set `url = "http://127.0.0.1:{tier.free_port}"` in [tier.{tier.name}]'
        yield say(
            "problem",
            f"{url} is taken by {taker}, which is no llama-server",
            f"End it, or: {free}, and have the server listen there",
        )


def _start(facts: Facts, tier: TierFacts) -> str:
    """How to get the server of a tier to run."""
    if tier.config.server is None:
        where = listens_at(tier.config.url)
        return (
            f"Start it: `llama-server --model FILE {where} --ctx-size {_WINDOW} --jinja`, or"
            f" give its command in [tier.{tier.name}.server], so that claudegw starts it"
        )
    if not facts.is_up:
        path = shlex.quote(str(facts.path))
        return f"Start the gateway, which starts it: `twistd -n claudegw --config {path}`"
    reason = mapping(tier.status.get("process")).get("reason")
    log = facts.config.gateway.state_dir if facts.config else ""
    return f"It does not stay up ({reason or 'no reason is known'}); its log is in {log}"


def listens_at(url: str) -> str:
    """The flag with which a llama-server listens where a tier's `url` leads."""
    parts = urlsplit(url)
    return f"--host {parts.path}" if parts.scheme == "unix" else f"--port {parts.port or 80}"


def _looks_like_llama(tier: TierFacts) -> bool:
    words = tier.listener.command if tier.listener else ()
    return "gateway.llama.embedded" in words or Path((*words, "")[0]).name == "llama-server"


def program(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    """Whether the program of a command is there."""
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


def model(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    """Whether a model's file is there, and whole."""
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


def window(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    """Whether Claude Code has room in a slot."""
    window = tier.window
    if not window:
        return
    at = compacts_at(window)
    if tier.name != MAIN or at >= OWN_PROMPT:
        yield say("ok", f"{window} tokens a slot")
        return
    size = _WINDOW * max(tier.slots, 1)
    remedy = _flag(tier, f"--ctx-size {size}") + ", or give Claude Code fewer tools (--tools)"
    trained = 0 if tier.model is None or tier.model.model is None else tier.model.model.n_ctx
    if 0 < trained <= window:  # llama-server gives a slot no more than that
        remedy = f"Use a model that was trained with {_WINDOW} tokens; this one was with {trained}"
    does_not_fit = window < OWN_PROMPT + 1024
    yield say(
        "problem" if does_not_fit else "warning",
        f"{window} tokens a slot; Claude Code's own prompt has {OWN_PROMPT}"
        + ("" if does_not_fit else f", and it compacts a conversation at {max(0, at)}"),
        remedy,
    )


def slots(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    """Whether there are as many as calls are sent."""
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


def template(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    """Whether it takes what Claude Code sends."""
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


def kv(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    """What a kept state is good for."""
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


def flags(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    """What a server lacks, and what that costs."""
    advice = mapping(tier.status.get("cache")).get("advice")
    said = [str(each) for each in advice] if isinstance(advice, list) else []
    for each in said:
        where = f"[tier.{tier.name}.server]"
        yield say(
            "warning", each, f"Give the server's command in {where}, so that claudegw starts it"
        )
    lacks = dict(zip(tier.added[::2], tier.added[1::2], strict=True))
    if tier.config.server is None:
        lacks.pop("--slot-save-path", None)  # it would not be used
    if int(lacks.get("--cache-ram", 0)) <= _DEFAULT_RAM:
        lacks.pop("--cache-ram", None)
    lacks = {flag: value for flag, value in lacks.items() if flag in _COSTS}
    for flag, value in lacks.items():
        server = tier.config.server
        managed = server is not None and not server.manage_flags
        yield say(
            "warning",
            f"the server has no {flag}: {_COSTS[flag]}",
            f"Set `manage_flags = true` in [tier.{tier.name}.server]"
            if managed
            else _flag(tier, f"{flag} {shlex.quote(value)}"),
        )
    wrong = [bad for bad in _WRONG_FLAGS if bad.is_wrong(option(tier.command, *bad.names))]
    for bad in wrong:
        given = option(tier.command, *bad.names)
        yield say(
            "warning",
            f"{bad.names[0]} is {given}: {bad.cost}",
            _flag(tier, f"{bad.names[0]} {bad.better}"),
        )
    if tier.command and not said and not lacks and not wrong:
        yield say("ok", "those that matter are there")


def rounds(facts: Facts, tier: TierFacts, say: Say) -> Iterator[Finding]:
    """Whether calls through the gateway are answered, and counted as they are."""
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
            is_less = kind == "count" and not tier.is_ours  # Claude Code does without
            yield say(
                "problem" if kind == "text" else "warning" if is_less else grade,
                f"{kind}: {said or reply.why or f'status {reply.status}'}",
                f"See what the gateway did: `claudegw status --once --config"
                f" {shlex.quote(str(facts.path))}`; then mend what is said of {tier.name} above",
            )
        elif (went := reply.headers.get("x-claudegw-tier", tier.name)) != tier.name:
            why = reply.headers.get("x-claudegw-degraded") or "a [[route]] says so"
            yield say(
                "warning",
                f"{kind}: the call went to {went} instead ({why})",
                f"Mend what is said of {tier.name} above, or the [[route]] that took the call",
            )
        elif not is_right(tier.rounds):
            wrong = f"{kind}: {_WRONG[kind](tier.rounds)}"
            if kind == "tool":  # its template was asked; whether it calls is the model's to choose
                yield say("warning", wrong, _OTHER_MODEL)
            else:
                yield say(grade, wrong, _OTHER_SERVER)
        else:
            yield say("ok", kind)


def _flag(tier: TierFacts, flag: str) -> str:
    if tier.config.server is None:
        return f"Restart the server with `{flag}`"
    return f"Put `{flag}` into command in [tier.{tier.name}.server]"


# --- answers --------------------------------------------------------------------------------------

Rounds = Mapping[str, Any]


def _blocks(rounds: Rounds, kind: str) -> list[Mapping[str, Json]]:
    content = mapping(rounds[kind].said).get("content")
    return [mapping(block) for block in content] if isinstance(content, list) else []


def _has_text(rounds: Rounds) -> bool:
    return any(block.get("type") in ("text", "thinking") for block in _blocks(rounds, "text"))


def _calls(rounds: Rounds) -> list[Mapping[str, Json]]:
    """The arguments of each call of the tool."""
    blocks = _blocks(rounds, "tool")
    return [mapping(block.get("input")) for block in blocks if block.get("name") == "look"]


def _has_call(rounds: Rounds) -> bool:
    return any(isinstance(given.get("deep"), bool) for given in _calls(rounds))


def _wrong_call(rounds: Rounds) -> str:
    if _calls(rounds):
        return "the model called a tool without the arguments that it needs"
    return "the model was to call a tool, and did not"


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
    "tool": _wrong_call,
    "schema": lambda _: "the answer does not fit its schema",
}

_OTHER_MODEL: Final = (
    "Use a model that was trained to call tools, with the template of its publisher; very small"
    " ones often do not call any"
)

_OTHER_SERVER: Final = (
    "Use a llama-server of build 11434 or newer for this tier, with its model's own template, and"
    " nothing between it and the gateway"
)
