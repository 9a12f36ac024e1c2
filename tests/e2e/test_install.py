"""
What people do with it: install it, start it, stop it.

The wheels are those that bin/get-wheels made; nothing here needs a network.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from threading import Event
from typing import Any, Final

import attrs
import orjson
import pytest

from tests.e2e.clients import eventually
from tests.e2e.scripted_llama import Block, ScriptedLlama, Text
from tests.e2e.stack import ROOT, TWISTD, Running, free_port, start, start_gateway

WHEELS: Final = ROOT / ".cache/wheels"

#: Seconds for what takes no time on an idle machine.
PATIENCE: Final = 120

HI: Final = {"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}

MISTAKES: Final = """
[gateway]
listen = "9090"
grace = -1
colour = "blue"

[tier.main]
url = "ftp://127.0.0.1"
slots = "one"

[tier.small]
slots = 2

[[route]]
model = 3
tier = "small"
"""


def run(command: Sequence[object], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command to its end, from a folder that is not the repository's."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=10 * PATIENCE,
        check=False,
        # Only what is installed counts, not what the environment adds.
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )


def configured(folder: Path, url: str, port: int) -> Path:
    """A configuration of a gateway on `port`, in front of a server that somebody else runs."""
    config = folder / "gw.toml"
    config.write_text(
        f'[gateway]\nlisten = "tcp:{port}:interface=127.0.0.1"\nstate_dir = "{folder}/state"\n'
        f'[tier.main]\nurl = "{url}"\n'
    )
    return config


@contextmanager
def asked(port: int, **more: Any) -> Iterator[HTTPResponse]:
    """The answer to a message, as far as it has come."""
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("POST", "/v1/messages", orjson.dumps({**HI, **more}))
        yield connection.getresponse()
    finally:
        connection.close()


def generated(port: int) -> int:
    """The tokens that a model generates for a message."""
    with asked(port) as answer:
        message = orjson.loads(answer.read())
        assert answer.status == 200, message
        return int(message["usage"]["output_tokens"])


def is_open(port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
    except OSError:
        return False
    return True


# --- installed ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that was empty before claudegw was installed in it."""
    assert list(WHEELS.glob("claudegw-*.whl")), "there are no wheels: run bin/get-wheels"
    folder = tmp_path_factory.mktemp("installed")
    made = run([sys.executable, "-m", "venv", folder / "venv"], folder)
    assert made.returncode == 0, made.stdout
    pip = [folder / "venv/bin/python", "-m", "pip", "--disable-pip-version-check", "install"]
    done = run([*pip, "--no-index", "--find-links", WHEELS, "claudegw"], folder)
    assert done.returncode == 0, done.stdout
    return folder / "venv/bin"


def test_the_wheel_has_every_module(installed: Path, tmp_path: Path) -> None:
    """What is installed is what stands in the repository, no module more and none less."""
    where = "import gateway; print(gateway.__path__[0])"
    found = Path(run([installed / "python", "-c", where], tmp_path).stdout.strip())
    assert ROOT not in found.parents
    assert modules(found) == modules(ROOT / "gateway"), "outdated wheels? run bin/get-wheels"


def modules(package: Path) -> dict[str, bytes]:
    """The files of a package with their content."""
    files = (path for path in package.rglob("*") if path.suffix in (".py", ".typed"))
    return {str(path.relative_to(package)): path.read_bytes() for path in files}


def test_an_installed_twistd_knows_claudegw(installed: Path, tmp_path: Path) -> None:
    """``twistd --help`` lists claudegw, and the command of that name is there."""
    assert "claudegw" in run([installed / "twistd", "--help"], tmp_path).stdout
    command = run([installed / "claudegw", "settings", "--help"], tmp_path)
    assert command.returncode == 0
    assert "--config" in command.stdout


@pytest.mark.server
def test_an_installed_gateway_serves_and_stops(
    installed: Path, main_server: Running, tmp_path: Path
) -> None:
    """``twistd -n claudegw --config FILE`` answers a message, and SIGTERM ends it with status 0."""
    port = free_port()
    config = configured(tmp_path, main_server.url, port)
    command = [str(installed / "twistd"), "-n", "claudegw", "--config", str(config)]
    gateway = start(command, port, tmp_path / "gateway.log", cwd=tmp_path)
    try:
        gateway.wait("/healthz")
        assert (tmp_path / "twistd.pid").exists()
        assert generated(port) > 0
    finally:
        status = gateway.stop(PATIENCE)
    assert status == 0
    assert not (tmp_path / "twistd.pid").exists()
    assert "Traceback" not in gateway.log.read_text()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.server
def test_an_installed_gateway_runs_as_a_daemon(
    installed: Path, main_server: Running, tmp_path: Path
) -> None:
    """Without ``-n`` it leaves its terminal, answers, and is stopped by its pid file."""
    port, pid_file, log = free_port(), tmp_path / "gw.pid", tmp_path / "gw.log"
    config = configured(tmp_path, main_server.url, port)
    files = ["--pidfile", pid_file, "--logfile", log]
    done = run([installed / "twistd", *files, "claudegw", "--config", config], tmp_path)
    assert done.returncode == 0, done.stdout
    assert eventually(pid_file.exists, PATIENCE)
    pid = int(pid_file.read_text())
    try:
        assert os.getsid(pid) != os.getsid(0)
        assert eventually(lambda: is_open(port), PATIENCE)
        assert generated(port) > 0
    finally:
        os.kill(pid, signal.SIGTERM)
        gone = eventually(lambda: not pid_file.exists(), PATIENCE)
    assert gone
    assert not is_open(port)
    # The pid file goes first.
    assert eventually(lambda: log.read_text().rstrip().endswith("Server Shut Down."), PATIENCE)
    assert "Traceback" not in log.read_text()


def test_an_editable_install_is_found_from_anywhere(tmp_path: Path) -> None:
    """The ``twistd`` of the repository's own environment knows claudegw in any folder."""
    assert "claudegw" in run([TWISTD, "--help"], tmp_path).stdout


# --- not started ----------------------------------------------------------------------------------


def test_every_mistake_of_a_configuration_is_told(tmp_path: Path) -> None:
    """A configuration with mistakes ends the start with status 1, each said with its key."""
    config = tmp_path / "gw.toml"
    config.write_text(MISTAKES)
    done = run([TWISTD, "-n", "--pidfile=", "claudegw", "--config", config], tmp_path)
    assert done.returncode == 1
    for key in (
        "gateway.listen:",
        "gateway.grace:",
        "gateway: unknown key: colour",
        "tier.main.url:",
        "tier.main.slots:",
        "tier.small.url:",
        "route[0].model:",
    ):
        assert f"\n  {key}" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_missing_configuration_is_told(tmp_path: Path) -> None:
    """Without its configuration the start ends with status 1 and the path that was looked for."""
    config = tmp_path / "missing.toml"
    done = run([TWISTD, "-n", "--pidfile=", "claudegw", "--config", config], tmp_path)
    assert done.returncode == 1
    assert f"{config}: No such file" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("foreground", [True, False], ids=["foreground", "daemon"])
def test_a_taken_port_ends_the_start(foreground: bool, tmp_path: Path) -> None:
    """Where somebody else listens already, the start ends with status 1 and leaves no pid file."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = configured(tmp_path, "http://127.0.0.1:9", port)
        files = ["--pidfile", tmp_path / "gw.pid", "--logfile", tmp_path / "gw.log"]
        how = ["-n"] if foreground else []
        done = run([TWISTD, *how, *files, "claudegw", "--config", config], tmp_path)
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stdout + (tmp_path / "gw.log").read_text()
    # A daemon tells its status first.
    assert eventually(lambda: not (tmp_path / "gw.pid").exists(), PATIENCE)


# --- stopped --------------------------------------------------------------------------------------


@attrs.frozen
class Paused(Sequence[Block]):
    """An answer of two parts, the second of which waits for the test."""

    go_on: Event

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        if index == 1:
            self.go_on.wait(PATIENCE)
        return (Text("before"), Text("after"))[index]


#: A child of the gateway that leaves its pid and then does nothing.
IDLER: Final = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(600)
"""


@attrs.frozen
class Stopping:
    """
    A gateway that was sent SIGTERM when the first half of a stream had come.

    Attributes:
        answer: the stream.
        go_on: lets its second half come.
        child: the pid of the gateway's child, if it has one.
    """

    gateway: Running
    answer: HTTPResponse
    go_on: Event
    child: int | None

    def ends_well(self) -> None:
        """The gateway ends with status 0 and leaves neither a child nor a complaint."""
        assert self.gateway.process.wait(PATIENCE) == 0
        assert self.child is None or not is_alive(self.child)
        assert "Traceback" not in self.gateway.log.read_text()


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def asked_to_stop(folder: Path, grace: float, supervises: bool) -> Iterator[Stopping]:
    """A gateway that was sent SIGTERM in the middle of a stream, and may have a child."""
    go_on, pid_file, child = Event(), folder / "child.pid", None
    more = f"grace = {grace}"
    if supervises:
        idle = orjson.dumps([sys.executable, "-c", IDLER, str(pid_file)])
        more += f"\n\n[tier.main.server]\ncommand = {idle.decode()}"
    with ScriptedLlama(lambda _: Paused(go_on)).serving() as llama:
        gateway = start_gateway(folder, {"main": {"url": llama.url}}, more)
        try:
            if supervises:
                assert eventually(
                    lambda: pid_file.exists() and pid_file.read_text() != "", PATIENCE
                )
                child = int(pid_file.read_text())
            with asked(gateway.port, stream=True) as answer:
                while b'"text":"befo' not in answer.readline():
                    assert not answer.closed
                gateway.process.send_signal(signal.SIGTERM)
                yield Stopping(gateway, answer, go_on, child)
        finally:
            go_on.set()
            gateway.stop()
            if child is not None and is_alive(child):
                os.kill(child, signal.SIGKILL)


either_way = pytest.mark.parametrize("supervises", [True, False], ids=["a child", "no child"])


@either_way
def test_a_stream_in_flight_may_end(supervises: bool, tmp_path: Path) -> None:
    """After SIGTERM nobody comes in any more, and a stream under way comes to its own end."""
    with asked_to_stop(tmp_path, 600, supervises) as stopping:
        assert eventually(lambda: not is_open(stopping.gateway.port), PATIENCE)
        assert stopping.gateway.process.poll() is None
        stopping.go_on.set()
        rest = stopping.answer.read()
        assert b'"text":"afte' in rest
        assert rest.endswith(b'data: {"type":"message_stop"}\n\n')
        stopping.ends_well()


@either_way
def test_a_stream_that_does_not_end_is_cut(supervises: bool, tmp_path: Path) -> None:
    """When the grace period is over, a stream is cut so that its client sees it, and we end."""
    with asked_to_stop(tmp_path, 1, supervises) as stopping:
        with pytest.raises((HTTPException, OSError)):
            stopping.answer.read()
        stopping.ends_well()
