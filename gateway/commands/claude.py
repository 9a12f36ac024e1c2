"""
Claude Code on the running gateway, with one word.

It gets a settings file of its own beside its user's, which stay as they are: what is given with
``--settings`` outranks all of them but an organization's.  What is left of the user's that would
keep it from the gateway, in the environment or in a file, is overridden for this one session, and
said; what outranks ours is said with its remedy.

What is decided is decided by functions of values (`session`); `run` does the rest.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

import attrs

from gateway.commands.running import NoGateway, Unusable, ask, url_of
from gateway.commands.settings import (
    OWN_PROMPT,
    Loading,
    compacts_at,
    settings,
    status_line,
    windows,
)
from gateway.config import STATE_DIR, Config
from gateway.daemon.folder import private
from gateway.figures import line
from gateway.policy.routes import MAIN

Json = Any

#: Our settings file.
_FILE: Final = "claude-code.json"

#: Seconds that a gateway gets to listen once it was started.
_LISTENS: Final = 60.0

#: Seconds between two looks whether it is up.
_REFRESH: Final = 0.5

#: States of a server that it does not leave by itself.
_GIVEN_UP: Final = ("stopped", "failed")

#: Where an organization's settings lie, which outrank all others.
MANAGED: Final = {
    "darwin": Path("/Library/Application Support/ClaudeCode"),
    "linux": Path("/etc/claude-code"),
}

#: Variables that keep the client from the gateway or its models, from compacting, or have it ask a
#: question first.  Each was seen to: what is not here does no harm beside our settings.
_HOSTILE: Final = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_SMALL_FAST_MODEL",
    "ANTHROPIC_UNIX_SOCKET",
    "CLAUDE_CODE_DISABLE_UNKNOWN_MODEL_WINDOW_ENFORCEMENT",
    "CLAUDE_CODE_SUBAGENT_MODEL",
    "CLAUDE_CODE_USE_ANTHROPIC_AWS",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_FOUNDRY",
    "CLAUDE_CODE_USE_MANTLE",
    "CLAUDE_CODE_USE_VERTEX",
    "DISABLE_AUTO_COMPACT",
)

#: One that counts whatever its value, so that nothing overrides it where a file sets it.
_FINAL: Final = "DISABLE_COMPACT"

#: Variables that hold the names of our models.
_NAMES: Final = ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL")

#: Variables that send all that the client says through a proxy, and those that say what not.
_PROXIES: Final = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_DIRECT: Final = ("NO_PROXY", "no_proxy")


# --- what is decided ------------------------------------------------------------------------------


@attrs.frozen
class Source:
    """
    Settings that are not ours.

    Attributes:
        name: where they are, as their user would say it.
        settings: what they say.
        managed: an organization's, which outrank ours.
    """

    name: str
    settings: Mapping[str, Json]
    managed: bool = False

    @property
    def env(self) -> Mapping[str, str]:
        """The variables that they set; the client takes any value as its words."""
        found = self.settings.get("env")
        items = found.items() if isinstance(found, Mapping) else ()
        return {name: str(value) for name, value in items}


@attrs.frozen
class Session:
    """
    How the client is started.

    Attributes:
        settings: our file.
        environ: its environment.
        said: what its user is to know.
    """

    settings: Mapping[str, Json]
    environ: Mapping[str, str]
    said: Sequence[str]


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of ``claudegw``, and those that ``claudegw claude`` passes on untouched."""
    given = list(arguments)
    if given[:1] != ["claude"]:
        return given, []
    at = 1
    while at < len(given):
        name, equals, _ = given[at].partition("=")
        if name in ("-h", "--help"):
            at += 1
        elif name in ("--config", "--client"):
            at += 1 if equals else 2
        else:
            break
    return given[:at], given[at + 1 :] if given[at : at + 1] == ["--"] else given[at:]


def session(
    ours: Mapping[str, Json],
    window: int,
    sources: Sequence[Source],
    environ: Mapping[str, str],
    arguments: Sequence[str],
) -> Session:
    """
    How the client is started, whatever its user has set.

    Args:
        ours: the settings for this gateway.
        window: tokens that a slot of the main model holds.
        sources: the user's settings, those that outrank others last.
        environ: the user's environment.
        arguments: those that the client is given.
    """
    said = [*_too_small(window), *_outranked(ours, sources, arguments)]
    env: dict[str, str] = dict(ours["env"])
    files = [source for source in sources if not source.managed]
    places = [_environment(environ), *files]
    hostile = [name for name in _HOSTILE if any(place.env.get(name) for place in places)]
    if environ.get(_FINAL):
        hostile.append(_FINAL)
    if hostile:
        where = [place.name for place in places if any(map(place.env.get, hostile))]
        said.append(
            f"In this session {_listed(hostile)} from {_listed(where)}"
            f" {'is' if len(hostile) == 1 else 'are'} overridden, to stay on this gateway; remove"
            f" {'it' if len(hostile) == 1 else 'them'} there to be rid of this line."
        )
    env |= {name: "" for name in _HOSTILE if any(source.env.get(name) for source in files)}
    if never := [source.name for source in files if _FINAL in source.env]:
        said.append(
            f"{_listed(never)} sets {_FINAL}, which nothing overrides: a conversation will end when"
            " the window is full; remove it there."
        )
    proxies, direct = _around_proxies(env["ANTHROPIC_BASE_URL"], [_environment(environ), *sources])
    said += proxies
    env |= direct
    changes: dict[str, Json] = {"env": env}
    if any("availableModels" in source.settings for source in sources):
        # It would take "claudegw-main[1m]" instead, which has no window.
        changes["availableModels"] = list(dict.fromkeys(map(env.get, _NAMES)))
    if any(source.settings.get("statusLine") for source in sources):
        ours = {name: value for name, value in ours.items() if name != "statusLine"}
    out = (*_HOSTILE, _FINAL)
    child = {name: value for name, value in ({**environ, **env}).items() if name not in out}
    if "--bare" in arguments:  # it knows no other credential
        child["ANTHROPIC_API_KEY"] = env["ANTHROPIC_AUTH_TOKEN"]
    return Session({**ours, **changes}, child, said)


def _environment(environ: Mapping[str, str]) -> Source:
    return Source("the environment", {"env": environ})


def _too_small(window: int) -> Iterator[str]:
    at = compacts_at(window)
    if at < OWN_PROMPT:
        yield (
            f"The main model's window of {window} tokens is too small: Claude Code's own prompt has"
            f" up to {OWN_PROMPT}, and it compacts a conversation at {max(0, at)}; give the model's"
            " server a --ctx-size of 65536 a slot, or Claude Code fewer tools (--tools)."
        )


def _outranked(
    ours: Mapping[str, Json], sources: Sequence[Source], arguments: Sequence[str]
) -> Iterator[str]:
    """What stands above our settings."""
    wanted: Mapping[str, str] = ours["env"]
    for source in sources:
        lost = [name for name, value in source.env.items() if wanted.get(name, value) != value]
        lost += [name for name in (*_HOSTILE, _FINAL) if source.env.get(name)]
        lost += [name for name in ("availableModels",) if name in source.settings]
        if source.settings.get("autoCompactEnabled") is False:
            lost.append("autoCompactEnabled")
        if source.managed and lost:
            yield (
                f"{source.name} sets {_listed(lost)}, which outranks this gateway's settings: ask"
                " who manages this machine to take it out."
            )
    if any(argument.partition("=")[0] == "--settings" for argument in arguments):
        yield (
            "Claude Code takes only one --settings: leave yours out, and put what is in it into"
            " .claude/settings.local.json."
        )


def _around_proxies(url: str, places: Sequence[Source]) -> tuple[list[str], dict[str, str]]:
    """What is said of proxies, and the variables that lead past them to `url`."""
    host = urlsplit(url).hostname or ""
    proxies, direct = [], ""
    for place in places:
        for name in _PROXIES:
            proxies += [each for each in (name, name.lower()) if place.env.get(each)]
        direct = next((place.env[name] for name in _DIRECT if place.env.get(name)), direct)
    known = [each.strip() for each in direct.split(",")]
    if not proxies or host in known or "*" in known:
        return [], {}
    wanted = ",".join(filter(None, (direct, host)))
    told = (
        f"{_listed(list(dict.fromkeys(proxies)))} would send this gateway's calls to a proxy: in"
        f" this session NO_PROXY names {host} as well; set it yourself to be rid of this line."
    )
    return [told], dict.fromkeys(_DIRECT, wanted)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


# --- what is done ---------------------------------------------------------------------------------


def run(
    config: Config, config_file: Path, arguments: Sequence[str], program: str | None
) -> NoReturn:
    """
    Become Claude Code.

    Args:
        config: the gateway's.
        config_file: where that was read.
        arguments: the client's own, passed on untouched.
        program: the client; None looks for it.

    Raises:
        Unusable: there is no client or no gateway, or it is no use to a client.
    """
    client = find(program, os.environ)
    try:
        known = up(config, config_file)
    except KeyboardInterrupt:
        raise Unusable("Interrupted; nothing was started.") from None
    except OSError as error:  # the state folder of a gateway that would have been started
        raise Unusable(f"{error.filename or 'the gateway'}: {error.strerror}") from None
    ours = settings(config, known, status_line(config_file))
    sources = list(found(Path.home(), Path.cwd(), os.environ, MANAGED.get(sys.platform)))
    start = session(ours, known[MAIN], sources, os.environ, arguments)
    for sentence in start.said:
        _say(sentence)
    try:
        file = write(folder_for(config.gateway.state_dir, os.geteuid()) / _FILE, start.settings)
        os.execve(  # noqa: S606  # the very thing: no shell, and no process of ours left
            client, [client, "--settings", str(file), *arguments], start.environ
        )
    except OSError as error:
        raise Unusable(f"{error.filename or client}: {error.strerror}") from None


def find(program: str | None, environ: Mapping[str, str]) -> str:
    """Where the client's program is; raises Unusable."""
    wanted = program or environ.get("CLAUDE") or "claude"
    path = shutil.which(wanted, path=environ.get("PATH"))
    if path is None:
        raise Unusable(
            f"There is no program {wanted}: install Claude Code (npm install -g"
            " @anthropic-ai/claude-code), or say where it is with --client PATH."
        )
    return path


def found(
    home: Path, folder: Path, environ: Mapping[str, str], managed: Path | None
) -> Iterator[Source]:
    """The settings that a client in `folder` would read beside ours, where there are any."""
    users = Path(environ.get("CLAUDE_CONFIG_DIR") or home / ".claude")
    paths = [users / "settings.json"]
    paths += [folder / ".claude" / name for name in ("settings.json", "settings.local.json")]
    for path in dict.fromkeys(paths):
        yield from _read(path, home)
    if managed is not None:
        for path in (
            managed / "managed-settings.json",
            *sorted((managed / "managed-settings.d").glob("*.json")),
        ):
            yield from _read(path, home, managed=True)


def _read(path: Path, home: Path, *, managed: bool = False) -> Iterator[Source]:
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # most are absent; bad JSON the client tells
        return
    if isinstance(settings, dict):
        name = f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
        yield Source(name, settings, managed)


def folder_for(state: Path, user: int) -> Path:
    """Where the settings file of a user goes: the state folder, or theirs if it is a service's."""
    with suppress(OSError):
        if state.stat().st_uid != user:
            return STATE_DIR.expanduser()
    return state


def write(path: Path, value: Json) -> Path:
    """Put `value` into the file at `path`, whole or not at all, for its user's eyes only."""
    private(path.parent)
    with NamedTemporaryFile("w", dir=path.parent, prefix=".claudegw", delete=False) as file:
        try:
            json.dump(value, file, indent=2)
            file.flush()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return path


# --- the gateway ----------------------------------------------------------------------------------


def up(config: Config, config_file: Path) -> dict[str, int]:
    """
    The windows of a gateway that runs, and whose main model does.

    A gateway that is down is started, should somebody sit at a terminal and want it.

    Raises:
        Unusable: there is none, or it did not come up in time.
    """
    try:
        ask(config, "/healthz")
    except NoGateway:
        command = start_command(config, config_file)
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise Unusable(
                f"No gateway answers at {url_of(config.gateway)}. Start it first:"
                f" {shlex.join(command)}"
            ) from None
        _start(config, command)
    return _wait_for_main(config)


def start_command(config: Config, config_file: Path) -> list[str]:
    """What starts the gateway as a daemon, with its log and its pid in the state folder."""
    state, twistd = config.gateway.state_dir, Path(sys.executable).with_name("twistd")
    files = [f"--pidfile={state / 'claudegw.pid'}", f"--logfile={state / 'claudegw.log'}"]
    return [str(twistd), *files, "claudegw", "--config", str(config_file.absolute())]


def _start(config: Config, command: Sequence[str]) -> None:
    """Start the gateway, if its user wants that."""
    _say(f"No gateway answers at {url_of(config.gateway)}.")
    sys.stderr.write("Start it now? [Y/n] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("", "y", "yes"):
        raise Unusable(f"Start it first: {shlex.join(command)}")
    private(config.gateway.state_dir)
    done = subprocess.run(  # noqa: S603  # our own program
        command, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    log = config.gateway.state_dir / "claudegw.log"
    if done.returncode:
        why = (done.stderr or done.stdout).decode("utf-8", "replace").strip()
        raise Unusable(f"The gateway did not start; {log} says more: {why[-1000:]}")
    end = time.monotonic() + _LISTENS
    while True:
        try:
            ask(config, "/healthz")
        except NoGateway:
            if time.monotonic() > end:
                raise Unusable(f"The gateway does not listen; {log} says why.") from None
            time.sleep(_REFRESH)
        else:
            return


def _wait_for_main(config: Config) -> dict[str, int]:
    """The windows, once the main model is up."""
    began, patience = time.monotonic(), config.tier[MAIN].startup_patience
    shown = False
    while True:
        try:
            known = windows(config)
        except Loading:
            tier = ask(config, "/status")["tiers"][MAIN]
            process, error = tier["process"] or {}, tier.get("error") or {}
            state, waited = process.get("state", "down"), time.monotonic() - began
            told = line(process.get("reason") or error.get("message") or "")
            if state in _GIVEN_UP or not error.get("passes", True) or waited > patience:
                why = f" ({told.rstrip('.')})" if told else ""
                raise Unusable(f"The main model is {state}{why}: claudegw doctor.") from None
            if told and not process and not shown:
                _say(told)
            _show(f"the main model is {state}, {waited:.0f} s", again=shown)
            shown = True
            time.sleep(_REFRESH)
        else:
            if shown and sys.stderr.isatty():
                sys.stderr.write("\n")
            return known


def _show(progress: str, *, again: bool) -> None:
    """Tell a terminal how it goes, on one line; anything else, once."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[Kclaudegw: {progress}")
        sys.stderr.flush()
    elif not again:
        _say(progress)


def _say(sentence: str) -> None:
    print(f"claudegw: {sentence}", file=sys.stderr, flush=True)
