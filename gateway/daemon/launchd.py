"""
The LaunchAgent that starts this installation on a Mac (launchd.plist(5)).

launchd starts it when its user logs in, and again whenever it ends.  It may not daemonize (``-n``)
and has no pid file (``--pidfile=``): one that a crash left behind, with a number that is in use
again, would stop it.  Its children stay in its process group, so that launchd ends them with it,
even after a SIGKILL.
"""

from __future__ import annotations

import plistlib
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs

from gateway.config import Config, Gateway
from gateway.daemon import BEFORE_THE_LOG, longest_stop
from gateway.daemon.folder import private
from gateway.files import write_private

LABEL: Final = "local.claudegw"

#: Where programs are, beside what the PATH names: launchd's own is short, and lacks Homebrew.
_PROGRAMS: Final = ("/opt/homebrew/bin", "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")

#: Files that may be open.  Twisted waits with select() on a Mac, which takes none above 1023.
_FILES: Final = 1024

#: The same as a child may raise it for itself.
_MOST_FILES: Final = 8192


@attrs.frozen
class Installation:
    """
    What is to be started, and how it was started by hand.

    Attributes:
        twistd: the program.
        config: the configuration's file.
        folder: relative paths in the configuration begin here.
        path: the PATH; programs that the configuration names are looked for in it.
    """

    twistd: Path
    config: Path
    folder: Path
    path: str


def launch_agent(config: Config, here: Installation) -> dict[str, Any]:
    """
    The LaunchAgent's keys.

    Raises:
        ValueError: the socket is to be launchd's, and nothing says where it listens.
    """
    gateway, state = config.gateway, config.gateway.state_dir
    log, before = state / "claudegw.log", str(state / BEFORE_THE_LOG)
    twistd = [str(here.twistd), "-n", "--pidfile=", f"--logfile={log}"]
    path = dict.fromkeys((*filter(None, here.path.split(":")), *_PROGRAMS))
    return {
        "Label": LABEL,
        "ProgramArguments": [*twistd, "claudegw", "--config", str(here.config)],
        "WorkingDirectory": str(here.folder),
        "EnvironmentVariables": {"PATH": ":".join(path)},
        "RunAtLoad": True,
        "KeepAlive": True,
        # Seconds between two starts; it ends by itself only where it could not start.
        "ThrottleInterval": 10,
        # Seconds between SIGTERM and SIGKILL.
        "ExitTimeOut": ceil(longest_stop(config.longest_grace)),
        # Any other kind is slowed down while nobody looks at it.
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": _FILES},
        "HardResourceLimits": {"NumberOfFiles": _MOST_FILES},
        # What is said before the log begins.
        "StandardOutPath": before,
        "StandardErrorPath": before,
        **_sockets(gateway),
    }


def _sockets(gateway: Gateway) -> Mapping[str, Any]:
    """The key for ``launchd:NAME``: one socket at the gateway's `url`."""
    kind, _, name = gateway.listen.partition(":")
    if kind != "launchd":
        return {}
    if gateway.url is None:
        raise ValueError(f'gateway.url: expected "http://host:port", to listen on {gateway.listen}')
    parts = urlsplit(gateway.url)
    host = parts.hostname or ""
    return {
        "Sockets": {
            name: {
                "SockNodeName": host,
                "SockServiceName": str(parts.port or 80),
                # A name such as localhost would have two.
                "SockFamily": "IPv6" if ":" in host else "IPv4",
                "SockType": "stream",
            }
        }
    }


def install(agent: Mapping[str, Any], home: Path, state_dir: Path) -> Path:
    """
    Put the LaunchAgent into its place under `home`, whole or not at all; returns the place.

    The state folder is made as well: launchd writes there before the gateway can.

    Raises:
        OSError: it cannot be written.
    """
    private(state_dir)
    path = home / "Library/LaunchAgents" / f"{agent['Label']}.plist"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, plistlib.dumps(agent))
    return path
