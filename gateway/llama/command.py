"""The command line of a server: what its tier needs, and what may be shown of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from gateway.config import Server, Tier

#: The variable in which a server finds the key that it is to ask for.
KEY: Final = "LLAMA_API_KEY"


def command(
    tier: Tier,
    server: Server,
    state_dir: Path,
    cache_ram: Callable[[Sequence[str], int, Path], int | None] = lambda *_: None,
) -> list[str]:
    """
    The command line of a tier's server.

    A llama-server, or our embedded one, gets the flags that the tier needs and that its command
    does not set; any other command stays as it is.

    Args:
        tier: whose it is.
        server: how it is started.
        state_dir: where slots are saved.
        cache_ram: the MiB for conversations in RAM, where nobody says how many
            (`gateway.llama.ram.of_command`).
    """
    given = list(server.command)
    if _is_embedded(given):
        given[0] = sys.executable
    if not (server.manage_flags and _takes_flags(server.command)):
        return given
    parts, slots = urlsplit(tier.url), state_dir / "slots"
    host = tier.url.removeprefix("unix:") if tier.url.startswith("unix:") else parts.hostname
    wanted = {
        "--host": host,
        "--port": None if parts.port is None else str(parts.port),
        "--parallel": str(tier.slots),
        # Side calls that share a beginning must not cut the main conversation's end off.
        "--slot-prompt-similarity": "0",
        "--slot-save-path": str(slots),
        "--cache-ram": _text(tier.cache_ram),
        "--sse-ping-interval": "5",
    }
    short = {"--parallel": "-np", "--slot-prompt-similarity": "-sps", "--cache-ram": "-cram"}
    if tier.cache_ram is None and not {"--cache-ram", "-cram"} & {*given}:
        wanted["--cache-ram"] = _text(cache_ram(given, tier.slots, slots))
    for flag, value in wanted.items():
        if value is not None and flag not in given and short.get(flag) not in given:
            given += [flag, value]
    return given


#: Options of a llama-server whose value is nobody's business.
SECRET: Final = frozenset({"--api-key", "--hf-token", "-hft"})


def environment(tier: Tier, server: Server) -> dict[str, str]:
    """What a tier's server has in its environment besides ours: its key, which no list shows."""
    is_told = server.manage_flags and _takes_flags(server.command) and tier.key is not None
    key = {KEY: str(tier.key)} if is_told else {}
    return {**key, **server.env}


def _takes_flags(given: Sequence[str]) -> bool:
    """Whether this is a llama-server, or our embedded one."""
    return _is_embedded(given) or Path(given[0]).name == "llama-server"


def _is_embedded(given: Sequence[str]) -> bool:
    return [*given[:3]] == ["python", "-m", "gateway.llama.embedded"]


def _text(number: int | None) -> str | None:
    return None if number is None else str(number)


def option(command: Sequence[str], *names: str) -> str | None:
    """The value of a server's option, by any of its names; None where it is not there."""
    begin = 3 if "gateway.llama.embedded" in command[:3] else 1  # Python has a -m of its own
    return next((value for word, value in pairwise(command[begin:]) if word in names), None)


def without_key(command: Sequence[str]) -> list[str]:
    """A command line as anybody may see it."""
    before = ("", *command)
    return ["***" if flag in SECRET else word for flag, word in zip(before, command, strict=False)]


def socket_file(command: Sequence[str]) -> Path | None:
    """The socket on which a llama-server with this command line listens, if on one."""
    for flag, host in pairwise(command):
        if flag == "--host" and host.endswith(".sock"):
            return Path(host)
    return None
