"""The command line of a server; no process is started here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Server, Tier
from gateway.llama.command import command, environment, socket_file, without_key

STATE = Path("/state")

EMBEDDED = ("python", "-m", "gateway.llama.embedded", "--model", "m.gguf")


def line(
    *words: str, manage_flags: bool = True, url: str = "http://127.0.0.1:8081", **tier: Any
) -> list[str]:
    """The command line of a tier whose configured command is `words`."""
    server = Server(words, manage_flags=manage_flags)
    return command(Tier(url, server=server, **tier), server, STATE)


def added(*words: str, manage_flags: bool = True, **tier: Any) -> dict[str, str]:
    """What a server with this command has in its environment besides ours."""
    server = Server(words, env={"A": "b"}, manage_flags=manage_flags)
    return environment(Tier("http://127.0.0.1:8081", server=server, **tier), server)


def flags(words: Sequence[str]) -> dict[str, str]:
    """Each flag with the word after it."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    return {word: value for word, value in pairs if word.startswith("-")}


# --- the command line -----------------------------------------------------------------------------


def test_a_llama_server_gets_what_its_tier_needs() -> None:
    """What the configured command leaves open is added behind it."""
    given = ("llama-server", "--model", "m.gguf")
    assert line(*given, slots=2) == [
        *given,
        *("--host", "127.0.0.1"),
        *("--port", "8081"),
        *("--parallel", "2"),
        *("--slot-prompt-similarity", "0"),
        *("--slot-save-path", "/state/slots"),
        *("--sse-ping-interval", "5"),
    ]


def test_a_llama_server_is_known_by_its_name_anywhere() -> None:
    """A path to llama-server is llama-server."""
    found = line("/opt/llama/bin/llama-server", "-m", "m.gguf")
    assert found[0] == "/opt/llama/bin/llama-server"
    assert "--sse-ping-interval" in found


def test_the_embedded_server_runs_on_our_own_python() -> None:
    """``python -m gateway.llama.embedded`` is ours, whatever ``python`` means on the PATH."""
    found = line(*EMBEDDED)
    assert found[:5] == [sys.executable, *EMBEDDED[1:]]
    assert flags(found)["--port"] == "8081"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--host", "0.0.0.0"),
        ("--port", "9999"),
        ("--parallel", "7"),
        ("-np", "7"),
        ("--slot-prompt-similarity", "0.3"),
        ("-sps", "0.3"),
        ("--slot-save-path", "/elsewhere"),
        ("--sse-ping-interval", "9"),
        ("--api-key", "theirs"),
    ],
)
def test_a_flag_that_is_set_stays(flag: str, value: str) -> None:
    """A flag of the configured command is neither changed nor said twice."""
    names = {"-np": "--parallel", "-sps": "--slot-prompt-similarity"}
    found = line("llama-server", flag, value, slots=2, api_key="ours")
    assert found[1:3] == [flag, value]
    assert found.count(flag) == 1
    assert names.get(flag) not in found


def test_the_key_of_the_tier_is_the_key_of_its_server() -> None:
    """A server that we start is told the key that it will be shown, where no list shows it."""
    assert "secret" not in line("llama-server", api_key="secret")
    for words in (("llama-server",), EMBEDDED):
        assert added(*words, api_key="secret") == {"LLAMA_API_KEY": "secret", "A": "b"}
    assert added("llama-server") == {"A": "b"}
    assert added("llama-server", manage_flags=False, api_key="secret") == {"A": "b"}
    assert added("vllm", "serve", api_key="secret") == {"A": "b"}


def test_a_tier_on_a_unix_socket_has_no_port() -> None:
    """llama-server listens on a socket file where its host is a path."""
    found = flags(line("llama-server", url="unix:/run/llama.sock"))
    assert found["--host"] == "/run/llama.sock"
    assert "--port" not in found


@pytest.mark.parametrize(
    "words",
    [
        ("vllm", "serve", "m"),
        ("python", "-m", "another.server"),
        ("/bin/sh", "-c", "llama-server"),
        ("llama-server-wrapper", "--model", "m.gguf"),
    ],
    ids=" ".join,
)
def test_another_command_stays_as_it_is(words: tuple[str, ...]) -> None:
    """What we do not know gets no flags."""
    assert line(*words, api_key="secret") == list(words)


def test_flags_are_not_managed_where_that_is_said() -> None:
    """With ``manage_flags = false`` a llama-server runs as it stands."""
    given = ("llama-server", "--model", "m.gguf")
    assert line(*given, manage_flags=False, api_key="secret") == list(given)


# --- what is read from it -------------------------------------------------------------------------


def test_a_key_is_not_shown() -> None:
    """Wherever the key stands it is starred, and nothing else is."""
    shown = without_key(["a", "--api-key", "secret", "--port", "1", "--api-key", "too"])
    assert shown == ["a", "--api-key", "***", "--port", "1", "--api-key", "***"]
    assert without_key(["a", "--api-key"]) == ["a", "--api-key"]
    assert without_key(["a", "-hft", "x", "--hf-token", "y"]) == [
        "a",
        "-hft",
        "***",
        "--hf-token",
        "***",
    ]


def test_a_socket_is_found() -> None:
    """A host that llama-server takes for a socket file is one."""
    found = line("llama-server", url="unix:/run/llama.sock")
    assert socket_file(found) == Path("/run/llama.sock")
    assert socket_file(line("llama-server")) is None
