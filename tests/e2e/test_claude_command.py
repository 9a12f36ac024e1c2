"""
``claudegw claude``: the real Claude Code with one word, whatever its user has set.

The figures are logged: ``pytest --log-cli-level=INFO`` shows them.
"""

from __future__ import annotations

import logging
import os
import signal
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import orjson
import pytest

from tests.e2e.clients import CLAUDEGW, VERSIONS, Client, Said, eventually
from tests.e2e.scripted_llama import Block, Script, ScriptedLlama, Text, Thinking
from tests.e2e.stack import GEMMA, Running, start_gateway, start_server
from tests.e2e.test_claude_code import ONE_SENTENCE, PREFILL, Log, is_at_rest, written

Json = Any

figures = logging.getLogger(__name__)

pytestmark = pytest.mark.client

both_versions = pytest.mark.parametrize("version", VERSIONS)

NOWHERE: Final = "http://127.0.0.1:9"

#: What leads a client elsewhere, or keeps it from compacting.
ELSEWHERE: Final = {
    "ANTHROPIC_API_KEY": "sk-theirs",
    "ANTHROPIC_AUTH_TOKEN": "theirs",
    "ANTHROPIC_BASE_URL": NOWHERE,
    "ANTHROPIC_DEFAULT_OPUS_MODEL": "claude-opus-5-5",
    "ANTHROPIC_MODEL": "claude-opus-5-5",
    "ANTHROPIC_SMALL_FAST_MODEL": "claude-haiku-4-5",
    "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "1000000",
    "CLAUDE_CODE_SUBAGENT_MODEL": "claude-sonnet-5",
    "CLAUDE_CODE_DISABLE_UNKNOWN_MODEL_WINDOW_ENFORCEMENT": "1",
    "CLAUDE_CODE_USE_BEDROCK": "1",
    "CLAUDE_CODE_USE_VERTEX": "1",
    "DISABLE_AUTO_COMPACT": "1",
    "ENABLE_TOOL_SEARCH": "true",
    "HTTP_PROXY": NOWHERE,
    "HTTPS_PROXY": NOWHERE,
    "NO_PROXY": "",
}

#: A settings file that wants something else than we do.
HOSTILE: Final = {
    "env": ELSEWHERE,
    "model": "sonnet",
    "apiKeyHelper": "echo theirs",
    "availableModels": ["opus"],
    "autoCompactEnabled": False,
    "permissions": {"defaultMode": "acceptEdits"},
}


@attrs.frozen
class Started(Client):
    """
    A client that ``claudegw claude`` starts.

    Attributes:
        config: the gateway's.
        more: what its user has in the environment.
    """

    config: Path = Path()
    more: Mapping[str, str] = attrs.field(factory=dict)

    @classmethod
    def on(cls, version: str, gateway: Running, place: Path) -> Started:
        """One that was never used before."""
        made = cls.of(version, gateway, place)
        made.settings.unlink()
        config = gateway.log.with_name("gw.toml")
        return cls(made.program, made.folder, made.settings, config=config)

    @property
    def command(self) -> list[str]:
        ours = ["--config", str(self.config), "--client", str(self.program)]
        return [str(CLAUDEGW), "claude", *ours]

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, **self.more}

    @property
    def users_files(self) -> list[Path]:
        """The settings of its user."""
        folder = self.folder / ".claude"
        users = self.home / ".claude/settings.json"
        return [users, folder / "settings.json", folder / "settings.local.json"]

    def hostile(self) -> Started:
        """The same with hostile settings wherever there can be some."""
        for path in self.users_files:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(orjson.dumps(HOSTILE))
        return attrs.evolve(self, more=ELSEWHERE)

    def assert_unchanged(self) -> None:
        """Its user's files say what they said; the older client itself takes a model out."""
        for path in self.users_files:
            assert {"model": HOSTILE["model"], **orjson.loads(path.read_bytes())} == HOSTILE, path


@contextmanager
def house(script: Script, folder: Path, n_ctx: int = 131_072) -> Iterator[tuple[Json, Running]]:
    """A gateway in front of a main model that follows `script`; its bodies, and itself."""
    with ScriptedLlama(script, n_ctx=n_ctx).serving() as main:
        folder.mkdir()
        gateway = start_gateway(folder, {"main": {"url": main.url, "slots": 1}})
        try:
            yield main.asked, gateway
        finally:
            gateway.stop()


def seven(_: Json) -> Sequence[Block]:
    return [Thinking("That needs no tool."), Text("There are seven gates.")]


def warned(said: Said) -> list[str]:
    """What ``claudegw`` itself had to say."""
    return [line for line in said.errors.splitlines() if line.startswith("claudegw: ")]


def assert_on_the_gateway(log: Log, asked: Sequence[Json]) -> None:
    """All calls came with the names of our models, and with nothing that breaks the prefix."""
    assert eventually(lambda: is_at_rest(log.gateway), 30)
    calls = log.ended()
    assert {call["outcome"] for call in calls} == {"answered"}
    assert {call["model"] for call in calls} == {"claudegw-main"}
    turn = next(body for body in asked if len(body.get("tools", ())) > 5)
    assert "DeferredToolPlaceholder" not in written(turn["tools"])


@both_versions
def test_a_prompt(version: str, tmp_path: Path) -> None:
    """``claudegw claude -p`` answers, says nothing but that, and its settings are private."""
    with house(seven, tmp_path / "gateway") as (asked, gateway):
        log = Log.of(gateway)
        said = Started.on(version, gateway, tmp_path).say("How many gates are there?")
        figures.info("%s: %.1f s", version, said.seconds)
        assert (said.status, said.answer.strip()) == (0, "There are seven gates."), said
        assert warned(said) == []
        assert_on_the_gateway(log, asked)
        assert all(call["session"] or version != "newest" for call in log.ended())
        file = tmp_path / "gateway/claude-code.json"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@both_versions
def test_a_prompt_from_a_hostile_home(version: str, tmp_path: Path) -> None:
    """Whatever else its user has set, it comes to the gateway, and what was overridden is told."""
    with house(seven, tmp_path / "gateway") as (asked, gateway):
        log = Log.of(gateway)
        client = Started.on(version, gateway, tmp_path).hostile()
        said = client.say("How many gates are there?")
        figures.info("%s: %s", version, said.errors)
        assert (said.status, said.answer.strip()) == (0, "There are seven gates."), said
        assert_on_the_gateway(log, asked)
        overridden, proxies = warned(said)
        assert "ANTHROPIC_API_KEY, " in overridden
        assert "from the environment, ~/.claude/settings.json, " in overridden
        assert "would send this gateway's calls to a proxy" in proxies
        client.assert_unchanged()


@both_versions
def test_a_session_from_a_hostile_home(version: str, tmp_path: Path) -> None:
    """An interactive one, with our status line below its prompt, and no questions before it."""
    with house(seven, tmp_path / "gateway") as (asked, gateway):
        log = Log.of(gateway)
        client = Started.on(version, gateway, tmp_path).hostile()
        with client.session(ready="main · ready") as session:
            session.type("How many gates are there?")
            session.wait_for(lambda screen: "There are seven gates." in screen, 60)
            session.wait_for(lambda screen: "main · " in screen and "cached" in screen, 60)
            figures.info("%s:\n%s", version, session.screen)
        assert_on_the_gateway(log, asked)
        client.assert_unchanged()


def test_a_gateway_that_is_down_is_started(tmp_path: Path) -> None:
    """At a terminal, if its user wants that: a daemon, and the session begins when it is up."""
    pid_file = tmp_path / "gateway/claudegw.pid"
    with house(seven, tmp_path / "gateway") as (_, gateway):
        client = Started.on("newest", gateway, tmp_path)
        gateway.stop()
        said = client.say("hello")
        assert (said.status, said.answer) == (1, "")
        assert "Start it first: " in said.errors
        try:
            with client.session(ready="Start it now?") as session:
                session.tmux("send-keys", "Enter")
                session.wait_for(lambda screen: "main · ready" in screen, 120)
            assert gateway.ask("/healthz")[0] == 200
        finally:
            pid = int(pid_file.read_text())
            os.kill(pid, signal.SIGTERM)
            assert eventually(lambda: not pid_file.exists(), 60)


# --- a conversation that outgrows its window ------------------------------------------------------

#: Words of a user who pastes a lot; about 7 500 tokens.
PASTE: Final = "The north gate, the east gate, the south gate, the west gate. " * 480


def talk(
    client: Started, turns: int, *options: str, paste: str = PASTE, seconds: float = 120
) -> list[Said]:
    """So many long turns of one conversation."""
    said = []
    for number in range(turns):
        more = ["--continue"] if number else []
        prompt = f"Turn {number}. How many gates are there? {paste}"
        said.append(client.say(prompt, *more, *options, seconds=seconds))
        figures.info("turn %d: %.1f s, %r", number, said[-1].seconds, said[-1].answer[:60])
    return said


def assert_compacted(log: Log, window: int, said: Sequence[Said], outgrown: int) -> None:
    """It was compacted in time and went on; all that was said is more than `outgrown` tokens."""
    log.show()
    assert {one.status for one in said} == {0}, said
    calls = [call for call in log.ended() if call["kind"] in ("turn", "compaction")]
    assert {call["outcome"] for call in calls} == {"answered"}
    kinds = [call["kind"] for call in calls]
    assert "compaction" in kinds
    last = len(kinds) - 1 - kinds[::-1].index("compaction")
    assert kinds.count("turn") >= len(said)  # more where an answer was cut, and resumed
    assert kinds[last + 1 :].count("turn") >= 1
    sizes = [call["input"] + call["cached"] for call in calls]
    assert max(sizes) < window
    assert sizes[last + 1] < sizes[last]
    each = sizes[1] - sizes[0]
    assert sizes[0] + (len(said) - 1) * each > outgrown


def summarizes(body: Json) -> Sequence[Block]:
    """A script that keeps a conversation short when it is asked to."""
    last = written(body["messages"][-1])
    if "CRITICAL: Respond with TEXT ONLY" in last or "Your task is to create" in last:
        return [Text("<analysis>Gates.</analysis>\n<summary>Seven gates.</summary>")]
    return seven(body)


def test_a_conversation_that_outgrows_its_window(tmp_path: Path) -> None:
    """
    It is compacted before the window is full, and goes on, from a hostile home as well.

    The older client knows no windows but its own.
    """
    window = 65_536
    with house(summarizes, tmp_path / "gateway", window) as (_, gateway):
        log = Log.of(gateway)
        said = talk(Started.on("newest", gateway, tmp_path).hostile(), 8)
        assert eventually(lambda: is_at_rest(gateway), 30)
        assert_compacted(log, window, said, window)


# --- on real models -------------------------------------------------------------------------------


@pytest.mark.server
def test_a_prompt_on_a_real_model(main_server: Running, tmp_path: Path) -> None:
    """From a hostile home, on the demo's model: it answers, and the small window is told."""
    tiers = {"main": {"url": main_server.url, "slots": 1}}
    (tmp_path / "gateway").mkdir()
    gateway = start_gateway(tmp_path / "gateway", tiers)
    try:
        log = Log.of(gateway)
        client = Started.on("newest", gateway, tmp_path).hostile()
        client = attrs.evolve(client, more={**client.more, **ONE_SENTENCE})
        said = client.say("hello", seconds=PREFILL)
        figures.info("%.1f s, it said %r", said.seconds, said.answer)
        log.show()
        assert said.status == 0, said
        assert said.answer.strip()
        assert "window of 32768 tokens is too small" in said.errors
        assert {turn["outcome"] for turn in log.ended("turn")} == {"answered"}
    finally:
        gateway.stop()


@pytest.mark.server
def test_a_real_conversation_that_outgrows_its_window(tmp_path: Path) -> None:
    """On a real model too, with as short a prompt as the client knows, it goes on."""
    window = 18_432
    flags = (*GEMMA, "--ctx-size", str(window), "--batch-size", "512", "--alias", "gemma")
    server = start_server(tmp_path, "main", *flags, "--slot-prompt-similarity", "0")
    try:
        (tmp_path / "gateway").mkdir()
        tiers = {"main": {"url": server.url, "slots": 1}}
        gateway = start_gateway(tmp_path / "gateway", tiers)
        try:
            log = Log.of(gateway)
            client = attrs.evolve(Started.on("newest", gateway, tmp_path), more=ONE_SENTENCE)
            paste = PASTE[: len(PASTE) // 4]
            said = talk(client, 9, "--bare", paste=paste, seconds=PREFILL)
            assert eventually(lambda: is_at_rest(gateway), 30)
            assert_compacted(log, window, said, window)
        finally:
            gateway.stop()
    finally:
        server.stop()
