"""What systemd hears."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from twisted.logger import LogEvent

from gateway.daemon import longest_stop
from gateway.daemon.notify import READY, notify, reloading, stopping


def heard(name: str, address: str, state: str) -> str:
    """What a socket at `address` gets when `state` is told to `name`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(10)
        systemd.bind(address)
        notify(state, {"NOTIFY_SOCKET": name})
        return systemd.recv(4096).decode()


def test_a_socket_in_the_file_system_hears_it(tmp_path: Path) -> None:
    """The state arrives as one datagram."""
    path = str(tmp_path / "notify")
    assert heard(path, path, READY) == "READY=1"


@pytest.mark.skipif(not Path("/proc").exists(), reason="Linux alone has abstract sockets")
def test_an_abstract_socket_hears_it() -> None:
    """A name that begins with @ is a socket without a file."""
    name = f"claudegw-test-{os.getpid()}"
    assert heard(f"@{name}", f"\0{name}", READY) == "READY=1"


def test_without_a_listener_nothing_happens(logged: list[LogEvent]) -> None:
    """Where nobody wants to hear anything, nothing is sent and nothing is said."""
    notify(READY, {})
    notify(READY, {"NOTIFY_SOCKET": ""})
    assert logged == []


def test_a_listener_that_is_gone_is_no_end(tmp_path: Path, logged: list[LogEvent]) -> None:
    """The gateway goes on without systemd, and the log says so."""
    notify(READY, {"NOTIFY_SOCKET": str(tmp_path / "nowhere")})
    (event,) = logged
    assert event["log_level"].name == "warn"


def test_a_stop_may_take_as_long_as_it_takes(tmp_path: Path) -> None:
    """The time that systemd is asked for is the grace and what comes after it, in microseconds."""
    path = str(tmp_path / "notify")
    lines = heard(path, path, stopping(3600)).split("\n")
    assert lines == ["STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(longest_stop(3600)) * 1_000_000}"]
    assert longest_stop(3600) > 3600


def test_a_reload_has_its_time() -> None:
    """The time at which a reload began is told by the monotonic clock."""
    name, time = reloading().split("\n")
    assert name == "RELOADING=1"
    assert time.removeprefix("MONOTONIC_USEC=").isdigit()
