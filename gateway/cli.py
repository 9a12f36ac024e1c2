"""
The ``claudegw`` command.

``claudegw settings`` prints what Claude Code needs to work well on this gateway, with the windows
that the running gateway measured (docs/protocol.md, "The client's settings").  ``claudegw status``
shows what that gateway does: its models, the calls under way, those in line.  ``claudegw launchd``
prints what makes launchd start it.
"""

from __future__ import annotations

import json
import os
import plistlib
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from rich.console import Console

from gateway import status_page
from gateway.config import Config, ConfigError, Gateway, load
from gateway.daemon.launchd import LABEL, Installation, install, launch_agent
from gateway.policy.calls import KINDS
from gateway.policy.routes import MAIN, MODEL_PREFIX, SMALL

Json = Any

#: Tokens of an answer that Claude Code is told to ask for, where the window has room for it.
_ANSWER: Final = 8192

#: Claude Code compacts a conversation when so many tokens and an answer are all that is left.
_RESERVE: Final = 13_000

#: Seconds between two looks at the status.
_REFRESH: Final = 1.0


class Unusable(Exception):
    """The command cannot do what it was asked; the message says what to do."""


def main(arguments: Sequence[str] | None = None, platform: str = sys.platform) -> int:
    """Run the command on a machine of the kind `platform`; returns its exit status."""
    options = _parser().parse_args(arguments, Namespace(platform=platform))
    try:
        options.run(load(options.config, KINDS), options)
    except ConfigError as error:
        for mistake in error.mistakes:
            print(f"claudegw: {mistake}", file=sys.stderr)
        return 1
    except Unusable as error:
        print(f"claudegw: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="claudegw", description=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Config, Namespace], None], what: str) -> ArgumentParser:
        added = commands.add_parser(name, help=what)
        added.add_argument("--config", type=Path, default=Path("etc/gw.toml"))
        added.set_defaults(run=run)
        return added

    wanted = command("settings", _settings, "print a Claude Code settings file")
    wanted.add_argument("--shell", action="store_true", help="print exports for a shell instead")
    wanted = command("status", _status, "show what the running gateway does, live")
    wanted.add_argument("--once", action="store_true", help="show it once; so does a pipe")
    wanted.add_argument("--json", action="store_true", help="print it once, as the gateway says it")
    wanted = command("launchd", _launchd, "print a LaunchAgent that starts the gateway on a Mac")
    wanted.add_argument("--install", action="store_true", help="put it into its place instead")
    return parser


def _settings(config: Config, options: Namespace) -> None:
    env = settings(config, _models(config))
    if options.shell:
        for name, value in env["env"].items():
            print(f"export {name}={shlex.quote(value)}")
    else:
        print(json.dumps(env, indent=2))


def _status(config: Config, options: Namespace) -> None:
    ask = partial(_ask, config, "/status")
    if options.json:
        print(json.dumps(ask(), indent=2))
        return
    console = Console()
    if options.once or not console.is_terminal:
        console.print(status_page.page(ask()))
        return
    with suppress(KeyboardInterrupt):
        status_page.watch(console, ask, partial(time.sleep, _REFRESH))


def _launchd(config: Config, options: Namespace) -> None:
    gateway, twistd = config.gateway, Path(sys.executable).with_name("twistd")
    path = os.environ.get("PATH", "")
    here = Installation(twistd, options.config.absolute(), Path.cwd(), path)
    try:
        agent = launch_agent(config, here)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    if not options.install:
        print(plistlib.dumps(agent).decode(), end="")
        return
    if options.platform != "darwin":
        raise Unusable("launchd is a Mac's; on Linux use etc/systemd (docs/operations.md).")
    try:
        path = shlex.quote(str(install(agent, Path.home(), gateway.state_dir)))
    except OSError as error:
        raise Unusable(f"{error.filename}: {error.strerror}") from None
    domain = f"gui/{os.getuid()}"
    print(f"launchctl bootstrap {domain} {path}")
    print(f"launchctl kickstart {domain}/{LABEL}")


def settings(config: Config, windows: Mapping[str, int]) -> dict[str, Json]:
    """
    A Claude Code settings file for this gateway.

    Args:
        config: the gateway's.
        windows: tokens that a slot of each tier holds.
    """
    main_model = MODEL_PREFIX + MAIN
    small_model = MODEL_PREFIX + (SMALL if SMALL in config.tier else MAIN)
    window = windows[MAIN]
    env = {
        "ANTHROPIC_BASE_URL": _url(config.gateway),
        "ANTHROPIC_AUTH_TOKEN": config.gateway.token or "none",
        "ANTHROPIC_MODEL": main_model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": main_model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": main_model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": small_model,
        # Without the true window it would take 1 000 000 tokens for granted and never compact.
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(window),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(longest_answer(window)),
        # Each of these would change the prompt's beginning between two calls.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "off",
        "ENABLE_TOOL_SEARCH": "false",
        # A cold prompt takes minutes; no timer of the client's may end it.
        "API_TIMEOUT_MS": "3600000",
        "API_FORCE_IDLE_TIMEOUT": "0",
        "CLAUDE_STREAM_IDLE_TIMEOUT_MS": "1800000",
        # Safety verdicts cost a prompt of 35 000 tokens each; it asks the user instead.
        "CLAUDE_CODE_AUTO_MODE_SERVER": "0",
    }
    return {
        "env": env,
        "permissions": {
            "defaultMode": "default",
            "disableAutoMode": "disable",
            # A search that only Anthropic's own servers can run.
            "deny": ["WebSearch"],
        },
        "skipWebFetchPreflight": True,
    }


def longest_answer(window: int) -> int:
    """
    The output limit for a window of so many tokens.

    Claude Code compacts at ``window - min(limit, 20 000) - 13 000`` tokens: a limit that leaves
    nothing there ends every session at its second turn.
    """
    return max(1024, min(_ANSWER, (window - _RESERVE) // 4))


def _url(gateway: Gateway) -> str:
    """Where a client on this machine finds the gateway; raises Unusable."""
    return gateway.url or base_url(gateway.listen)


def base_url(listen: str) -> str:
    """
    The URL under which a client on this machine reaches the endpoint `listen`.

    Raises:
        Unusable: Claude Code cannot reach it, or the endpoint does not say where it is.
    """
    kind, *parts = listen.replace("\\:", "\0").split(":")
    if kind != "tcp":
        raise Unusable(
            f"Claude Code needs a TCP port, and gateway.listen is {listen!r};"
            " say it as url in [gateway] if there is one."
        )
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    port = named.get("port") or parts[0]
    host = named.get("interface", "").replace("\0", ":")
    if host in ("", "0.0.0.0", "::", "localhost"):  # noqa: S104  # nothing is bound here
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _models(config: Config) -> dict[str, int]:
    """The window of each tier, as the running gateway knows it."""
    try:
        windows = {
            model["id"].removeprefix(MODEL_PREFIX): model["max_input_tokens"]
            for model in _ask(config, "/v1/models")["data"]
        }
    except (KeyError, TypeError, AttributeError):
        raise _no_gateway(config, "it says something else") from None
    if windows.get(MAIN) is None:
        raise Unusable("The main model is still loading, or down; try again when it is up.")
    return {name: window for name, window in windows.items() if window is not None}


def _ask(config: Config, path: str) -> Json:
    """
    What the running gateway says at `path`.

    Raises:
        Unusable: there is none, or it refuses.
    """
    parts = urlsplit(_url(config.gateway))
    headers = {"x-api-key": config.gateway.token} if config.gateway.token else {}
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        said = json.loads(answer.read())
        if answer.status != HTTPStatus.OK:
            raise Unusable(f"The gateway says: {said['error']['message']}")
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        raise _no_gateway(config, error) from None
    finally:
        connection.close()
    return said


def _no_gateway(config: Config, why: object) -> Unusable:
    return Unusable(
        f"No gateway answers at {_url(config.gateway)} ({why}). Start it first:"
        " twistd -n claudegw --config FILE"
    )


if __name__ == "__main__":
    sys.exit(main())
