"""The LaunchAgent."""

from __future__ import annotations

import plistlib
from pathlib import Path

import attrs
import pytest

from gateway.config import Config, Gateway
from gateway.daemon import longest_stop
from gateway.daemon.launchd import Installation, install, launch_agent

GATEWAY = Gateway(state_dir=Path("/Users/me/state"))
HERE = Installation(
    twistd=Path("/Users/me/venv/bin/twistd"),
    config=Path("/Users/me/gw.toml"),
    folder=Path("/Users/me"),
    path="/Users/me/bin:/usr/bin",
)


def test_it_has_every_key() -> None:
    """What launchd is told: what to run, where, when, with how much, and where its words go."""
    agent = launch_agent(Config(GATEWAY), HERE)
    assert plistlib.loads(plistlib.dumps(agent)) == agent
    assert agent == {
        "Label": "local.claudegw",
        "ProgramArguments": [
            "/Users/me/venv/bin/twistd",
            "-n",
            "--pidfile=",
            "--logfile=/Users/me/state/claudegw.log",
            "claudegw",
            "--config",
            "/Users/me/gw.toml",
        ],
        "WorkingDirectory": "/Users/me",
        "EnvironmentVariables": {
            "PATH": "/Users/me/bin:/usr/bin:/opt/homebrew/bin:/usr/local/bin:/bin:/usr/sbin:/sbin"
        },
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 10,
        "ExitTimeOut": 90,
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": 1024},
        "HardResourceLimits": {"NumberOfFiles": 8192},
        "StandardOutPath": "/Users/me/state/launchd.log",
        "StandardErrorPath": "/Users/me/state/launchd.log",
    }


@pytest.mark.parametrize("grace", [0, 30, 0.5, 3600])
def test_it_waits_longer_than_the_gateway_needs(grace: float) -> None:
    """It is killed only after the answers have had their grace and the children their end."""
    patience = launch_agent(Config(attrs.evolve(GATEWAY, grace=grace)), HERE)["ExitTimeOut"]
    assert isinstance(patience, int)  # launchd reads no other number
    assert grace < longest_stop(grace) <= patience


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9090", ("127.0.0.1", "9090", "IPv4")),
        ("http://localhost:9090", ("localhost", "9090", "IPv4")),
        ("http://[::1]:81", ("::1", "81", "IPv6")),
        ("http://10.0.0.7", ("10.0.0.7", "80", "IPv4")),
    ],
)
def test_a_socket_that_launchd_opens(url: str, said: tuple[str, str, str]) -> None:
    """It is the one socket that the gateway's URL names, under the name that listen has."""
    gateway = attrs.evolve(GATEWAY, listen="launchd:door", url=url)
    (found,) = launch_agent(Config(gateway), HERE)["Sockets"].items()
    host, port, family = said
    assert found == (
        "door",
        {
            "SockNodeName": host,
            "SockServiceName": port,
            "SockFamily": family,
            "SockType": "stream",
        },
    )


def test_a_socket_that_launchd_opens_nowhere() -> None:
    """Without a URL nothing says where that should be."""
    with pytest.raises(ValueError, match=r"gateway\.url: expected"):
        launch_agent(Config(attrs.evolve(GATEWAY, listen="launchd:door")), HERE)


def test_it_is_put_into_its_place(tmp_path: Path) -> None:
    """The file is whole and its owner's alone, with nothing beside it; again the second time."""
    home, state = tmp_path / "home", tmp_path / "a/state"
    for label in ("first", "second"):
        agent = {**launch_agent(Config(GATEWAY), HERE), "ProcessType": label}
        path = install(agent, home, state)
        assert path == home / "Library/LaunchAgents/local.claudegw.plist"
        assert plistlib.loads(path.read_bytes()) == agent
        assert path.stat().st_mode & 0o777 == 0o600
        assert list(path.parent.iterdir()) == [path]
    assert state.stat().st_mode & 0o777 == 0o700


def test_what_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """A LaunchAgent that is there stays as it was, and no half of a new one is left."""
    path = install(launch_agent(Config(GATEWAY), HERE), tmp_path, tmp_path / "state")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        install({"Label": "local.claudegw", "Wrong": object()}, tmp_path, tmp_path / "state")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
