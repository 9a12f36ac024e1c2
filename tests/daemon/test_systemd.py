"""The units in etc/systemd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from gateway.config import Gateway
from gateway.daemon import longest_stop

ETC = Path(__file__).parents[2] / "etc/systemd"

#: A server on a GPU breaks on each of these.
FORBIDDEN = {"MemoryDenyWriteExecute", "PrivateDevices", "SystemCallFilter", "DevicePolicy"}


def unit(name: str) -> ConfigParser:
    """A unit, in which no key stands twice."""
    found = ConfigParser(
        strict=True, interpolation=None, delimiters=("=",), comment_prefixes=("#",)
    )
    found.optionxform = str  # type: ignore[assignment,method-assign]  # their case counts
    found.read_string((ETC / name).read_text())
    return found


def test_the_service() -> None:
    """It says when it listens, reads again, stops and ends; and that it is to be there."""
    service = unit("claudegw.service")["Service"]
    assert service["Type"] == "notify"
    assert service["NotifyAccess"] == "main"
    assert service["Restart"] == "always"
    assert service["KillMode"] == "mixed"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert unit("claudegw.service")["Unit"]["StartLimitIntervalSec"] == "0"
    program, *arguments = service["ExecStart"].split()
    assert program == "/opt/claudegw/bin/twistd"
    assert arguments == ["-n", "--pidfile=", "claudegw", "--config", "/etc/claudegw/gw.toml"]


def test_the_service_has_time_to_stop() -> None:
    """It is not killed while answers have their grace, as it is unless the configuration says."""
    assert int(unit("claudegw.service")["Service"]["TimeoutStopSec"]) > longest_stop(
        Gateway().grace
    )


def test_the_service_lets_a_server_use_its_card() -> None:
    """Nothing of what a driver needs is taken away."""
    service = unit("claudegw.service")["Service"]
    assert FORBIDDEN.isdisjoint(service)
    assert service["NoNewPrivileges"] == "yes"
    assert service["OOMPolicy"] == "continue"


def test_the_socket_is_the_door() -> None:
    """It is on loopback, and the service is not started without it."""
    assert unit("claudegw.socket")["Socket"]["ListenStream"] == "127.0.0.1:9090"
    service = unit("claudegw.service")
    assert service["Unit"]["Requires"] == "claudegw.socket"
    assert service["Install"]["Also"] == "claudegw.socket"


def verified(folder: Path) -> str:
    """What systemd has to say about the units in `folder`."""
    program = shutil.which("systemd-analyze")
    if program is None:
        why = "systemd-analyze is not here, so systemd's own check does not run"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    units = [folder / "claudegw.service", folder / "claudegw.socket"]
    done = subprocess.run(
        [program, "verify", *units],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    said = "".join(line for line in done.stdout.splitlines(True) if "claudegw" in line)
    return said or ("" if done.returncode == 0 else done.stdout)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """A copy of the units that starts the twistd of this environment."""
    here = str(Path(sys.executable).parent)
    for path in ETC.iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/claudegw/bin", here))
    return tmp_path


def test_systemd_takes_the_units(units: Path) -> None:
    """Its own check finds nothing to say about them."""
    assert verified(units) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("Restart=always", "Restart=often"), ("KillMode=", "KillMood="), ("twistd", "twisted")],
)
def test_systemd_would_see_a_mistake(right: str, wrong: str, units: Path) -> None:
    """What it is asked can be answered with no."""
    path = units / "claudegw.service"
    path.write_text(path.read_text().replace(right, wrong))
    assert verified(units) != ""
