"""
A day of the real Claude Code: every call is what it is, and goes where it belongs.

The day is played once for each client, on scripted servers (`tests.e2e.sessions`).  The table of
its calls is logged: ``pytest --log-cli-level=INFO`` shows it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from tests import redacted
from tests.e2e.audit import Audit, Renderer
from tests.e2e.clients import VERSIONS
from tests.e2e.recorder import Heard
from tests.e2e.sessions import SESSION, Step, call_of, stage
from tests.e2e.stack import GLM_ORDER
from tests.redacted import Call

Json = Any

figures = logging.getLogger(__name__)

pytestmark = pytest.mark.client

OLD: Final = "2.1.36"

#: Where each kind goes in a house with two tiers and no rules.
TIERS: Final = {
    "turn": "main",
    "subagent": "main",
    "compaction": "main",
    "suggestion": "main",
    "recap": "main",
    "count": "main",
    "title": "small",
    "hook": "small",
    "fetch": "small",
    "probe": "small",
    "other": "small",
}

#: Kinds that nobody waits for.
BACKGROUND: Final = {"suggestion", "recap"}

#: What is no kind of its own, by its mark: only the older client has such calls.
OTHERS: Final = {"Extract any file paths", "You are an expert at analyzing"}


@attrs.frozen
class Day:
    """
    A session that was played.

    Attributes:
        version: of the client.
        steps: each step, with the calls to a model that came of it.
        ledger: what the gateway wrote down of each call, by its ``request-id``.
    """

    version: str
    steps: Sequence[tuple[Step, Sequence[Heard]]]
    ledger: Mapping[str, Json]

    @property
    def calls(self) -> list[Heard]:
        return [heard for _, calls in self.steps for heard in calls]


@pytest.fixture(scope="module", params=VERSIONS)
def day(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Day:
    """The day of one client."""
    version: str = request.param
    folder: Path = tmp_path_factory.mktemp("day")
    ledger: dict[str, Json] = {}
    steps: list[tuple[Step, Sequence[Heard]]] = []
    with stage(version, folder) as set_up:
        client = set_up.client(SESSION, folder / "session")
        for each, heard in set_up.play(SESSION, client):
            steps.append((each, [call for call in heard if call.is_message or call.is_count]))
            # It keeps the last hundred calls.
            ledger |= {call["id"]: call for call in set_up.gateway.ask("/status")[1]["last"]}
    return Day(version, steps, ledger)


def kind(heard: Heard) -> str:
    """What the gateway said it is."""
    return heard.answer["x-claudegw-call"]


def tier(heard: Heard) -> str:
    """Where the gateway said it went."""
    return heard.answer["x-claudegw-tier"]


# --- what each call is ----------------------------------------------------------------------------


def test_each_call_is_known(day: Day) -> None:
    """Of each thing that a user does come calls of the right kinds, and no others."""
    for step, calls in day.steps:
        for (what, where), times in sorted(Counter((kind(c), tier(c)) for c in calls).items()):
            shown = (day.version, step.prompt, times, what, where)
            figures.info("%-7s %-34s %3d %-10s -> %s", *shown)
    found = {step.prompt: {kind(call) for call in calls} for step, calls in day.steps}
    assert found == {step.prompt: step.kinds[day.version] for step in SESSION.steps}


def test_each_call_is_answered_where_it_belongs(day: Day) -> None:
    """Each call goes to the tier of its kind, and is answered there."""
    assert {call.status for call in day.calls} == {200}
    assert {(kind(c), tier(c)) for c in day.calls} == {
        (what, TIERS[what]) for step in SESSION.steps for what in step.kinds[day.version]
    }


def test_the_ledger_agrees(day: Day) -> None:
    """What a client is told of its call is what the gateway writes down, with a reason."""
    for call in day.calls:
        written = day.ledger[call.answer["request-id"]]
        assert (written["kind"], written["tier"]) == (kind(call), tier(call))
        assert written["model"] == call.body["model"]
        assert written["outcome"] == "answered"
        assert written["rule"]
        if call.body["model"] == "claudegw-main":
            assert written["background"] == (written["kind"] in BACKGROUND)


def test_nothing_is_unrecognised(day: Day) -> None:
    """A turn has the conversation's tools; what is of no kind of its own is one that we know."""
    kits = {
        frozenset(tool["name"] for tool in call.body.get("tools", ()))
        for call in day.calls
        if kind(call) == "turn"
    }
    assert len(kits) == 1
    assert len(kits.pop()) >= 20
    others = [call.body["system"] for call in day.calls if kind(call) == "other"]
    assert all(redacted.marks(system) & OTHERS for system in others)
    assert bool(others) == (day.version == OLD)


# --- what each prompt costs -----------------------------------------------------------------------

#: Tokens that a prompt may evaluate again, by where it parts from all earlier ones; what is not
#: named here goes on where another ended (docs/prompt-cache.md has the figures and the reasons).
NAMED: Final = {"other tools": 3200, "another opening turn": 3600}

#: Of them, those of TaskStop, which the newest client's agents that only search have too.
TASK_STOP: Final = 250


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Renderer]:
    """A server with GLM's order that is asked for prompts and tokens."""
    made = Renderer.of(tmp_path_factory.mktemp("renderer"), Path(GLM_ORDER[1]))
    yield made
    made.server.stop()


@pytest.mark.server
def test_no_prompt_is_evaluated_twice(day: Day, renderer: Renderer) -> None:
    """All but what docs/prompt-cache.md names goes on from what the server holds."""
    audit = Audit(renderer)
    main = [call for call in day.calls if tier(call) == "main" and not call.is_count]
    assert len(main) > 15
    found = [(kind(call), audit.take(call.body, call.headers)) for call in main]
    for what, each in found:
        if each.again:
            figures.info(
                "%-7s %-10s %5d of %d: %s", day.version, what, each.again, each.prompt, each.cause
            )
        assert each.again <= NAMED.get(each.cause, 0), (what, each)
        assert each.avoidable <= TASK_STOP, (what, each)
    assert any(each.again for _, each in found)  # an agent's system prompt, at least


# --- what each call looks like --------------------------------------------------------------------


def recorded(day: Day) -> Sequence[Call]:
    """What is committed of this client."""
    (found,) = [
        each for each in redacted.recordings() if (each.client == OLD) == (day.version == OLD)
    ]
    return found.session(SESSION.name).calls


def now(day: Day) -> Json:
    """A fixture of what the client did just now."""
    calls = [call_of(step, heard) for step, of_step in day.steps for heard in of_step]
    return redacted.fixture(day.version, {SESSION.name: calls})


def test_the_recording_is_of_this_client(day: Day) -> None:
    """A new client wants a new recording: ``python -m tests.e2e.sessions newest``."""
    agents = {call.headers["user-agent"] for call in day.calls}
    assert agents == {call.headers["user-agent"] for call in recorded(day)}


def test_each_call_looks_as_recorded(day: Day) -> None:
    """Each kind of call has the fields, the tools, the blocks and the marks of the recording."""
    ours = looks(redacted.expanded(now(day)).calls)
    theirs = looks(recorded(day))
    assert ours.keys() == theirs.keys()
    for what, look in ours.items():
        assert look == theirs[what], what


def test_its_prose_can_be_taken_out(day: Day) -> None:
    """Nothing that the client's makers wrote is left in a fixture of this client."""
    assert list(redacted.prose(now(day))) == []


def looks(calls: Iterable[Call]) -> dict[str, dict[str, set[str]]]:
    """What is found in the calls of each kind."""
    found: dict[str, dict[str, set[str]]] = {}
    for call in calls:
        look = found.setdefault(call.kind, {})
        for aspect, values in _look(call).items():
            look.setdefault(aspect, set()).update(values)
    return found


def _look(call: Call) -> dict[str, Iterable[str]]:
    body = call.body
    schema = ((body.get("output_config") or {}).get("format") or {}).get("schema") or {}
    contents = [each["content"] for each in body["messages"]]
    blocks = [block for each in contents if isinstance(each, list) for block in each]
    return {
        "path": [call.path],
        "headers": call.headers,
        "betas": call.headers.get("anthropic-beta", "").split(","),
        "fields": body,
        "schema": schema.get("properties", ()),
        "tools": (tool["name"] for tool in body.get("tools", ())),
        "roles": (each["role"] for each in body["messages"]),
        "blocks": (block["type"] for block in blocks),
        "system marks": redacted.marks(body.get("system", "")),
        "last marks": redacted.marks(body["messages"][-1]["content"]),
    }
