"""The command line of a server: what its tier needs, and what may be shown of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

from gateway.config import Server, Tier


def command(tier: Tier, server: Server, state_dir: Path) -> list[str]:
    """
    The command line of a tier's server.

    A llama-server, or our embedded one, gets the flags that the tier needs and that its command
    does not set; any other command stays as it is.
    """
    given = list(server.command)
    if given[:3] == ["python", "-m", "gateway.llama.embedded"]:
        given[0] = sys.executable
    elif Path(given[0]).name != "llama-server":
        return given
    if not server.manage_flags:
        return given
    parts = urlsplit(tier.url)
    host = tier.url.removeprefix("unix:") if tier.url.startswith("unix:") else parts.hostname
    wanted = {
        "--host": host,
        "--port": None if parts.port is None else str(parts.port),
        "--parallel": str(tier.slots),
        # Side calls that share a beginning must not cut the main conversation's end off.
        "--slot-prompt-similarity": "0",
        "--slot-save-path": str(state_dir / "slots"),
        "--sse-ping-interval": "5",
        "--api-key": tier.api_key,
    }
    short = {"--parallel": "-np", "--slot-prompt-similarity": "-sps"}
    for flag, value in wanted.items():
        if value is not None and flag not in given and short.get(flag) not in given:
            given += [flag, value]
    return given


def without_key(command: Sequence[str]) -> list[str]:
    """A command line as anybody may see it."""
    before = ("", *command)
    return [
        "***" if flag == "--api-key" else word for flag, word in zip(before, command, strict=False)
    ]


def socket_file(command: Sequence[str]) -> Path | None:
    """The socket on which a llama-server with this command line listens, if on one."""
    for flag, host in pairwise(command):
        if flag == "--host" and host.endswith(".sock"):
            return Path(host)
    return None
