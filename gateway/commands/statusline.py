"""
One line for Claude Code's status line: what this session waits for, and how fast its model is.

The client runs it again and again and waits for it, so it imports little (no Twisted, no attrs, no
argparse), asks the gateway once, on loopback, and never for long.  It says something whatever
happens, and never fails.
"""

from __future__ import annotations

import json
import socket
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from typing import Any, Final

from gateway.commands.running import Unusable, address

Json = Any

#: Seconds that the gateway gets to answer.
_PATIENCE: Final = 0.5

#: Bytes of what the client says, and of what the gateway says, that are read.
_LONGEST: Final = 4 * 1024 * 1024

#: What stands between two parts of the line.
_BETWEEN: Final = " · "

#: The tier that a session's turns go to (`gateway.policy.routes.MAIN`).
_MAIN: Final = "main"

DOWN: Final = "gateway down"


def run(arguments: Sequence[str]) -> int:
    """Print the line; `arguments` are those of the command.  Returns 0, whatever happened."""
    try:
        said = line(arguments)
    except Exception:  # noqa: BLE001  # a traceback would stand where the line should
        said = DOWN
    # Claude Code reads UTF-8, whatever the locale is.
    sys.stdout.buffer.write(f"{said}\n".encode(errors="replace"))
    sys.stdout.flush()
    return 0


def line(arguments: Sequence[str]) -> str:
    """The line, from the client's JSON on the standard input and the gateway's status."""
    client = b"" if sys.stdin.isatty() else sys.stdin.buffer.read(_LONGEST)
    session = _mapping(_parsed(client)).get("session_id")
    try:
        host, port, token = where(_config_file(arguments))
    except (OSError, ValueError, TypeError, AttributeError, Unusable) as error:
        return _printable(f"claudegw: no gateway in {_config_file(arguments)}: {error}")
    try:
        status = ask(host, port, token)
    except OSError:
        return DOWN
    return drawn(status, session if isinstance(session, str) else "")


def _config_file(arguments: Sequence[str]) -> str:
    for at, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--config":
            return value or "".join(arguments[at + 1 : at + 2])
    return "etc/gw.toml"


def where(path: str) -> tuple[str, int, str | None]:
    """
    Host, port and token of the gateway whose configuration is the file at `path`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no TOML, or says no place.
        Unusable: the gateway listens on no port.
    """
    with open(path, "rb") as file:  # noqa: PTH123  # pathlib is as slow as the rest together
        gateway = tomllib.load(file).get("gateway", {})
    if url := gateway.get("url"):
        from urllib.parse import urlsplit  # few configurations need it

        parts = urlsplit(url)
        if not parts.hostname:
            raise ValueError(f"gateway.url is {url!r}")
        return parts.hostname, parts.port or 80, gateway.get("token")
    host, port = address(gateway.get("listen", "tcp:9090"))
    return host, int(port), gateway.get("token")


def ask(host: str, port: int, token: str | None) -> Json:
    """
    What the gateway there says at ``/status``; None if that is nothing sensible.

    Raises:
        OSError: nobody answers, or not in time.
    """
    key = f"x-api-key: {token}\r\n" if token else ""
    name = f"[{host}]" if ":" in host else host
    end = monotonic() + _PATIENCE
    with socket.create_connection((host, port), _PATIENCE) as connection:
        question = f"GET /status HTTP/1.0\r\nHost: {name}:{port}\r\n{key}\r\n"
        connection.sendall(question.encode())
        said = bytearray()
        while len(said) < _LONGEST and (more := connection.recv(65536)):
            said += more
            connection.settimeout(max(0.001, end - monotonic()))
    head, _, body = said.partition(b"\r\n\r\n")
    return _parsed(bytes(body)) if head.split()[1:2] == [b"200"] else None


# --- the line -------------------------------------------------------------------------------------


def drawn(status: Json, session: str) -> str:
    """
    The line.

    Args:
        status: what ``/status`` says.
        session: the client's id of its session; "" shows whatever the gateway does.
    """
    said = _mapping(status)
    if not said:
        return "no gateway answers there"
    call = _under_way(_ours(said.get("calls"), session))
    past = next(filter(_is_turn, _ours(said.get("last"), session)), {})
    name = _word((call or past).get("tier")) or _MAIN
    tier = _mapping(_mapping(said.get("tiers")).get(name))
    state = _word(_mapping(tier.get("process")).get("state")) or "ready"
    generation = _speed(_mapping(tier.get("pace")).get("generation"))
    if state != "ready":
        doing = [state]
    elif not call:
        doing = [_cached(past) or "ready", generation]
    elif call.get("outcome") == "waiting":
        doing = _waiting(call)
    elif isinstance(call.get("progress"), Mapping):
        doing = _prefilling(call["progress"])
    else:
        doing = ["answering", _cached(call), generation]
    return _BETWEEN.join(part for part in [name, *doing] if part)


def _ours(calls: Json, session: str) -> list[Mapping[str, Json]]:
    """
    The calls of this session, and those that are of none.

    An older client does not say which session a call is of.
    """
    found = map(_mapping, calls if isinstance(calls, list) else ())
    return [call for call in found if not session or call.get("session") in (session, "", None)]


def _is_turn(call: Mapping[str, Json]) -> bool:
    """Whether the user waits for it, and not the client for a title or a number."""
    return call.get("kind") in ("turn", "subagent", "compaction")


def _under_way(calls: Iterable[Mapping[str, Json]]) -> Mapping[str, Json]:
    """The call that the user waits for; the one that is furthest, should it be several."""

    def rank(call: Mapping[str, Json]) -> tuple[bool, bool, float]:
        return not _is_turn(call), call.get("outcome") == "waiting", _number(call.get("place")) or 0

    return min((call for call in calls if call.get("kind") != "count"), key=rank, default={})


def _waiting(call: Mapping[str, Json]) -> list[str]:
    place, left = _number(call.get("place")), _duration(call.get("eta"))
    return [
        "waiting" if place is None else f"place {place:.0f} in line",
        f"{left} to go" if left else "",
    ]


def _prefilling(prefill: Mapping[str, Json]) -> list[str]:
    fraction, left = _number(prefill.get("fraction")), _duration(prefill.get("seconds_left"))
    return [
        "prefill" if fraction is None else f"prefill {100 * min(1.0, max(0.0, fraction)):.0f} %",
        f"{left} left" if left else "",
        _speed(prefill.get("tokens_per_second")),
    ]


def _cached(call: Mapping[str, Json]) -> str:
    """The share of a prompt that was there already."""
    new, cached = _number(call.get("input")), _number(call.get("cached"))
    if new is None or cached is None or new + cached <= 0:
        return ""
    return f"{100 * cached / (new + cached):.0f} % cached"


def _speed(value: Json) -> str:
    rate = _number(value)
    return "" if rate is None else f"{rate:.{0 if rate >= 100 else 1}f} tokens/s"


def _duration(value: Json) -> str:
    """Seconds as ``2:05``; less than a minute as ``45 s``."""
    number = _number(value)
    if number is None:
        return ""
    minutes, seconds = divmod(round(max(0.0, number)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}" if minutes else f"{seconds} s"


# --- values, whatever they are --------------------------------------------------------------------


def _parsed(raw: bytes) -> Json:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _mapping(value: Json) -> Mapping[str, Json]:
    return value if isinstance(value, Mapping) else {}


def _word(value: Json) -> str:
    return _printable(value) if isinstance(value, str) else ""


def _printable(text: str) -> str:
    """On one line, short, and without what would steer a terminal."""
    return "".join(each if each.isprintable() else "?" for each in text[:200])


def _number(value: Json) -> float | None:
    return value if isinstance(value, int | float) and abs(value) < 1e15 else None
