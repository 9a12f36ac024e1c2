"""The real OpenCode on a gateway, on which a real Claude Code works at the same time."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import attrs
import orjson
import pytest

from tests.e2e.clients import CLIENTS, Client, Said, absent, program
from tests.e2e.scripted_llama import Block, ScriptedLlama, Text, Thinking, ToolUse
from tests.e2e.stack import Running, start_gateway

pytestmark = [pytest.mark.client, pytest.mark.server]

Json = Any

ASKED: Final = "What does note.txt say?"
NOTE: Final = "a note of 417 words"
THOUGHT: Final = "It will be in the file."


@attrs.frozen
class OpenCode:
    """
    One OpenCode that was never used before.

    Attributes:
        folder: the project that it works in; its home lies beside it.
    """

    folder: Path

    @classmethod
    def of(cls, gateway: Running, place: Path) -> OpenCode:
        """One whose only provider is `gateway`, in an empty folder."""
        self = cls(place / "project")
        self.folder.mkdir(parents=True)
        settings = self.home / ".config/opencode/opencode.json"
        settings.parent.mkdir(parents=True)
        settings.write_bytes(orjson.dumps(_settings(gateway)))
        return self

    @property
    def home(self) -> Path:
        return self.folder.with_name("home")

    def say(self, prompt: str, seconds: float = 240) -> Said:
        """``opencode run`` with `prompt`, to its end."""
        program("node")
        command = CLIENTS / "opencode/node_modules/.bin/opencode"
        if not command.exists():
            absent("OpenCode")
        nowhere = "http://127.0.0.1:9"
        environment = {
            "HOME": str(self.home),
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HTTPS_PROXY": nowhere,
            "HTTP_PROXY": nowhere,
            "NO_PROXY": "127.0.0.1,localhost",
            "OPENCODE_DISABLE_AUTOUPDATE": "1",
            "OPENCODE_DISABLE_MODELS_FETCH": "1",
            "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
            "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
        }
        done = subprocess.run(
            [str(command), "run", prompt],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        return Said(done.returncode, done.stdout, done.stderr, 0)


def _settings(gateway: Running) -> Json:
    limit = {"context": 65536, "output": 8192}
    return {
        "autoupdate": False,
        "share": "disabled",
        "enabled_providers": ["claudegw"],
        "model": "claudegw/claudegw-main",
        "small_model": "claudegw/claudegw-small",
        "provider": {
            "claudegw": {
                "npm": "@ai-sdk/openai-compatible",
                "options": {"baseURL": f"{gateway.url}/v1", "apiKey": "none"},
                "models": {
                    "claudegw-main": {"limit": limit, "reasoning": True},
                    "claudegw-small": {"limit": limit},
                },
            }
        },
    }


@attrs.define
class Model:
    """One that reads a note when it is asked what is in it, with the tool of whoever asks."""

    notes: dict[str, Path]

    def __call__(self, body: Json) -> Sequence[Block]:
        last = orjson.dumps(body["messages"][-1]).decode()
        names = {tool["name"] for tool in body.get("tools", ())}
        if "tool_result" in last:
            return [Thinking("I see."), Text(NOTE if NOTE in last else "There is nothing.")]
        for reader, parameter in (("read", "filePath"), ("Read", "file_path")):
            if reader in names:
                path = str(self.notes[reader])
                return [Thinking(THOUGHT), Text("I look."), ToolUse(reader, {parameter: path})]
        return [Text("A title")]


@pytest.fixture
def servers() -> Iterator[tuple[ScriptedLlama, ScriptedLlama, Model]]:
    model = Model({})
    with (
        ScriptedLlama(model, n_ctx=131_072, prefill=0.2, pace=0.01).serving() as main,
        ScriptedLlama(model).serving() as small,
    ):
        yield main, small, model


def test_opencode_beside_claude_code(
    servers: tuple[ScriptedLlama, ScriptedLlama, Model], tmp_path: Path
) -> None:
    """Both read a file with their own tools and say what is in it, on one slot, in turn."""
    main, small, model = servers
    tiers = {"main": {"url": main.url}, "small": {"url": small.url}}
    gateway = start_gateway(tmp_path, tiers)
    try:
        (tmp_path / "claude").mkdir()
        claude = Client.of("newest", gateway, tmp_path / "claude")
        opencode = OpenCode.of(gateway, tmp_path / "opencode")
        for reader, folder in (("read", opencode.folder), ("Read", claude.folder)):
            model.notes[reader] = folder / "note.txt"
            model.notes[reader].write_text(f"This is {NOTE}.\n")
        with ThreadPoolExecutor() as both:
            saying = [both.submit(one.say, ASKED) for one in (opencode, claude)]
            theirs, ours = (said.result() for said in saying)
        calls = gateway.ask("/status")[1]["last"]
    finally:
        gateway.stop()
    for said in (theirs, ours):
        assert said.status == 0, said.errors
        assert NOTE in said.answer, (said.answer, said.errors)
    assert main.most_at_once == 1
    assert {call["outcome"] for call in calls} == {"answered"}
    # OpenCode's title is the small model's work, its turns the main one's.
    by_name = {
        (call["model"], call["tier"]) for call in calls if call["rule"].startswith("the tier's")
    }
    assert {("claudegw-small", "small"), ("claudegw-main", "main")} <= by_name
    # What it was told it says again as it was, its thoughts too: the prompt's beginning stays.
    first, second = (
        body["messages"]
        for body in main.asked
        if any(tool["name"] == "read" for tool in body["tools"])
    )
    assert second[: len(first)] == first
    thought, text, call = second[len(first)]["content"]
    assert (thought["thinking"], text["text"]) == (THOUGHT, "I look.")
    assert call["input"] == {"filePath": str(model.notes["read"])}
