"""How the doctor says what it found."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from gateway.cli import main
from gateway.commands import doctor
from gateway.commands.doctor import report
from gateway.commands.doctor.finding import Finding
from gateway.commands.doctor.servers import listens_at
from tests.commands.doctor.world import World, look

OK = Finding("python", "ok", "Python 3.12")
BAD = Finding("main.window", "problem", "4096 tokens", "Put `--ctx-size 65536` there")
SLOW = Finding("main.slots", "warning", "2 slots", "Set `slots = 2`")


def shown(*found: Finding, width: int = 40) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(report.page(found), soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("url", "flag"),
    [
        ("http://127.0.0.1:8080", "--port 8080"),
        ("http://studio.local", "--port 80"),
        ("unix:/run/llama.sock", "--host /run/llama.sock"),
    ],
)
def test_where_a_server_is_to_listen(url: str, flag: str) -> None:
    """As its tier's url says, with a port, without one, or behind a socket."""
    assert listens_at(url) == flag


def test_a_remedy_stays_on_one_line() -> None:
    """A command can be copied, however narrow the terminal is."""
    command = f"`twistd -n claudegw --config /{'x' * 100}/gw.toml`"
    assert command in shown(Finding("gateway", "problem", "down", command))


def test_it_says_what_follows() -> None:
    """A problem keeps Claude Code from working; a warning does not."""
    assert "Claude Code would work. (0 problems, 1 warning)" in shown(OK, SLOW)
    assert "would not work yet. (1 problem, 1 warning)" in shown(OK, BAD, SLOW)


def test_a_server_cannot_steer_the_terminal() -> None:
    """What would move the cursor, colour or rename the window is not passed on."""
    hostile = "b1\x1b[2J\x1b]0;owned\x07\u202e\r\n[bold]x[/bold]" + "y" * 10_000
    said = shown(Finding(f"ma\x1bin.{hostile}", "warning", hostile, hostile))
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(said)
    assert "[bold]x[/bold]" in said
    assert len(said) < 5000


def test_json_is_a_list_of_findings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With --json a program gets the same findings, and the exit status says the same."""
    world = World.built(tmp_path)
    found = look(world)
    assert doctor.run(world.path, as_json=True, machine=world) == 0
    said = json.loads(capsys.readouterr().out)
    assert [each["check"] for each in said] == [each.check for each in found]
    assert {frozenset(each) for each in said} == {frozenset({"check", "status", "found", "remedy"})}
    world.running = False
    assert doctor.run(world.path, as_json=True, machine=world) == 1


def test_the_command_takes_a_broken_configuration(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A configuration that no other command takes is what this one is for."""
    path = tmp_path / "gw.toml"
    path.write_text("[gateway]\ngraze = 1\n")
    assert main(["doctor", "--json", "--config", str(path)]) == 1
    found = [each for each in json.loads(capsys.readouterr().out) if each["check"] == "config"]
    assert [each["status"] for each in found] == ["problem", "problem"]
    assert "unknown key: graze" in found[0]["found"]
