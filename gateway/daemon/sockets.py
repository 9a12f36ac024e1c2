"""
The door's socket, where somebody else opened it and keeps it open from one gateway to the next.

systemd hands over descriptors to the process that it starts (Twisted's endpoint ``systemd:``).
launchd gives them when it is asked, once in a process (our endpoint ``launchd:NAME``, where NAME
stands in the plist's ``Sockets``; launch(3)).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from ctypes import CDLL, POINTER, byref, c_int, c_size_t
from typing import Any, ClassVar

import attrs
from twisted.internet.endpoints import AdoptedStreamServerEndpoint, serverFromString
from twisted.internet.interfaces import IStreamServerEndpointStringParser
from twisted.plugin import IPlugin
from zope.interface import implementer

from gateway.config import ConfigError, Gateway, is_loopback_address


def check_door(gateway: Gateway) -> None:
    """
    See that there can be a door, without opening it.

    Raises:
        ConfigError: there is no such endpoint, or an adopted socket can be reached from other
            machines and no token is asked for.
    """
    try:
        endpoint = serverFromString(None, gateway.endpoint)
        adopted = isinstance(endpoint, AdoptedStreamServerEndpoint)
        address = _bound_to(endpoint.fileno) if adopted else None
    except LookupError:
        raise ConfigError([f"gateway.listen: nobody handed over {gateway.listen!r}"]) from None
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ConfigError([f"gateway.listen: no endpoint that Twisted knows: {error}"]) from None
    if address is not None and gateway.token is None and not is_loopback_address(address):
        said = f"gateway.token: expected a token, since the socket listens on {address}"
        raise ConfigError([said])


def _bound_to(descriptor: int) -> str | None:
    """The address of a listening socket; None for one in the file system."""
    with _opened(descriptor) as found:
        return None if found.family == socket.AF_UNIX else str(found.getsockname()[0])


def _opened(descriptor: int) -> socket.socket:
    """A second socket on what `descriptor` is open on."""
    return socket.socket(fileno=os.dup(descriptor))


def launch_activate_socket(name: str, library: Any = None) -> list[int]:
    """
    The descriptors of the sockets that launchd opened under `name` for this process.

    Args:
        name: the key in ``Sockets`` of the plist.
        library: has the C function of that name; the one of the system unless given.

    Raises:
        ValueError: launchd has none, or has given them already.
    """
    system = CDLL(None)
    try:
        activate = (library or system).launch_activate_socket
    except AttributeError:
        raise ValueError("this machine has no launchd") from None
    found, count = POINTER(c_int)(), c_size_t()
    error = activate(name.encode(), byref(found), byref(count))
    if error:
        raise ValueError(f"launchd has no socket {name!r} for us: {os.strerror(error)}")
    try:
        return found[: count.value]
    finally:
        system.free(found)


@implementer(IPlugin, IStreamServerEndpointStringParser)
@attrs.define(eq=False)
class Launchd:
    """
    Twisted's parser of the endpoints ``launchd:NAME``.

    Attributes:
        activate: as `launch_activate_socket`.
    """

    prefix: ClassVar = "launchd"
    activate: Callable[[str], list[int]] = launch_activate_socket
    _given: dict[str, int] = attrs.field(factory=dict, init=False)

    def parseStreamServer(  # type: ignore[override]  # its arguments are what our strings have
        self, reactor: Any, name: str
    ) -> AdoptedStreamServerEndpoint:
        """
        The endpoint; the same one again when it is asked for again.

        Raises:
            ValueError: there is not exactly one socket of that name.
        """
        if name not in self._given:
            descriptors = self.activate(name)
            if len(descriptors) != 1:
                raise ValueError(f"expected one socket {name!r} of launchd, got {len(descriptors)}")
            self._given[name] = descriptors[0]
        with _opened(self._given[name]) as found:
            return AdoptedStreamServerEndpoint(reactor, self._given[name], found.family)
