"""Sockets that somebody else opened."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from ctypes import CDLL, CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_void_p, cast, sizeof
from errno import ENOENT
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet import endpoints
from twisted.internet.interfaces import IStreamServerEndpointStringParser
from twisted.internet.protocol import Factory, Protocol
from twisted.plugin import getPlugins
from twisted.python.systemd import ListenFDs

from gateway.config import ConfigError, Gateway
from gateway.daemon.sockets import Launchd, check_door, launch_activate_socket


@pytest.fixture
def launchd() -> Launchd:
    """The parser that Twisted finds."""
    plugins = getPlugins(IStreamServerEndpointStringParser)
    (found,) = (plugin for plugin in plugins if isinstance(plugin, Launchd))
    return found


@pytest.fixture(params=["127.0.0.1", "0.0.0.0", "::1", "::"])
def opened(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """A listening socket."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    if family == socket.AF_INET6 and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with socket.create_server((request.param, 0), family=family) as found:
        yield found


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.fixture
def loopback() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def handed_over(monkeypatch: pytest.MonkeyPatch, *sockets: socket.socket) -> None:
    """Let systemd have handed over `sockets`."""
    given = ListenFDs([found.fileno() for found in sockets], ["door"] * len(sockets))
    monkeypatch.setattr(endpoints._SystemdParser, "_sddaemon", given)


def mistake(gateway: Gateway) -> str:
    """The one thing that is wrong with a door."""
    with pytest.raises(ConfigError) as caught:
        check_door(gateway)
    (line,) = caught.value.mistakes
    return line


@pytest.mark.parametrize("listen", ["systemd:domain=INET:index=0", "systemd:domain=INET:name=door"])
def test_an_adopted_socket_says_itself_whether_it_needs_a_token(
    listen: str, opened: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that only this machine can reach needs none, any other one does."""
    handed_over(monkeypatch, opened)
    address = opened.getsockname()[0]
    check_door(Gateway(listen=listen, token="secret"))
    if address in ("127.0.0.1", "::1"):
        check_door(Gateway(listen=listen))
    else:
        said = mistake(Gateway(listen=listen))
        assert said == f"gateway.token: expected a token, since the socket listens on {address}"


def test_looking_at_a_socket_leaves_it_open(
    loopback: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is adopted later, by the gateway itself."""
    handed_over(monkeypatch, loopback)
    check_door(Gateway(listen="systemd:domain=INET:index=0"))
    socket.create_connection(loopback.getsockname(), 10).close()


def test_an_adopted_socket_in_the_file_system_needs_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may use it is the file system's business."""
    with closing(socket.socket(socket.AF_UNIX)) as found:
        found.bind(str(tmp_path / "gw.sock"))
        found.listen()
        handed_over(monkeypatch, found)
        check_door(Gateway(listen="systemd:domain=UNIX:index=0"))


@pytest.mark.parametrize(
    ("listen", "said"),
    [
        ("systemd:domain=INET:index=0", "nobody handed over 'systemd:domain=INET:index=0'"),
        ("systemd:domain=INET:name=door", "nobody handed over 'systemd:domain=INET:name=door'"),
        ("systemd:domain=INET", "no endpoint that Twisted knows"),
        ("launchd:gateway", "no endpoint that Twisted knows: this machine has no launchd"),
        ("launchd:", "no endpoint that Twisted knows"),
        ("tcp:http", "no endpoint that Twisted knows"),
    ],
)
def test_a_door_that_cannot_be_is_a_mistake(
    listen: str, said: str, launchd: Launchd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told by its key before anything is started."""
    monkeypatch.setattr(launchd, "activate", no_launchd)
    assert mistake(Gateway(listen=listen)).startswith(f"gateway.listen: {said}")


def test_a_domain_that_is_none(loopback: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is an address family of another planet a crash."""
    handed_over(monkeypatch, loopback)
    said = mistake(Gateway(listen="systemd:domain=MARS:index=0"))
    assert said.startswith("gateway.listen: no endpoint that Twisted knows")


def test_a_descriptor_that_is_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was handed over must be a socket."""
    with Path(os.devnull).open() as file:
        given = ListenFDs([file.fileno()], ["door"])
        monkeypatch.setattr(endpoints._SystemdParser, "_sddaemon", given)
        said = mistake(Gateway(listen="systemd:domain=INET:index=0"))
    assert said.startswith("gateway.listen: no endpoint that Twisted knows")


# --- launchd --------------------------------------------------------------------------------------


def no_launchd(_: str) -> list[int]:
    raise ValueError("this machine has no launchd")


def libc(descriptors: list[int], error: int = 0) -> Any:
    """A library whose launch_activate_socket gives `descriptors`, in memory that is to be freed."""
    malloc = CDLL(None).malloc
    malloc.restype = c_void_p

    def activate(name: bytes, found: Any, count: Any) -> int:
        assert name == b"gateway"
        if error:
            return error
        found[0] = cast(malloc(c_size_t(sizeof(c_int) * len(descriptors))), POINTER(c_int))
        for index, descriptor in enumerate(descriptors):
            found[0][index] = descriptor
        count[0] = len(descriptors)
        return 0

    kind = CFUNCTYPE(c_int, c_char_p, POINTER(POINTER(c_int)), POINTER(c_size_t))
    return SimpleNamespace(launch_activate_socket=kind(activate))


def test_the_sockets_of_launchd() -> None:
    """They come out of the C call as they went in."""
    assert launch_activate_socket("gateway", libc([7, 9])) == [7, 9]


def test_a_socket_that_launchd_does_not_have() -> None:
    """The C call's error becomes words."""
    with pytest.raises(ValueError, match=r"no socket 'gateway' for us: No such file"):
        launch_activate_socket("gateway", libc([], ENOENT))


def test_a_machine_without_launchd() -> None:
    """Where there is no such call, that is said."""
    with pytest.raises(ValueError, match="this machine has no launchd"):
        launch_activate_socket("gateway", SimpleNamespace())


class Greeting(Protocol):
    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(b"hello")
        self.transport.loseConnection()


async def test_a_socket_of_launchd_is_listened_on(
    launchd: Launchd, loopback: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who connected before we were there is answered, and the socket outlives our listening."""
    from twisted.internet import reactor
    from twisted.internet.threads import deferToThread

    library = libc([os.dup(loopback.fileno())])
    monkeypatch.setattr(launchd, "activate", lambda name: launch_activate_socket(name, library))
    monkeypatch.setattr(launchd, "_given", {})
    early = socket.create_connection(loopback.getsockname(), 10)
    check_door(Gateway(listen="launchd:gateway"))
    endpoint = endpoints.serverFromString(reactor, "launchd:gateway")
    port = await endpoint.listen(Factory.forProtocol(Greeting))
    try:
        assert await deferToThread(early.recv, 5) == b"hello"
    finally:
        early.close()
        await port.stopListening()
    socket.create_connection(loopback.getsockname(), 10).close()


def test_twistd_may_choose_its_reactor() -> None:
    """Finding the endpoint installs no reactor, or ``twistd -r`` would come too late."""
    look = "import gateway.daemon.sockets, sys; print('twisted.internet.reactor' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "False\n"


def test_launchd_is_asked_once(loopback: socket.socket) -> None:
    """It gives a socket once in a process, and the door is looked at before it is opened."""
    asked = []

    def activate(name: str) -> list[int]:
        asked.append(name)
        return [loopback.fileno()]

    parser = Launchd(activate)
    first = parser.parseStreamServer(None, "gateway")
    again = parser.parseStreamServer(None, "gateway")
    assert (first.fileno, first.addressFamily) == (loopback.fileno(), socket.AF_INET)
    assert again.fileno == first.fileno
    assert asked == ["gateway"]


@pytest.mark.parametrize("descriptors", [[], [7, 9]])
def test_launchd_must_have_one_socket(descriptors: list[int]) -> None:
    """A name that stands for several, or for none, has no endpoint."""
    with pytest.raises(ValueError, match="expected one socket 'gateway' of launchd, got"):
        Launchd(lambda _: descriptors).parseStreamServer(None, "gateway")


def test_a_socket_of_launchd_that_others_reach_needs_a_token(
    launchd: Launchd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with systemd, the socket says it."""
    with socket.create_server(("", 0)) as found:
        monkeypatch.setattr(launchd, "activate", lambda _: [found.fileno()])
        monkeypatch.setattr(launchd, "_given", {})
        assert "expected a token" in mistake(Gateway(listen="launchd:gateway"))
        check_door(Gateway(listen="launchd:gateway", token="secret"))
