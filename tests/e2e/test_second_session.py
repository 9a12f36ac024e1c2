"""
A second session in the same folder shares all of its prompt but what is new.

The real client's two prompts, as the gateway prepares them, are rendered in GLM's order (tools,
system, turns) by a real llama-server and compared token by token.  With
``python -m bench.second_session`` a real model evaluates them.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import pytest

from gateway.wire import chat
from tests.e2e.clients import VERSIONS, Client
from tests.e2e.scripted_llama import Block, ScriptedLlama, Text
from tests.e2e.stack import GLM_ORDER, SMOLLM, Running, start_gateway, start_server

Json = Any

figures = logging.getLogger(__name__)

#: The share of its prompt that a second session may evaluate again.
AT_MOST: Final = 0.01

PROMPTS: Final = ("Hello gates", "How many walls does this old city have?")


def two_sessions(client: Client, seconds: float = 120) -> Iterator[str]:
    """The prompts of two sessions, each when it was answered, in a project that is a repository."""
    (client.folder / "CLAUDE.md").write_text("Gates are counted by hand.\n")
    who = ("-c", "user.name=Nobody", "-c", "user.email=nobody@example.invalid")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "Begin")):
        subprocess.run(["git", *command], cwd=client.folder, check=True, capture_output=True)
    for prompt in PROMPTS:
        said = client.say(prompt, seconds=seconds)
        assert said.status == 0, said
        yield prompt


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that is asked for nothing but prompts and tokens."""
    folder = tmp_path_factory.mktemp("renderer")
    server = start_server(folder, "renderer", *SMOLLM, *GLM_ORDER, "--ctx-size", "512")
    yield server
    server.stop()


def tokens(server: Running, body: Json) -> list[int]:
    """The prompt that a prepared body renders to."""
    prompt = server.ask("/apply-template", chat.from_messages(body))[1]["prompt"]
    wanted = {"content": prompt, "add_special": True, "parse_special": True}
    found: list[int] = server.ask("/tokenize", wanted)[1]["tokens"]
    return found


def says_hello(_: Json) -> Sequence[Block]:
    return [Text("Hello.")]


@pytest.mark.client
@pytest.mark.server
@pytest.mark.parametrize("version", VERSIONS)
def test_a_second_session_in_the_same_folder(
    version: str, renderer: Running, tmp_path: Path
) -> None:
    """Tools, system prompt, place, agents, skills and reminders come before what is new."""
    folder = tmp_path / "gateway"
    folder.mkdir()
    with ScriptedLlama(says_hello).serving() as main:
        gateway = start_gateway(folder, {"main": {"url": main.url, "slots": 1}})
        try:
            assert len(list(two_sessions(Client.of(version, gateway, tmp_path)))) == 2
        finally:
            gateway.stop()
    turns = [body for body in main.asked if body.get("tools")]
    first, second = (tokens(renderer, body) for body in (turns[0], turns[-1]))
    same = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    )
    share = 1 - same / len(second)
    figures.info(
        "%s: %d of %d tokens are new (%.2f %%)",
        version,
        len(second) - same,
        len(second),
        100 * share,
    )
    assert first != second
    assert len(second) > 10_000
    assert share <= AT_MOST
