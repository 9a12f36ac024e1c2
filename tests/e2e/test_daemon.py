"""A gateway that runs for months: as a daemon, under launchd, under systemd."""

from __future__ import annotations

import os
import plistlib
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any, Final

import pytest

from tests.e2e.clients import CLAUDEGW, eventually
from tests.e2e.stack import TWISTD, Running, free_port, start

#: Seconds for what takes no time on an idle machine.
PATIENCE: Final = 120

#: Bytes after which a log is rotated.
FULL: Final = 10 * 1024 * 1024

#: Starts a program as systemd does: with the socket of argument 1 as descriptor 3.
HAND_OVER: Final = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "door", "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[2], sys.argv[2:])
"""


def configured(folder: Path, listen: str, more: str = "") -> Path:
    """A configuration whose model nobody serves."""
    config = folder / "gw.toml"
    config.write_text(
        f"[gateway]\nlisten = '{listen}'\nstate_dir = '{folder}/state'\n{more}\n"
        "[tier.main]\nurl = 'http://127.0.0.1:9'\n"
    )
    return config


def is_well(port: int) -> bool:
    """Whether a gateway answers there."""
    return says_well(asking(port))


def asking(port: int) -> HTTPConnection:
    """A connection on which a gateway is asked whether it is well."""
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", "/healthz")
    return connection


def says_well(connection: HTTPConnection) -> bool:
    """Whether it says so."""
    with closing(connection):
        return connection.getresponse().status == 200


# --- as a daemon ----------------------------------------------------------------------------------


def test_a_daemon_starts_answers_rotates_and_stops_twice(tmp_path: Path) -> None:
    """Its log is rotated when it is full, and the oldest one goes when there are three of them."""
    port = free_port()
    config = configured(tmp_path, f"tcp:{port}:interface=127.0.0.1")
    (tmp_path / "gw.log.3").write_text("the oldest one")
    for mark in ("the first time", "the second time"):
        (tmp_path / "gw.log").write_text(mark)
        os.truncate(tmp_path / "gw.log", FULL)
        starts_answers_rotates_and_stops(config, port, mark)
    logs = sorted(tmp_path.glob("gw.log*"))
    assert [log.name for log in logs] == ["gw.log", "gw.log.1", "gw.log.2", "gw.log.3"]
    assert not any(begins(log, "the oldest one") for log in logs)
    assert not any("Traceback" in log.read_text() for log in logs)


def starts_answers_rotates_and_stops(config: Path, port: int, mark: str) -> None:
    """One life of a daemon whose log was full of `mark` when it began."""
    pid_file, log = config.with_name("gw.pid"), config.with_name("gw.log")
    pid = daemon(config, pid_file, log)
    try:
        assert eventually(lambda: is_open(port), PATIENCE)
        assert is_well(port)
        assert begins(log.with_name("gw.log.1"), mark)
        assert "listens on" in log.read_text()
        # The signal that makes every twistd rotate its log.
        os.kill(pid, signal.SIGUSR1)
        assert eventually(lambda: begins(log.with_name("gw.log.2"), mark), PATIENCE)
        assert is_well(port)
    finally:
        os.kill(pid, signal.SIGTERM)
        gone = eventually(lambda: not pid_file.exists(), PATIENCE)
    assert gone
    assert not is_open(port)
    # The pid file goes first.
    assert eventually(lambda: log.read_text().rstrip().endswith("Server Shut Down."), PATIENCE)


def begins(log: Path, mark: str) -> bool:
    """Whether there is such a log, and `mark` is the first that it says."""
    try:
        return log.read_text().startswith(mark)
    except FileNotFoundError:  # as it also is in the middle of a rotation
        return False


def daemon(config: Path, pid_file: Path, log: Path) -> int:
    """Start a gateway that leaves its terminal; returns its pid."""
    files = ["--pidfile", str(pid_file), "--logfile", str(log)]
    command = [str(TWISTD), *files, "claudegw", "--config", str(config)]
    done = subprocess.run(command, timeout=PATIENCE, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert eventually(lambda: pid_file.exists() and pid_file.read_text() != "", PATIENCE)
    return int(pid_file.read_text())


def is_open(port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
    except OSError:
        return False
    return True


# --- under launchd --------------------------------------------------------------------------------


@contextmanager
def launched(config: Path, home: Path) -> Iterator[tuple[Running, dict[str, Any]]]:
    """What launchd would start, started as launchd would, with what it was told."""
    command = [str(CLAUDEGW), "launchd", "--config", config.name]
    printed = subprocess.run(
        command, cwd=config.parent, timeout=PATIENCE, check=True, capture_output=True
    )
    agent = plistlib.loads(printed.stdout)
    port = int(config.read_text().partition("tcp:")[2].partition(":")[0])
    before = Path(agent["StandardOutPath"])
    before.parent.mkdir(exist_ok=True)
    with before.open("ab") as out:
        process = subprocess.Popen(
            agent["ProgramArguments"],
            cwd=agent["WorkingDirectory"],
            env={
                "HOME": str(home),
                **{name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ},
                **agent["EnvironmentVariables"],
            },
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    gateway = Running(process, port, before)
    try:
        yield gateway, agent
    finally:
        gateway.stop(PATIENCE)


def test_a_launch_agent_starts_a_gateway(tmp_path: Path) -> None:
    """What the plist says is enough to start it, and its log is the one that is bounded."""
    config = configured(tmp_path, f"tcp:{free_port()}:interface=127.0.0.1")
    log = tmp_path / "state/claudegw.log"
    log.parent.mkdir()
    log.write_text("before\n")
    os.truncate(log, FULL)
    with launched(config, tmp_path) as (gateway, agent):
        gateway.wait("/healthz")
        assert agent["ProgramArguments"][-1] == str(config)
        assert "listens on" in log.read_text()
        assert log.with_name("claudegw.log.1").read_text().startswith("before")
        assert gateway.stop(PATIENCE) == 0
    assert (tmp_path / "state/launchd.log").read_text() == ""
    assert not list(tmp_path.glob("*.pid"))


def test_a_launch_agent_that_fails_again_and_again_fills_no_disk(tmp_path: Path) -> None:
    """What went wrong can be read in launchd's file, which begins again when it is long."""
    config = configured(tmp_path, f"tcp:{free_port()}:interface=127.0.0.1")
    before = tmp_path / "state/launchd.log"
    before.parent.mkdir()
    before.write_bytes(b"x" * (1024 * 1024 + 1))
    with launched(config, tmp_path) as (gateway, agent):
        gateway.wait("/healthz")
    assert before.stat().st_size == 0
    config.write_text(config.read_text().replace("state_dir", "colour = 3\nstate_dir"))
    for _ in range(2):
        with before.open("ab") as out:
            done = subprocess.run(
                agent["ProgramArguments"], stdout=out, stderr=out, timeout=PATIENCE, check=False
            )
        assert done.returncode == 1
    assert before.read_text().count("gateway: unknown key: colour") == 2


# --- under systemd --------------------------------------------------------------------------------


def handed(door: socket.socket, config: Path, log: Path, **environ: str) -> Running:
    """A gateway that was handed `door`, as systemd does it."""
    twistd = [str(TWISTD), "-n", "--pidfile=", "claudegw", "--config", str(config)]
    command = [sys.executable, "-c", HAND_OVER, str(door.fileno()), *twistd]
    port = door.getsockname()[1]
    return start(command, port, log, pass_fds=(door.fileno(),), env={**os.environ, **environ})


@pytest.fixture
def door() -> Iterator[socket.socket]:
    """The socket that somebody else opened."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as found:
        yield found


def test_an_upgrade_refuses_no_connection(door: socket.socket, tmp_path: Path) -> None:
    """Who connects while no gateway runs is answered by the next one; nobody is refused."""
    config = configured(tmp_path, "systemd:domain=INET:index=0")
    port, stop = door.getsockname()[1], Event()
    gateways = [handed(door, config, tmp_path / "first.log")]
    with ThreadPoolExecutor(4) as clients:
        try:
            assert is_well(port)
            always = [clients.submit(asks_until, stop, port) for _ in range(4)]
            assert gateways[0].stop(PATIENCE) == 0
            # Nobody is there, and yet they are let in: what they ask waits in the socket.
            between = [asking(port) for _ in range(50)]
            gateways.append(handed(door, config, tmp_path / "second.log"))
            assert all(map(says_well, between))
            stop.set()
            outcomes = Counter(chain.from_iterable(asked.result(PATIENCE) for asked in always))
        finally:
            stop.set()
            ended = [gateway.stop(PATIENCE) for gateway in gateways]
    assert ended == [0, 0]
    assert outcomes["answered"] > 0
    assert outcomes["ConnectionRefusedError"] == 0


def asks_until(stop: Event, port: int) -> list[str]:
    """Ask one time after the other until told to stop; what became of each."""
    outcomes = []
    while not stop.is_set():
        try:
            outcomes.append("answered" if is_well(port) else "not well")
        except OSError as error:
            outcomes.append(type(error).__name__)
    return outcomes


def test_a_handed_over_door_to_others_needs_a_token(tmp_path: Path) -> None:
    """Without one the gateway does not start, with one it does."""
    with socket.create_server(("0.0.0.0", 0)) as door:
        config = configured(tmp_path, "systemd:domain=INET:index=0")
        gateway = handed(door, config, tmp_path / "without.log")
        assert gateway.process.wait(PATIENCE) == 1
        said = (tmp_path / "without.log").read_text()
        assert "gateway.token: expected a token, since the socket listens on 0.0.0.0" in said
        config = configured(tmp_path, "systemd:domain=INET:index=0", "token = 'secret'")
        gateway = handed(door, config, tmp_path / "with.log")
        try:
            gateway.wait("/healthz")
            assert gateway.ask("/v1/models")[0] == 401
        finally:
            gateway.stop(PATIENCE)


def test_systemd_is_told(door: socket.socket, tmp_path: Path) -> None:
    """It hears when clients are let in, and when the gateway begins to stop."""
    config = configured(tmp_path, "systemd:domain=INET:index=0", "grace = 7")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(PATIENCE)
        systemd.bind(str(tmp_path / "notify"))
        gateway = handed(door, config, tmp_path / "gw.log", NOTIFY_SOCKET=str(tmp_path / "notify"))
        try:
            assert systemd.recv(4096) == b"READY=1"
            assert is_well(gateway.port)
            gateway.process.send_signal(signal.SIGTERM)
            assert systemd.recv(4096) == b"STOPPING=1\nEXTEND_TIMEOUT_USEC=67000000"
            assert gateway.process.wait(PATIENCE) == 0
        finally:
            gateway.stop(PATIENCE)
