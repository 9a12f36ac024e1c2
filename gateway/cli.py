"""
The ``claudegw`` command.

``claudegw settings`` prints what Claude Code needs to work well on this gateway, with the windows
that the running gateway measured (docs/protocol.md, "The client's settings").  ``claudegw status``
shows what that gateway does: its models, the calls under way, those in line.  ``claudegw launchd``
prints what makes launchd start it.  ``claudegw doctor`` says what keeps Claude Code from working.
"""

from __future__ import annotations

import json
import os
import plistlib
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from gateway.commands import status_page
from gateway.commands.running import Unusable, ask
from gateway.commands.settings import settings, windows
from gateway.config import Config, ConfigError, load
from gateway.daemon.launchd import LABEL, Installation, install, launch_agent
from gateway.policy.calls import KINDS

Json = Any

#: Seconds between two looks at the status.
_REFRESH: Final = 1.0


def main(arguments: Sequence[str] | None = None, platform: str = sys.platform) -> int:
    """Run the command on a machine of the kind `platform`; returns its exit status."""
    options = _parser().parse_args(arguments, Namespace(platform=platform))
    if options.run is _doctor:  # a configuration that cannot be used is what it is there for
        from gateway.commands import doctor

        return doctor.run(options.config, as_json=options.json)
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
    wanted = command("doctor", _doctor, "say what keeps Claude Code from working, and what to do")
    wanted.add_argument("--json", action="store_true", help="print a list of what was found")
    wanted = command("launchd", _launchd, "print a LaunchAgent that starts the gateway on a Mac")
    wanted.add_argument("--install", action="store_true", help="put it into its place instead")
    return parser


def _doctor(*_: object) -> None:
    """`main` runs it without a configuration."""
    raise AssertionError


def _settings(config: Config, options: Namespace) -> None:
    env = settings(config, windows(config))
    if options.shell:
        for name, value in env["env"].items():
            print(f"export {name}={shlex.quote(value)}")
    else:
        print(json.dumps(env, indent=2))


def _status(config: Config, options: Namespace) -> None:
    look = partial(ask, config, "/status")
    if options.json:
        print(json.dumps(look(), indent=2))
        return
    console = Console()
    if options.once or not console.is_terminal:
        console.print(status_page.page(look()))
        return
    with suppress(KeyboardInterrupt):
        status_page.watch(console, look, partial(time.sleep, _REFRESH))


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


if __name__ == "__main__":
    sys.exit(main())
