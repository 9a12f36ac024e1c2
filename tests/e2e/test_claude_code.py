"""
The real Claude Code through a real gateway.

The first two tests run on real tiny models, so that every second is a true one; the others on a
llama-server whose model is a script, so that the model does what the test is about.  The figures
are logged: ``pytest --log-cli-level=INFO`` shows them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import attrs
import orjson
import pytest

from tests.e2e.clients import VERSIONS, Client, eventually
from tests.e2e.scripted_llama import Block, Script, ScriptedLlama, Text, Thinking, ToolUse
from tests.e2e.stack import TIER_KINDS, Running, gateway_of_kind

Json = Any

figures = logging.getLogger(__name__)

pytestmark = pytest.mark.client

both_versions = pytest.mark.parametrize("version", VERSIONS)

#: Seconds for a whole prompt of Claude Code, evaluated by a small machine that has other work too.
PREFILL: Final = 1800

#: Put into every call by the client: a tiny model would fill its whole window.
ONE_SENTENCE: Final = {
    "CLAUDE_CODE_EXTRA_BODY": '{"temperature": 0, "stop_sequences": [".", "!", "?", "\\n\\n"]}'
}

#: The printed settings turn it off; a client without them must do no harm either.
WITH_ATTRIBUTION: Final = {"CLAUDE_CODE_ATTRIBUTION_HEADER": "1"}


@attrs.frozen
class Log:
    """The calls that a gateway has had since this was made."""

    gateway: Running
    _before: frozenset[str]

    @classmethod
    def of(cls, gateway: Running) -> Log:
        return cls(gateway, frozenset(call["id"] for call in gateway.ask("/status")[1]["last"]))

    def ended(self, kind: str | None = None) -> list[Json]:
        """Those that are over, in the order in which they were."""
        last: list[Json] = self.gateway.ask("/status")[1]["last"]
        ours = [call for call in reversed(last) if call["id"] not in self._before]
        return [call for call in ours if kind in (None, call["kind"])]

    def under_way(self) -> list[Json]:
        return list(self.gateway.ask("/status")[1]["calls"])

    def show(self) -> None:
        """What each call was, where it went and what it cost."""
        shown = ("kind", "model", "tier", "outcome", "waited", "took", "input", "cached", "output")
        for call in self.ended():
            figures.info(" ".join(f"{key}={call[key]}" for key in shown))


def is_at_rest(gateway: Running) -> bool:
    """Whether no call is under way and every permit is back."""
    status = gateway.ask("/status")[1]
    lines = status["tiers"].values()
    out = sum(line["running"] + line["settling"] + line["waiting"] for line in lines)
    return not status["calls"] and out == 0


# --- on real models -------------------------------------------------------------------------------

#: What a server logs when a slot begins with a task, and when it is idle again.
BEGUN: Final = "processing task"
RELEASED: Final = "stop processing"


def count(server: Running, line: str) -> int:
    """How often it has logged this."""
    return server.log.read_text().count(line)


@pytest.mark.server
@both_versions
def test_escape_stops_the_model(
    version: str, gateway: Running, main_server: Running, tmp_path: Path
) -> None:
    """While main evaluates a turn, small answers its title; Escape ends the evaluation."""
    log = Log.of(gateway)
    begun, released = (count(main_server, line) for line in (BEGUN, RELEASED))
    client = Client.of(version, gateway, tmp_path)
    with client.session() as session:
        session.type("Tell me all about the gateways of old cities")
        assert eventually(lambda: bool(log.ended("title")), 300)
        (title,) = log.ended("title")
        assert (title["tier"], title["outcome"]) == ("small", "answered")
        # Its log tells without a question; questions put off what is measured here.
        assert eventually(lambda: count(main_server, BEGUN) > begun, 300)
        (turn,) = log.under_way()
        assert (turn["kind"], turn["tier"], turn["outcome"]) == ("turn", "main", "running")
        assert count(main_server, RELEASED) == released

        session.press_escape()
        began = time.monotonic()
        assert eventually(lambda: count(main_server, RELEASED) > released, 60)
        figures.info("%s: slot idle %.1f s after Escape", version, time.monotonic() - began)
        assert eventually(lambda: is_at_rest(gateway), 60)
        figures.info("all permits back %.1f s after Escape", time.monotonic() - began)
    log.show()
    (slot,) = main_server.ask("/slots")[1]
    assert slot["is_processing"] is False
    (turn,) = log.ended("turn")
    assert (turn["outcome"], turn["output"]) == ("cancelled", 0)


@pytest.mark.server
@both_versions
def test_a_prompt_is_answered(version: str, gateway: Running, tmp_path: Path) -> None:
    """``claude -p`` with all that it sends by itself is a turn that main answers."""
    log = Log.of(gateway)
    client = Client.of(version, gateway, tmp_path, ONE_SENTENCE)
    said = client.say("hello", seconds=PREFILL)
    figures.info("%s: %.1f s", version, said.seconds)
    figures.info("it said %r", said.answer)
    log.show()
    assert said.status == 0, said
    assert said.answer.strip()
    turns = log.ended("turn")
    assert turns
    assert {(turn["tier"], turn["outcome"]) for turn in turns} == {("main", "answered")}
    assert is_at_rest(gateway)


@pytest.mark.server
@pytest.mark.parametrize("kind", TIER_KINDS, indirect=True, scope="module")
def test_each_kind_of_tier_answers(kind: str, gateway: Running, tmp_path: Path) -> None:
    """``claude -p`` gets its answer, and a true count of what it cost, whatever stands behind."""
    log = Log.of(gateway)
    client = Client.of("newest", gateway, tmp_path, ONE_SENTENCE)
    said = client.say("hello", "--system-prompt", "Be brief.", "--tools", "", seconds=PREFILL)
    figures.info("%s: %.1f s, it said %r", kind, said.seconds, said.answer)
    log.show()
    assert said.status == 0, said
    assert said.answer.strip()
    (answered,) = log.ended("turn")
    assert (answered["tier"], answered["outcome"]) == ("main", "answered")
    assert answered["input"] + answered["cached"] > 0
    assert answered["output"] > 0


# --- on a scripted model --------------------------------------------------------------------------


@attrs.frozen
class Stage:
    """A gateway in front of two scripted servers."""

    main: ScriptedLlama
    small: ScriptedLlama
    gateway: Running


@contextmanager
def stage(script: Script, folder: Path, kind: str = "llama-server") -> Iterator[Stage]:
    """A main server that follows `script`, a small one that has seen no files."""
    with (
        ScriptedLlama(script, prefill=0.3).serving() as main,
        ScriptedLlama(no_files, n_ctx=8192).serving() as small,
    ):
        folder.mkdir()
        tiers = {"main": {"url": main.url, "slots": 1}, "small": {"url": small.url, "slots": 1}}
        with gateway_of_kind(kind, folder, tiers) as gateway:
            yield Stage(main, small, gateway)


def no_files(_: Json) -> Sequence[Block]:
    """The answer to what an older client asks after a command: which files it has shown."""
    return [Text("<filepaths>\n</filepaths>")]


def results(body: Json) -> list[Json]:
    """The tool results that a call ends with."""
    return [block for block in body["messages"][-1]["content"] if block["type"] == "tool_result"]


def written(value: Json) -> str:
    return orjson.dumps(value).decode()


def assert_prepared(body: Json) -> None:
    """Nothing is in it that a template stumbles over, or that is new in the same conversation."""
    assert {message["role"] for message in body["messages"]} <= {"user", "assistant"}
    assert all(isinstance(message["content"], list) for message in body["messages"])
    assert '"cache_control"' not in written(body)
    assert "x-anthropic-billing-header" not in written(body)


def assert_continues(later: Json, earlier: Json) -> None:
    """What was sent before is sent again, and more after it."""
    assert (later["system"], later["tools"]) == (earlier["system"], earlier["tools"])
    assert later["messages"][: len(earlier["messages"])] == earlier["messages"]
    assert len(later["messages"]) > len(earlier["messages"])


def runs_a_command(body: Json) -> Sequence[Block]:
    """One command, and then what it said."""
    if found := results(body):
        return [Text(f"It said: {found[0]['content'][0]['text']}")]
    command = {"command": "echo claudegw-was-here", "description": "Say where we are"}
    return [Thinking("A command will tell."), Text("I run it."), ToolUse("Bash", command)]


@pytest.mark.parametrize("kind", TIER_KINDS)
@both_versions
def test_a_tool_call_and_its_result(version: str, kind: str, tmp_path: Path) -> None:
    """A tool call reaches the client, its result comes back in the next turn, then the answer."""
    with stage(runs_a_command, tmp_path / "gateway", kind) as set_up:
        log = Log.of(set_up.gateway)
        client = Client.of(version, set_up.gateway, tmp_path, WITH_ATTRIBUTION)
        said = client.say("Run it.", "--allowedTools", "Bash")
        assert eventually(lambda: is_at_rest(set_up.gateway), 30)
        figures.info("%s: %.1f s", version, said.seconds)
        log.show()
        turns = [call for call in log.ended("turn") if call["tier"] == "main"]
    assert said.status == 0, said
    assert said.answer.strip() == "It said: claudegw-was-here"
    assert [turn["outcome"] for turn in turns] == ["answered", "answered"]

    first, second = set_up.main.asked
    assert_prepared(first)
    assert_prepared(second)
    assert_continues(second, first)
    thinking, text, call = second["messages"][-2]["content"]
    assert (thinking["thinking"], text["text"]) == ("A command will tell.", "I run it.")
    assert call["input"]["command"] == "echo claudegw-was-here"
    (result,) = results(second)
    assert result["tool_use_id"] == call["id"]
    assert result["content"] == [{"type": "text", "text": "claudegw-was-here"}]


def test_a_question_about_a_command_is_housekeeping(tmp_path: Path) -> None:
    """What 2.1.36 asks the small model after a command is bounded, as all housekeeping is."""
    with stage(runs_a_command, tmp_path / "gateway") as set_up:
        log = Log.of(set_up.gateway)
        client = Client.of("2.1.36", set_up.gateway, tmp_path)
        assert client.say("Run it.", "--allowedTools", "Bash").status == 0
        assert eventually(lambda: is_at_rest(set_up.gateway), 30)
        (asked,) = [call for call in log.ended() if call["tier"] == "small"]
    assert (asked["kind"], asked["outcome"]) == ("other", "answered")
    (body,) = set_up.small.asked
    assert_prepared(body)
    assert body["max_tokens"] <= 1024


ERRAND: Final = "Count the gates of the city."
FOUND: Final = "There are seven gates."


def sends(agent: str) -> Script:
    """A script that sends an agent of this type on an errand, and tells what it found."""

    def script(body: Json) -> Sequence[Block]:
        conversation = written(body["messages"])
        if ERRAND in written(body["messages"][0]):
            return [Thinking("One, two, ..."), Text(FOUND)]
        if FOUND in conversation:
            return [Text(f"The agent says: {FOUND}")]
        if results(body):
            return [Text("The agent is on its way.")]
        names = {tool["name"] for tool in body["tools"]}
        errand = {"description": "Count gates", "prompt": ERRAND, "subagent_type": agent}
        return [Text("I send one."), ToolUse("Agent" if "Agent" in names else "Task", errand)]

    return script


@both_versions
@pytest.mark.parametrize("agent", ["general-purpose", "Explore"])
def test_a_subagent(version: str, agent: str, tmp_path: Path) -> None:
    """A subagent's call takes its turn on main, and what it found comes back to who sent it."""
    with stage(sends(agent), tmp_path / "gateway") as set_up:
        log = Log.of(set_up.gateway)
        client = Client.of(version, set_up.gateway, tmp_path, WITH_ATTRIBUTION)
        said = client.say("How many gates?", "--allowedTools", "Agent", "Task")
        assert eventually(lambda: is_at_rest(set_up.gateway), 30)
        figures.info("%s: %.1f s", version, said.seconds)
        log.show()
        calls = [call for call in log.ended() if call["kind"] != "count"]
    assert said.status == 0, said
    assert f"The agent says: {FOUND}" in said.answer
    assert {(call["tier"], call["outcome"]) for call in calls} == {("main", "answered")}
    if version == "newest":  # the older one does not say which calls are a subagent's
        assert [call["kind"] for call in calls].count("subagent") == 1

    errands = [body for body in set_up.main.asked if ERRAND in written(body["messages"][0])]
    turns = [body for body in set_up.main.asked if body not in errands]
    assert len(errands) == 1
    # Somebody needs all of what an agent says: it is no housekeeping.
    assert errands[0]["max_tokens"] == turns[0]["max_tokens"]
    for body in set_up.main.asked:
        assert_prepared(body)
    for earlier, later in pairwise(turns):
        assert_continues(later, earlier)
    assert FOUND in written(turns[-1]["messages"])
    assert set_up.main.most_at_once == 1
