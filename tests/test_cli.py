"""The ``claudegw`` command."""

from __future__ import annotations

import json
import os
import plistlib
import shlex
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import attrs
import pytest

from gateway.cli import main
from gateway.commands.running import Unusable, base_url
from gateway.commands.settings import longest_answer, opencode, sdk, settings, status_line
from gateway.config import parse
from gateway.history import FILE, Bounds, History
from gateway.ledger import Record
from gateway.policy.calls import KINDS

MAIN = {"url": "http://127.0.0.1:1"}
BOTH = parse({"tier": {"main": MAIN, "small": MAIN}}, KINDS)


def test_the_settings_have_the_true_window() -> None:
    """Claude Code learns the window, the output limit and a name for each of its models."""
    env = settings(BOTH, {"main": 65536, "small": 4096})["env"]
    assert env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "65536"
    assert env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "8192"
    assert env["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:9090"
    assert env["ANTHROPIC_MODEL"] == "claudegw-main"
    assert env["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "claudegw-small"


def test_without_a_small_tier_everything_is_main() -> None:
    """A gateway with one tier names that one for every model."""
    only_main = parse({"tier": {"main": MAIN}}, KINDS)
    env = settings(only_main, {"main": 65536})["env"]
    assert env["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "claudegw-main"


@pytest.mark.parametrize("window", [16384, 32768, 65536, 131072, 202752])
def test_the_output_limit_leaves_room_to_compact(window: int) -> None:
    """Claude Code compacts at window - limit - 13 000, which must be well above nothing."""
    assert window - longest_answer(window) - 13_000 > window // 8


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("tcp:9090:interface=127.0.0.1", "http://127.0.0.1:9090"),
        ("tcp:9090", "http://127.0.0.1:9090"),
        ("tcp:port=80:interface=192.168.0.7", "http://192.168.0.7:80"),
        ("tcp:9090:interface=\\:\\:1", "http://[::1]:9090"),
    ],
)
def test_the_base_url(listen: str, url: str) -> None:
    """The URL is where a client on this machine finds the endpoint."""
    assert base_url(listen) == url


def test_a_unix_socket_has_no_base_url() -> None:
    """Claude Code cannot use a unix socket, and the message says so."""
    with pytest.raises(Unusable, match="needs a TCP port"):
        base_url("unix:/tmp/claudegw.sock")


def test_a_url_of_its_own() -> None:
    """Where the endpoint does not say it, the configuration says where clients find us."""
    gateway = {"listen": "systemd:domain=INET:index=0", "url": "http://127.0.0.1:9091"}
    config = parse({"gateway": gateway, "tier": {"main": MAIN}}, KINDS)
    assert settings(config, {"main": 65536})["env"]["ANTHROPIC_BASE_URL"] == gateway["url"]
    with pytest.raises(Unusable, match="say it as url in"):
        base_url(gateway["listen"])


def test_without_a_gateway_it_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With nobody at the port the command exits 1 and names the command that starts one."""
    config = tmp_path / "gw.toml"
    config.write_text(
        '[gateway]\nlisten = "tcp:1:interface=127.0.0.1"\n[tier.main]\nurl = "http://127.0.0.1:2"\n'
    )
    assert main(["settings", "--config", str(config)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "twistd -n claudegw" in said.err


def test_a_wrong_config_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mistake of the configuration has a line."""
    config = tmp_path / "gw.toml"
    config.write_text("[gateway]\ngrace = true\nfoo = 1\n")
    assert main(["settings", "--config", str(config)]) == 1
    said = capsys.readouterr().err
    assert "gateway.grace: expected a number" in said
    assert "gateway: unknown key: foo" in said


def test_the_settings_are_json() -> None:
    """What is printed is what --settings takes."""
    found = settings(BOTH, {"main": 32768, "small": 4096})
    assert json.loads(json.dumps(found)) == found
    assert found["permissions"]["deny"] == ["WebSearch"]


def test_opencode_has_the_true_windows() -> None:
    """Each tier that is up is a model with its limits; titles and the like go to the small one."""
    found = opencode(BOTH, {"main": 65536, "small": 16384})
    provider = found["provider"]["claudegw"]
    assert provider["npm"] == "@ai-sdk/openai-compatible"
    assert provider["options"]["baseURL"] == "http://127.0.0.1:9090/v1"
    assert provider["options"]["timeout"] is False
    limits = {name: model["limit"] for name, model in provider["models"].items()}
    assert limits == {
        "claudegw-main": {"context": 65536, "output": 8192},
        "claudegw-small": {"context": 16384, "output": longest_answer(16384)},
    }
    assert (found["model"], found["small_model"]) == (
        "claudegw/claudegw-main",
        "claudegw/claudegw-small",
    )
    assert json.loads(json.dumps(found)) == found


def test_opencode_while_small_is_down() -> None:
    """A model that is not there is not named."""
    found = opencode(BOTH, {"main": 65536})
    assert list(found["provider"]["claudegw"]["models"]) == ["claudegw-main"]
    assert found["small_model"] == "claudegw/claudegw-main"


def test_the_sdks_have_their_own_names() -> None:
    """Each SDK finds the gateway and something to show; the models have names."""
    with_token = parse({"gateway": {"token": "key"}, "tier": {"main": MAIN}}, KINDS)
    assert sdk(with_token) == {
        "ANTHROPIC_BASE_URL": "http://127.0.0.1:9090",
        "ANTHROPIC_AUTH_TOKEN": "key",
        "ANTHROPIC_API_KEY": "key",
        "OPENAI_BASE_URL": "http://127.0.0.1:9090/v1",
        "OPENAI_API_KEY": "key",
        "CLAUDEGW_MODEL": "claudegw-main",
        "CLAUDEGW_SMALL_MODEL": "claudegw-main",
    }
    assert sdk(BOTH)["OPENAI_API_KEY"] == "none"


def test_the_status_line_is_a_command() -> None:
    """It runs from any folder, whatever the configuration is called."""
    program, *rest = shlex.split(status_line(Path("my own.toml")))
    assert Path(program).exists()
    assert rest == ["statusline", "--config", str(Path.cwd() / "my own.toml")]


# --- the status -----------------------------------------------------------------------------------


@attrs.define(eq=False)
class Door:
    """
    A gateway that says what a test wants it to say.

    Attributes:
        config: a configuration that leads to it.
        status: the HTTP status of all its answers.
        said: the JSON of its answers.
        asked: each request: its path and the key that it showed.
    """

    config: Path
    status: int = 200
    said: Any = None
    asked: list[tuple[str, str | None]] = attrs.field(factory=list)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    """One that listens, and wants a key."""
    door = Door(tmp_path / "gw.toml")

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # called by this name
            door.asked.append((self.path, self.headers["x-api-key"]))
            body = json.dumps(door.said).encode()
            self.send_response(door.status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        door.config.write_text(
            f"[gateway]\nlisten = 'tcp:{server.server_port}:interface=127.0.0.1'\ntoken = 'key'\n"
            "[tier.main]\nurl = 'http://127.0.0.1:2'\n"
        )
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield door
        server.shutdown()
        thread.join()


STATUS = {"version": "9.9", "tiers": {}, "calls": [], "last": []}


def test_the_status_is_drawn(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the output is no terminal, the running gateway's status is drawn once."""
    door.said = STATUS
    assert main(["status", "--config", str(door.config)]) == 0
    assert capsys.readouterr().out.startswith("claudegw 9.9\n\nTiers ──")
    assert door.asked == [("/status", "key")]


def test_the_status_is_drawn_once(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --once also in a terminal."""

    def sleep(_: float) -> None:
        raise AssertionError("it wants to draw again")

    monkeypatch.setattr("gateway.cli.time.sleep", sleep)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    door.said = STATUS
    assert main(["status", "--once", "--config", str(door.config)]) == 0
    assert "claudegw 9.9" in capsys.readouterr().out
    assert len(door.asked) == 1


def test_the_status_is_drawn_live(
    door: Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal it is drawn again each second, until it is interrupted, which is no error."""
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("gateway.cli.time.sleep", sleep)
    door.said = STATUS
    assert main(["status", "--config", str(door.config)]) == 0
    assert pauses == [1.0, 1.0, 1.0]
    assert len(door.asked) == 3
    assert capsys.readouterr().err == ""


def test_the_status_as_json(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    """What the gateway says, as it says it."""
    door.said = {**STATUS, "new": [1]}
    assert main(["status", "--json", "--config", str(door.config)]) == 0
    assert json.loads(capsys.readouterr().out) == door.said


def test_without_a_gateway_there_is_no_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence on what to do, and exit status 1."""
    config = tmp_path / "gw.toml"
    config.write_text('[gateway]\nlisten = "tcp:1"\ntoken = "x"\n[tier.main]\nurl = "http://h:2"\n')
    assert main(["status", "--config", str(config)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("claudegw: No gateway answers at http://127.0.0.1:1 (")
    assert said.err.count("\n") == 1


# --- the calls that are over ----------------------------------------------------------------------


def past(*numbers: int) -> list[Any]:
    """Calls of these numbers."""
    return [
        Record(f"req_{number}", 1e9 + number, 0.0, kind="turn", tier="main").as_json(0.0)
        for number in numbers
    ]


@pytest.fixture
def file(door: Door, tmp_path: Path) -> Path:
    """A ledger with six calls, in the state folder of the door's configuration."""
    state = tmp_path / "state"
    state.mkdir()
    text = door.config.read_text()
    door.config.write_text(text.replace("[gateway]", f"[gateway]\nstate_dir = '{state}'"))
    writer = History(state / FILE, Bounds(36_500, 100), None)
    writer.start()
    for call in past(1, 2, 3, 4, 5, 6):
        writer.put(call)
    writer.stop()
    return state / FILE


def listed(door: Door, capsys: pytest.CaptureFixture[str], count: int) -> list[str]:
    """The ids that ``status --last`` prints."""
    assert main(["status", "--last", str(count), "--json", "--config", str(door.config)]) == 0
    return [call["id"] for call in json.loads(capsys.readouterr().out)]


def test_the_last_calls_of_a_running_gateway(
    door: Door, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is asked first; the file has those that it does not remember."""
    door.said = {**STATUS, "last": past(8, 7)}
    assert listed(door, capsys, 2) == ["req_8", "req_7"]
    assert listed(door, capsys, 1) == ["req_8"]
    assert listed(door, capsys, 4) == ["req_6", "req_5", "req_4", "req_3"]
    file.unlink()
    assert listed(door, capsys, 4) == ["req_8", "req_7"]


def test_the_last_calls_of_a_gateway_that_is_down(
    door: Door, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are read from its file, and nothing is changed there."""
    door.status = 500
    before = file.read_bytes()
    assert listed(door, capsys, 2) == ["req_6", "req_5"]
    assert main(["status", "--last", "50", "--config", str(door.config)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["when", "kind", "tier"]
    assert len(rows) == 6
    assert "Sep" in rows[0]
    assert "turn" in rows[0]
    assert file.read_bytes() == before


@pytest.mark.parametrize("left", [None, b"no ledger" * 1000])
def test_no_calls_anywhere(
    left: bytes | None, door: Door, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Why neither can say anything is one sentence each."""
    file.unlink()
    if left is not None:
        file.write_bytes(left)
    door.status, door.said = 401, {"error": {"message": "Wrong key."}}
    assert main(["status", "--last", "5", "--config", str(door.config)]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "The gateway says: Wrong key. Nor can its ledger be read (" in said.err
    assert file.exists() == (left is not None)


@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_no_number_of_calls(count: str, door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told as any other mistake of the command line."""
    with pytest.raises(SystemExit):
        main(["status", f"--last={count}", "--config", str(door.config)])
    assert (
        f"--last: expected a number of calls, 1 or more, got '{count}'" in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["status", "settings"])
def test_a_gateway_that_refuses(
    command: str, door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told what it says."""
    door.status, door.said = 401, {"error": {"message": "Wrong key."}}
    assert main([command, "--config", str(door.config)]) == 1
    assert capsys.readouterr().err == "claudegw: The gateway says: Wrong key.\n"


def test_a_refusal_does_not_steer_the_terminal(
    door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever answers there, it is shown as words on one line."""
    door.status, door.said = 401, {"error": {"message": "No.\x1b[2J\nclaudegw: all is well"}}
    assert main(["status", "--config", str(door.config)]) == 1
    assert capsys.readouterr().err == "claudegw: The gateway says: No.?[2J?claudegw: all is well\n"


@pytest.mark.parametrize("said", [{"object": "list"}, [1], None, {"data": [{"id": 3}]}])
def test_something_else_at_the_port(
    said: Any, door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no gateway has no settings, and that is no crash."""
    door.said = said
    assert main(["settings", "--config", str(door.config)]) == 1
    assert "No gateway answers" in capsys.readouterr().err
    door.status = 500
    assert main(["status", "--config", str(door.config)]) == 1
    assert "No gateway answers" in capsys.readouterr().err


def test_the_settings_of_a_running_gateway(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    """They have the windows that it knows; a tier that is down has none."""
    models = [("claudegw-main", 65536), ("claudegw-small", None)]
    door.said = {"data": [{"id": name, "max_input_tokens": size} for name, size in models]}
    assert main(["settings", "--config", str(door.config)]) == 0
    assert '"CLAUDE_CODE_MAX_CONTEXT_TOKENS": "65536"' in capsys.readouterr().out
    assert main(["settings", "--shell", "--config", str(door.config)]) == 0
    assert "export ANTHROPIC_AUTH_TOKEN=key\n" in capsys.readouterr().out
    assert main(["settings", "--for", "sdk", "--config", str(door.config)]) == 0
    assert "export OPENAI_API_KEY=key\n" in capsys.readouterr().out
    assert main(["settings", "--for", "opencode", "--config", str(door.config)]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "claudegw/claudegw-main"
    assert door.asked == [("/v1/models", "key")] * 3


# --- launchd --------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home in which a configuration lies, and where the user is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gw.toml").write_text(
        f"[gateway]\nstate_dir = '{tmp_path}/state'\n[tier.main]\nurl = 'http://h:2'\n"
    )
    return tmp_path


def test_the_launch_agent_is_printed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a plist of absolute paths, and nothing is written."""
    assert main(["launchd", "--config", "gw.toml"]) == 0
    agent = plistlib.loads(capsys.readouterr().out.encode())
    twistd, *_, config = agent["ProgramArguments"]
    assert (Path(twistd).name, config) == ("twistd", str(home / "gw.toml"))
    assert Path(twistd).exists()
    assert agent["WorkingDirectory"] == str(home)
    assert [path.name for path in home.iterdir()] == ["gw.toml"]


def test_the_launch_agent_is_installed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It lies where launchd looks for it, and two lines are left to be typed."""
    assert main(["launchd", "--config", "gw.toml"]) == 0
    printed = plistlib.loads(capsys.readouterr().out.encode())
    assert main(["launchd", "--config", "gw.toml", "--install"], platform="darwin") == 0
    path = home / "Library/LaunchAgents/local.claudegw.plist"
    assert plistlib.loads(path.read_bytes()) == printed
    domain = f"gui/{os.getuid()}"
    assert capsys.readouterr().out.splitlines() == [
        f"launchctl bootstrap {domain} {path}",
        f"launchctl kickstart {domain}/local.claudegw",
    ]


def test_a_launch_agent_is_a_macs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On another machine it is not installed, and one sentence says so."""
    assert main(["launchd", "--config", "gw.toml", "--install"], platform="linux") == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("claudegw: launchd is a Mac's")
    assert not (home / "Library").exists()


def test_a_launch_agent_that_cannot_be_written(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason is one line, not a traceback."""
    (home / "Library").write_text("a file in the folder's place")
    assert main(["launchd", "--config", "gw.toml", "--install"], platform="darwin") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Library" in line


@pytest.mark.parametrize("more", ["grace = -1", "listen = 'launchd:gateway'"])
def test_a_wrong_config_has_no_launch_agent(
    more: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its mistakes are told, and nothing is printed or written."""
    config = home / "gw.toml"
    config.write_text(f"[gateway]\n{more}\n[tier.main]\nurl = 'http://h:2'\n")
    assert main(["launchd", "--config", str(config), "--install"], platform="darwin") == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("claudegw: gateway.")
    assert not (home / "Library").exists()
