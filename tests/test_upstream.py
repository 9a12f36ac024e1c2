"""Asking servers over real sockets: here is what memory does not show, TLS above all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
import trustme
from twisted.internet import reactor as real_reactor
from twisted.internet import ssl
from twisted.internet.interfaces import IListeningPort
from twisted.web.server import Site

from gateway.config import Tier as TierConfig
from gateway.remote import remote
from gateway.upstream import Health, Remote
from gateway.wire.errors import Unavailable
from tests.remote.scene import Elsewhere

reactor: Any = real_reactor


@attrs.define(eq=False)
class Secure:
    """An https server of the Messages API on this machine."""

    there: Elsewhere
    port: IListeningPort
    ca: trustme.CA
    folder: Path

    def client(self, host: str = "localhost", *, trusted: bool = True) -> Remote:
        """A client of it, by this name."""
        path = self.folder / "ca.pem"
        self.ca.cert_pem.write_to_path(path)
        number = self.port.getHost().port
        url, ca_file = f"https://{host}:{number}/prefix", path if trusted else None
        return remote(reactor, "main", TierConfig(url, "anthropic", ca_file=ca_file))


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Secure]:
    """One whose certificate says ``localhost``."""
    ca, there = trustme.CA(), Elsewhere()
    issued = ca.issue_cert("localhost")
    pem = issued.private_key_pem.bytes() + b"".join(p.bytes() for p in issued.cert_chain_pems)
    options = ssl.PrivateCertificate.loadPEM(pem).options()
    port = reactor.listenSSL(0, Site(there), options, interface="127.0.0.1")
    yield Secure(there, port, ca, tmp_path)
    pytest_twisted.blockon(port.stopListening())


def asked(client: Remote) -> Any:
    """What it says of itself, in its own time."""
    from twisted.internet.defer import Deferred

    return pytest_twisted.blockon(Deferred.fromCoroutine(client.props()))  # type: ignore[arg-type]


def test_a_server_that_its_certificate_vouches_for(secure: Secure) -> None:
    """It is asked under its own name, with the path that stands before all others."""
    assert asked(secure.client()).n_ctx == 5000
    ((path, _, headers),) = secure.there.asked
    assert path == "/prefix/v1/models"
    assert headers["host"].startswith("localhost:")


@pytest.mark.parametrize(
    ("host", "trusted"), [("127.0.0.1", True), ("localhost", False)], ids=["name", "certificate"]
)
def test_a_server_that_nobody_vouches_for(secure: Secure, host: str, *, trusted: bool) -> None:
    """Neither another name nor a certificate that nobody trusts is good enough to send a key to."""
    with pytest.raises(Unavailable, match="certificate"):
        asked(secure.client(host, trusted=trusted))
    assert secure.there.asked == []


def test_nobody_listens(secure: Secure) -> None:
    """That is a server which is down, and may come."""
    client = secure.client()
    pytest_twisted.blockon(secure.port.stopListening())
    with pytest.raises(Unavailable, match="No model server answers"):
        asked(client)
    assert Health.DOWN
