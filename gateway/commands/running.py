"""
The running gateway, as a command on its machine finds it and asks it.

It imports next to nothing: the status line asks where the gateway is, several times a second.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway.config import Config, Gateway

Json = Any


class Unusable(Exception):
    """The command cannot do what it was asked; the message says what to do."""


class NoGateway(Unusable):
    """Nobody listens where the gateway should."""


def ask(config: Config, path: str) -> Json:
    """
    What the running gateway says at `path`.

    Raises:
        NoGateway: there is none.
        Unusable: it refuses, or is something else.
    """
    from http import HTTPStatus
    from http.client import HTTPConnection, HTTPException
    from urllib.parse import urlsplit

    from gateway.figures import line

    parts = urlsplit(url_of(config.gateway))
    headers = {"x-api-key": config.gateway.token} if config.gateway.token else {}
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        said = json.loads(answer.read())
        if answer.status != HTTPStatus.OK:
            raise Unusable(f"The gateway says: {line(said['error']['message'])}")
    except ConnectionRefusedError as error:
        raise NoGateway(str(no_gateway(config, error))) from None
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        raise no_gateway(config, error) from None
    finally:
        connection.close()
    return said


def no_gateway(config: Config, why: object) -> Unusable:
    """What is raised where no gateway answers, or something that is none."""
    return Unusable(
        f"No gateway answers at {url_of(config.gateway)} ({why}). Start it first:"
        " twistd -n claudegw --config FILE"
    )


def url_of(gateway: Gateway) -> str:
    """Where a client on this machine finds the gateway; raises Unusable."""
    return gateway.url or base_url(gateway.listen)


def base_url(listen: str) -> str:
    """
    The URL under which a client on this machine reaches the endpoint `listen`.

    Raises:
        Unusable: Claude Code cannot reach it, or the endpoint does not say where it is.
    """
    host, port = address(listen)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def address(listen: str) -> tuple[str, str]:
    """Host and port of that URL; raises Unusable."""
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
    return host, port
