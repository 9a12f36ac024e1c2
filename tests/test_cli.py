"""The ``claudegw`` command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.cli import Unusable, base_url, longest_answer, main, settings
from gateway.config import parse
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
