"""
What the prompts of real sessions cost, as their client sends them and as the gateway prepares them.

``python -m bench.audit [VERSION ...]`` plays seven situations with each Claude Code (as
``bin/get-clients`` installs them) on llama-servers whose models are a script, and compares every
prompt of the main model, token by token, with what a server would still hold of the earlier ones
(`tests.e2e.audit`).  The clients send their attribution, as they do without `claudegw settings`.
Nothing of what they say is kept.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import orjson

from tests.e2e.audit import Audit, Figures, Renderer
from tests.e2e.clients import VERSIONS, Client
from tests.e2e.recorder import Heard
from tests.e2e.sessions import ALLOWED, Plan, Stage, furnish, stage, step, turn
from tests.e2e.stack import GLM_ORDER, ROOT

Json = Any

#: In GLM's order the tools come first, in ChatML's the system prompt does.
TEMPLATES: Final = {
    "GLM": Path(GLM_ORDER[1]),
    "ChatML": ROOT / "tests/e2e/templates/chatml.jinja",
}

_ATTRIBUTED: Final = {"CLAUDE_CODE_ATTRIBUTION_HEADER": "1"}

FIRST: Final = Plan(
    "the first session",
    (
        turn("Hello, how many gates are there?"),
        turn("And how many walls are there?"),
        turn("And how many towers are there?"),
        turn("Please run a command"),
        turn("Please edit the file"),
        turn("Please run two"),
        turn("Please send an agent", "subagent", noticed=True),
        turn("Please explore the walls", "subagent", noticed=True),
        turn("Please send an agent again", "subagent", noticed=True),
        step("/compact", "compaction"),
        turn("And how many are there now?"),
        turn("Please read the file"),
    ),
    env=_ATTRIBUTED,
)

SAME_FOLDER: Final = Plan(
    "the same folder",
    (turn("Tell me of the eastern gates"), turn("Please read the file")),
    env=_ATTRIBUTED,
)

OTHER_FOLDER: Final = Plan(
    "another folder",
    (turn("Tell me of the western gates"), turn("Please read the file")),
    env=_ATTRIBUTED,
)

#: A server of tools, as its client starts it: the older client loads none but such tools late.
_WALLS: Final = """
import json, sys
TOOL = {"name": "count", "description": "Counts the walls.", "inputSchema": {"type": "object"}}
for line in sys.stdin:
    asked = json.loads(line)
    answers = {
        "initialize": {
            "protocolVersion": (asked.get("params") or {}).get("protocolVersion"),
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "walls", "version": "1"},
        },
        "tools/list": {"tools": [TOOL]},
    }
    if "id" in asked:
        result = answers.get(asked["method"], {"content": [{"type": "text", "text": "Five."}]})
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
"""
_SERVERS: Final = {"mcpServers": {"walls": {"command": sys.executable, "args": ["-c", _WALLS]}}}

#: It is compared with nothing but itself: its tools are those of another setting.
LATE: Final = Plan(
    "a late tool",
    (
        turn("Tell me of the old gates"),
        turn("Please run a command"),
        turn("Please find the counter"),
        turn("Please count the walls"),
    ),
    env={**_ATTRIBUTED, "ENABLE_TOOL_SEARCH": "true"},
    changes={"permissions": {"defaultMode": "default", "allow": [*ALLOWED, "mcp__walls"]}},
    options=("--mcp-config", orjson.dumps(_SERVERS).decode()),
)

#: The rows of the table, by the prompts of the first session; other sessions are a row each.
SITUATIONS: Final[Mapping[str, Sequence[str]]] = {
    "three turns": ("Hello", "And how many walls", "And how many towers"),
    "tool calls": ("Please run", "Please edit"),
    "a subagent": ("Please send", "Please explore"),
    "/compact": ("/compact", "And how many are there now", "Please read"),
}


@attrs.frozen
class Said:
    """A call of the main model, in its situation."""

    situation: str
    heard: Heard


def main() -> int:
    """A table for each template, a row each situation and client; the exit status."""
    versions = sys.argv[1:] or VERSIONS
    sessions = {version: list(played(version)) for version in versions}
    for name, template in TEMPLATES.items():
        with tempfile.TemporaryDirectory() as folder:
            renderer = Renderer.of(Path(folder), template)
            try:
                print(f"\n{name}'s order; tokens evaluated again, of all requests and of the worst")
                print(_row("situation", "client", *_COLUMNS))
                for version, said in sessions.items():
                    show(version, said, renderer)
            finally:
                renderer.server.stop()
    return 0


# --- the sessions ---------------------------------------------------------------------------------


def played(version: str) -> Iterator[Said]:
    """All main calls of one client, in the order in which they came."""
    with (
        tempfile.TemporaryDirectory(prefix="claudegw-") as name,
        stage(version, Path(name)) as scene,
    ):
        place = Path(name) / "session"
        client = scene.client(FIRST, place)
        yield from _said(scene, FIRST, client)
        (client.folder / "towers.txt").write_text("the tower\n")  # the repository's state changes
        yield from _said(scene, SAME_FOLDER, client)
        other = elsewhere(client)
        scene.at_work_in(other)
        yield from _said(scene, OTHER_FOLDER, other)
        yield from _said(scene, LATE, scene.client(LATE, Path(name) / "late"))


def elsewhere(client: Client) -> Client:
    """The same client, its home included, in another project."""
    other = attrs.evolve(client, folder=client.folder.with_name("elsewhere"))
    other.folder.mkdir()
    furnish(other.folder)
    kept = client.home / ".claude.json"
    known = orjson.loads(kept.read_bytes())
    known["projects"][str(other.folder.resolve())] = {
        "hasTrustDialogAccepted": True,
        "hasCompletedProjectOnboarding": True,
    }
    kept.write_bytes(orjson.dumps(known))
    return other


def _said(scene: Stage, plan: Plan, client: Client) -> Iterator[Said]:
    for each, heard in scene.play(plan, client):
        print(f"{scene.version}: {plan.name}: {each.prompt}", file=sys.stderr, flush=True)
        for one in heard:
            if one.is_message and one.answer.get("x-claudegw-tier") == "main":
                yield Said(_situation(plan, each.prompt), one)


def _situation(plan: Plan, prompt: str) -> str:
    if plan is not FIRST:
        return plan.name
    found = [name for name, begin in SITUATIONS.items() if prompt.startswith(tuple(begin))]
    return found[0]


# --- the table ------------------------------------------------------------------------------------

_COLUMNS: Final = ("requests", "tokens", "before", "worst", "after", "worst", "avoidable", "left")


def show(version: str, said: Sequence[Said], renderer: Renderer) -> None:
    """Print the rows of one client, and beneath each what was evaluated again and why."""
    rows: dict[str, list[tuple[Figures, Figures]]] = {}
    before, after = Audit(renderer, behind_gateway=False), Audit(renderer)
    for each in said:
        if each.situation == LATE.name and LATE.name not in rows:
            before, after = Audit(renderer, behind_gateway=False), Audit(renderer)
        body, headers = each.heard.body, each.heard.headers
        figures = before.take(body, headers), after.take(body, headers)
        rows.setdefault(each.situation, []).append(figures)
    for situation, pairs in rows.items():
        alone, ours = zip(*pairs, strict=True)
        print(
            _row(
                *(situation, version, len(pairs), sum(each.prompt for each in ours)),
                *(sum(each.again for each in alone), max(each.again for each in alone)),
                *(sum(each.again for each in ours), max(each.again for each in ours)),
                *(sum(each.avoidable for each in ours), sum(each.left for each in ours)),
            ),
            flush=True,
        )
        for each in ours:
            if each.again:
                print(f"    {each.again:>6} of {each.prompt}: {each.cause}")


def _row(situation: str, version: str, *cells: object) -> str:
    return f"{situation:<16} {version:<8}" + "".join(f"{cell:>10}" for cell in cells)


if __name__ == "__main__":
    sys.exit(main())
