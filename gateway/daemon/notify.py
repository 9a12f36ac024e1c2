"""
What systemd wants to hear from a service (sd_notify(3)): that it listens, that it stops.

One datagram on the socket that ``NOTIFY_SOCKET`` names; without that name nobody listens, and
nothing is sent.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Final

from twisted.logger import Logger

from gateway.daemon import longest_stop

#: Clients are let in, or: the configuration has been read again.
READY: Final = "READY=1"

#: Seconds for which a full socket is waited for.
_PATIENCE: Final = 5.0

log = Logger()


def stopping(grace: float) -> str:
    """The state of a service that stops, and that needs its time whatever its unit says."""
    return f"STOPPING=1\nEXTEND_TIMEOUT_USEC={longest_stop(grace) * 1e6:.0f}"


def reloading() -> str:
    """The state of a service that reads its configuration again; `READY` ends it."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"


def notify(state: str, environ: Mapping[str, str] = os.environ) -> None:
    """Tell `state`, lines of ``NAME=value``, to whoever `environ` says wants to hear it."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(_PATIENCE)
            out.sendto(state.encode(), address)
    except OSError as error:
        log.warn("cannot tell systemd {state}: {error}", state=state, error=error)
