"""
The ``claudegw`` command.

``claudegw claude`` starts Claude Code on the running gateway, and ``claudegw statusline`` is the
line below its prompt.  ``claudegw settings`` prints what it, or another client, needs to work well
on this gateway, with the windows that the running gateway measured (docs/protocol.md, "The client's
settings").  ``claudegw status`` shows what that gateway does: its models, the calls under way,
those in line; with ``--last N``, the calls that are over, also those of a gateway that is down.
``claudegw doctor`` says what keeps Claude Code from working.  ``claudegw launchd`` prints what
makes launchd start it.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Final

# Each command imports what it needs where it runs: the status line has 50 ms for all it does.
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable, Mapping, Sequence

    from gateway.config import Config

Json = Any

#: Seconds between two looks at the status.
_REFRESH: Final = 1.0


def main(arguments: Sequence[str] | None = None, platform: str = sys.platform) -> int:
    """Run the command on a machine of the kind `platform`; returns its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["statusline"] and not {"-h", "--help"} & set(given):
        from gateway.commands import statusline

        return statusline.run(given[1:])

    from argparse import Namespace

    from gateway.commands.claude import split
    from gateway.commands.running import Unusable
    from gateway.config import ConfigError, load
    from gateway.policy.calls import ROUTED

    ours, theirs = split(given)
    options = _parser().parse_args(ours, Namespace(platform=platform, theirs=theirs))
    if options.command == "doctor":  # a configuration that cannot be used is what it is there for
        from gateway.commands import doctor

        return doctor.run(options.config, as_json=options.json)
    try:
        options.run(load(options.config, ROUTED), options)
    except ConfigError as error:
        for mistake in error.mistakes:
            print(f"claudegw: {mistake}", file=sys.stderr)
        return 1
    except Unusable as error:
        print(f"claudegw: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> ArgumentParser:
    from argparse import ArgumentParser
    from pathlib import Path

    parser = ArgumentParser(prog="claudegw", description=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")

    def command(name: str, run: Callable[[Config, Namespace], None], what: str) -> ArgumentParser:
        added = commands.add_parser(name, help=what)
        added.add_argument("--config", type=Path, default=Path("etc/gw.toml"))
        added.set_defaults(run=run)
        return added

    wanted = command("claude", _claude, "start Claude Code on the running gateway")
    wanted.usage = "claudegw claude [-h] [--config CONFIG] [--client CLIENT] [--] [ARGUMENT ...]"
    wanted.epilog = "From the first argument that is not its own on, all of them are Claude Code's."
    wanted.add_argument("--client", help="Claude Code's program (else CLAUDE, else the PATH's)")
    wanted = command(
        "settings", _settings, "print what a client needs: a Claude Code settings file"
    )
    wanted.add_argument("--for", dest="client", choices=("claude", "opencode", "sdk"))
    wanted.add_argument("--shell", action="store_true", help="print exports for a shell instead")
    wanted = command("status", _status, "show what the running gateway does, live")
    wanted.add_argument("--once", action="store_true", help="show it once; so does a pipe")
    wanted.add_argument("--json", action="store_true", help="print it once, as the gateway says it")
    wanted.add_argument(
        "--last", type=_counting, metavar="N", help="list the last N calls; the gateway may be down"
    )
    command("statusline", _never, "print one line for Claude Code's status line")
    wanted = command("doctor", _never, "say what keeps Claude Code from working, and what to do")
    wanted.add_argument("--json", action="store_true", help="print a list of what was found")
    wanted = command("launchd", _launchd, "print a LaunchAgent that starts the gateway on a Mac")
    wanted.add_argument("--install", action="store_true", help="put it into its place instead")
    return parser


def _counting(text: str) -> int:
    from argparse import ArgumentTypeError

    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a number of calls, 1 or more, got {text!r}")
    return int(text)


def _never(*_: object) -> None:
    """`main` runs it by itself; here it only has its help."""
    raise AssertionError


def _claude(config: Config, options: Namespace) -> None:
    from gateway.commands import claude

    claude.run(config, options.config, options.theirs, options.client)


def _settings(config: Config, options: Namespace) -> None:
    import json

    from gateway.commands import settings

    if options.client == "sdk":
        _export(settings.sdk(config))
        return
    known = settings.windows(config)
    if options.client == "opencode":
        print(json.dumps(settings.opencode(config, known), indent=2))
        return
    found = settings.settings(config, known, settings.status_line(options.config))
    if options.shell:
        _export(found["env"])
    else:
        print(json.dumps(found, indent=2))


def _export(env: Mapping[str, str]) -> None:
    import shlex

    for name, value in env.items():
        print(f"export {name}={shlex.quote(value)}")


def _status(config: Config, options: Namespace) -> None:
    import json
    from contextlib import suppress
    from functools import partial

    from rich.console import Console

    from gateway.commands import status_page
    from gateway.commands.running import ask

    if options.last is not None:
        from gateway.commands.last import last_calls

        calls = last_calls(config, options.last)
        if options.json:
            print(json.dumps(calls, indent=2))
        else:
            Console().print(status_page.listed(calls))
        return
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
    import os
    import plistlib
    import shlex
    from pathlib import Path

    from gateway.commands.running import Unusable
    from gateway.config import ConfigError
    from gateway.daemon.launchd import LABEL, Installation, install, launch_agent

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
