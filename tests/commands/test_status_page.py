"""What a gateway does, drawn as text."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gateway.commands.status_page import listed, page, watch

SERVER = {"alias": "/models/GLM-5.gguf", "n_ctx": 65536, "slots": 1, "build": "b1"}
MAIN = {
    "url": "http://127.0.0.1:8080",
    "server": SERVER,
    "slots": 1,
    "running": 1,
    "settling": 0,
    "waiting": 2,
    "pace": {"prefill": 73.8, "generation": 112.4},
}
SMALL = {
    "url": "http://127.0.0.1:8081",
    "server": None,
    "slots": 2,
    "running": 0,
    "settling": 1,
    "waiting": 0,
    "pace": {"prefill": None, "generation": None},
}
PREFILL = {
    "done": 12288,
    "total": 25000,
    "fraction": 0.4915,
    "tokens_per_second": 73.8,
    "seconds_left": 172.2,
}


def call(**more: Any) -> dict[str, Any]:
    """A call as the status has it."""
    return {
        "id": "req_1",
        "kind": "turn",
        "model": "claudegw-main",
        "tier": "main",
        "rule": "default",
        "background": False,
        "waited": 0.4,
        "took": 171.2,
        "input": None,
        "cached": 0,
        "output": 0,
        "outcome": "running",
        "progress": None,
        "place": None,
        "eta": None,
        **more,
    }


def drawn(status: Any, **options: Any) -> str:
    """The page in a terminal of 80 columns, without the blanks at the ends of its lines."""
    out = StringIO()
    Console(file=out, width=80, **options).print(page(status))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def rows(status: Any, title: str) -> list[list[str]]:
    """The lines of the section `title`, its head left out, each cut into its columns."""
    section = drawn(status).split(f"{title} ──", 1)[1].split("\n\n", 1)[0]
    return [
        [part.strip() for part in line.split("  ") if part] for line in section.splitlines()[2:]
    ]


def test_the_whole_page() -> None:
    """Everything fits into 80 columns."""
    status = {
        "version": "0.1.0",
        "tiers": {"main": MAIN, "small": SMALL},
        "calls": [
            call(progress=PREFILL),
            call(kind="suggestion", background=True, outcome="waiting", waited=3.2, place=2),
            call(kind="subagent", outcome="waiting", waited=31.2, place=1, eta=190.4),
        ],
        "last": [
            call(kind="title", tier="small", outcome="answered", took=0.84, input=312, output=14),
            call(outcome="broken: overloaded_error", waited=4012, input=25012, cached=1200),
        ],
    }
    rule = "─"
    assert (
        drawn(status)
        == f"""\
claudegw 0.1.0

Tiers {rule * 74}
tier   state          model       window      busy  in line  prefill  answer
main   up             GLM-5.gguf  65 536       1/1        2   73.8/s   112/s
small  not known yet                      0/2 (+1)        0

Under way {rule * 70}
kind  tier  waited      runs
turn  main   0.4 s  2:51 min  ━━━━━╸        49 %, 2:52 min left, 73.8/s
                                            12 288 of 25 000 tokens

In line {rule * 72}
kind        tier  place  waited  its turn in
subagent    main      1    31 s     3:10 min
suggestion  main      2   3.2 s

Last calls {rule * 69}
kind   tier   waited      took     new  cached  out  outcome
title  small   0.4 s     0.8 s     312       0   14  answered
turn   main   1:06 h  2:51 min  25 012   1 200    0  broken: overloaded_error"""
    )


def test_a_gateway_at_rest() -> None:
    """With nothing to do it says so, and has no line."""
    said = drawn({"version": "0.1.0", "tiers": {}, "calls": [], "last": []})
    assert "No call is under way." in said
    assert "No call has ended yet." in said
    assert "In line" not in said


@pytest.mark.parametrize(
    ("progress", "told"),
    [
        (PREFILL, [["━━━━━╸", "49 %, 2:52 min left, 73.8/s"], ["12 288 of 25 000 tokens"]]),
        ({"done": 500, "total": 1000}, [["━━━━━━", "50 %"], ["500 of 1 000 tokens"]]),
        ({"fraction": 0.25, "seconds_left": 7}, [["━━━", "25 %, 7.0 s left"]]),
        ({"total": 900, "seconds_left": 60}, [["1:00 min left"], ["900 tokens"]]),
        ({"fraction": 7, "done": 0, "total": 0}, [["━━━━━━━━━━━━", "100 %"], ["0 of 0 tokens"]]),
        ({}, [[]]),
        (None, [[]]),
        ("no", [[]]),
    ],
)
def test_a_prefill(progress: Any, told: list[list[str]]) -> None:
    """What is known of a prefill is shown, and no more."""
    found = rows({"calls": [call(progress=progress)]}, "Under way")
    assert [found[0][4:], *found[1:]] == told


def test_an_answer_that_comes() -> None:
    """With the first tokens the prefill is over, whatever is still said of it."""
    status = {"calls": [call(output=1234, progress=PREFILL)]}
    assert rows(status, "Under way") == [["turn", "main", "0.4 s", "2:51 min", "1 234 tokens out"]]


def test_those_who_wait_stand_by_place() -> None:
    """First by tier; and beyond twenty they are counted."""
    waiting = [call(outcome="waiting", place=place, waited=place) for place in range(30, 0, -1)]
    found = rows({"calls": [call(outcome="waiting", tier="small", place=1), *waiting]}, "In line")
    assert [line[2] for line in found[:20]] == [str(place) for place in range(1, 21)]
    assert found[20:] == [["and 11 more"]]


def test_only_the_latest_calls_are_shown() -> None:
    """Ten of them."""
    status = {"last": [call(outcome=f"400 number {number}") for number in range(50)]}
    assert [line[-1] for line in rows(status, "Last calls")] == [
        f"400 number {number}" for number in range(10)
    ]


def test_a_server_of_ours_says_its_state() -> None:
    """Its state stands in the table, and below why it is not ready and which calls are refused."""
    process = {"state": "backoff", "for": 12.0, "reason": "it was ended by SIGKILL"}
    main = {**MAIN, "process": process, "refused": ["req_7"]}
    assert rows({"tiers": {"main": main}}, "Tiers")[0][1] == "backoff"
    said = drawn({"tiers": {"main": main}})
    assert "main has been in backoff for 12 s: it was ended by SIGKILL" in said
    assert "main refuses req_7 for an hour" in said
    ready = {**MAIN, "process": {"state": "ready", "for": 1, "reason": "it was stuck"}}
    assert "stuck" not in drawn({"tiers": {"main": ready}})


@pytest.mark.parametrize(
    ("process", "told"),
    [
        ({"state": "loading", "for": 4.2}, "main has been loading for 4.2 s: why"),
        ({"state": "starting", "for": 1}, "main has been starting for 1.0 s: why"),
        ({"state": "unwell", "for": 1}, "main has been unwell for 1.0 s: why"),
        ({"state": "draining", "for": 1}, "main has been draining for 1.0 s: why"),
        ({"state": "stopped", "for": 1}, "main has been stopped for 1.0 s: why"),
        ({"state": "failed", "for": 70}, "main failed 1:10 min ago: why"),
        ({"state": "failed"}, "main is failed: why"),
        ({"state": "loading"}, "main is loading: why"),
    ],
)
def test_how_long_a_server_has_been_away(process: Any, told: str) -> None:
    """In English, whatever its state, also where it is not known how long."""
    assert told in drawn({"tiers": {"main": {**MAIN, "process": {**process, "reason": "why"}}}})


@pytest.mark.parametrize(("passes", "state"), [(True, "away"), (False, "refuses")])
def test_why_a_server_of_somebody_else_does_not_answer(passes: bool, state: str) -> None:
    """It is said in the table that it does not, and below why; a server of ours says it once."""
    error = {"message": "The model server of tier 'small' wants a key.", "passes": passes}
    small = {**SMALL, "error": error}
    assert rows({"tiers": {"small": small}}, "Tiers")[0][1] == state
    assert "small: The model server of tier 'small' wants a key." in drawn(
        {"tiers": {"small": small}}
    )
    process = {"state": "loading", "for": 1, "reason": "it loads its model"}
    ours = drawn({"tiers": {"small": {**small, "process": process}}})
    assert "it loads its model" in ours
    assert "wants a key" not in ours


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (3599.6, "1:00 h"),
        (-5, "0 s"),
        (1e7, "2 777:46 h"),
    ],
)
def test_durations(seconds: float, told: str) -> None:
    """In the unit that suits them."""
    found = rows({"calls": [call(outcome="waiting", waited=seconds)]}, "In line")
    assert found[0][2] == told


def test_what_a_client_names_does_not_steer_the_terminal() -> None:
    """Neither escape sequences nor markup nor line ends get through."""
    said = drawn({"version": "1\x1b[31m", "last": [call(kind="[red]a\n\x07b", outcome="\x9b2J")]})
    assert "claudegw 1?[31m" in said
    assert "[red]a??b" in said
    assert "?2J" in said
    assert "\x1b" not in said


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
PROGRESSES = st.fixed_dictionaries({}, optional=dict.fromkeys(PREFILL, JSON)) | JSON
CALLS = st.fixed_dictionaries({}, optional={**dict.fromkeys(call(), JSON), "progress": PROGRESSES})
WAITING = CALLS.map(lambda some: {**some, "outcome": "waiting"})
TIERS = st.dictionaries(
    st.text(max_size=5), st.fixed_dictionaries({}, optional=dict.fromkeys(MAIN, JSON))
)
STATUSES = JSON | st.fixed_dictionaries(
    {},
    optional={
        "version": JSON,
        "tiers": TIERS | JSON,
        "calls": st.lists(CALLS | WAITING | JSON, max_size=3) | JSON,
        "last": st.lists(CALLS | JSON, max_size=3) | JSON,
        "more": JSON,
    },
)


@settings(deadline=None)
@given(STATUSES)
def test_whatever_a_gateway_says_is_drawn(status: Any) -> None:
    """Another version may say less, more or other things."""
    said = drawn(status)
    assert said.startswith("claudegw")
    assert max(map(len, said.splitlines())) <= 80


@settings(deadline=None)
@given(st.lists(CALLS | JSON, max_size=3), JSON)
def test_whatever_was_written_down_is_drawn(calls: list[Any], at: Any) -> None:
    """Also a time that is none."""
    dated = [{**call, "at": at} if isinstance(call, dict) else call for call in calls]
    out = StringIO()
    Console(file=out, width=80).print(listed(dated))
    assert out.getvalue().strip()


def test_watching_draws_again_and_again() -> None:
    """Each look is drawn until somebody interrupts it; the terminal is left as it was."""
    out, looks = StringIO(), iter(range(10))

    def ask() -> Any:
        return {"version": f"number {next(looks)}"}

    def pause() -> None:
        if "number 2" in out.getvalue():
            raise KeyboardInterrupt

    console = Console(file=out, width=80, height=40, force_terminal=True)
    with pytest.raises(KeyboardInterrupt):
        watch(console, ask, pause)
    said = out.getvalue()
    assert [f"number {number}" in said for number in range(4)] == [True, True, True, False]
    assert said.index("\x1b[?1049h") < said.index("number 0")
    assert said.index("number 2") < said.index("\x1b[?1049l")


def test_in_a_narrow_terminal_the_outcome_gives_way() -> None:
    """What a call was, and where it went, stays readable."""
    call = {"kind": "turn", "tier": "main", "at": 1.8e9, "waited": 3.0, "took": 4.0}
    console = Console(width=60, file=StringIO())
    console.print(listed([call | {"outcome": "400 invalid_request_error"}]))
    assert isinstance(console.file, StringIO)
    drawn = console.file.getvalue()
    assert "turn" in drawn
    assert "main" in drawn
    assert "3.0 s" in drawn
