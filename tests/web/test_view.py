"""What the page shows of a status, in words."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.web.dashboard import _html
from gateway.web.drawing import SECTIONS, _path
from gateway.web.view import Series, View, view
from tests.commands.test_status_page import STATUSES
from tests.scene import call, chart, status

NOW = 1_790_000_000.0


def seen(**said: Any) -> View:
    return view(said, [])


def test_a_tier() -> None:
    """Its state has a tone; what is not known is left out; what can be done is offered."""
    main, small = view(status(), []).tiers
    assert (main.name, main.state, main.tone, main.model) == (
        "main",
        "ready",
        "busy",
        "GLM-5-IQ2_XXS.gguf",
    )
    assert dict(main.figures) == {
        "window": "65 536",
        "slots busy": "1/1",
        "in line": "3",
        "prefill": "73.8/s",
        "answer": "10.4/s",
        "cached": "90 %",
        "snapshots": "6, 19.4 GB",
    }
    assert (main.saves, main.is_ours, main.remarks) == (True, True, ())
    assert (small.state, small.tone, small.saves) == ("loading", "still", False)
    assert small.remarks == ("small has been loading for 4.2 s: it loads its model",)
    assert "snapshots" not in dict(small.figures)


@pytest.mark.parametrize(
    ("tier", "state", "tone", "is_ours"),
    [
        ({}, "not known yet", "still", False),
        ({"server": {"n_ctx": 1}}, "up", "good", False),
        ({"server": {"n_ctx": 1}, "running": 1}, "up", "busy", False),
        ({"process": {"state": "failed", "reason": "it ended"}}, "failed", "bad", True),
        ({"process": {"state": "ready"}}, "ready", "good", True),
        ({"error": {"message": "it is gone", "passes": True}}, "away", "bad", False),
        ({"error": {"message": "no such key", "passes": False}}, "refuses", "bad", False),
    ],
)
def test_states(tier: Any, state: str, tone: str, is_ours: bool) -> None:
    """Of a server of ours its own, of another whether it is up."""
    (shown,) = seen(tiers={"main": tier}).tiers
    assert (shown.state, shown.tone, shown.is_ours) == (state, tone, is_ours)


def test_a_state_that_is_moved_is_told() -> None:
    """It takes a while, and somebody may have asked for it."""
    (shown,) = seen(tiers={"main": {"cache": {"moves": True, "advice": ["x"]}}}).tiers
    assert shown.remarks == ("its slot is saved or restored",)
    assert shown.advice == ("x",)


def test_what_runs() -> None:
    """A prefill has a bar; with the first tokens it is over, and has a speed."""
    (prefill,) = view(status(), []).running
    assert prefill.fraction == 0.4909
    assert prefill.doing == "49 %, 2:53 min left, 73.8/s"
    assert prefill.detail == "12 288 of 25 031 tokens"
    said = call(1, outcome="running", output=101, first=2.0, took=12.0, progress={"fraction": 1})
    (answer,) = seen(calls=[said]).running
    assert (answer.fraction, answer.doing, answer.detail) == (None, "101 tokens out, 10.0/s", "")
    (begins,) = seen(calls=[call(1, outcome="running", output=0, resent=2)]).running
    assert (begins.fraction, begins.doing, begins.detail) == (None, "begins", "sent again 2 times")


def test_who_waits() -> None:
    """In the order in which they will go, each with its reason; many are counted."""
    shown = view(status(), [])
    assert [(each.place, each.kind, each.eta) for each in shown.waiting] == [
        ("1", "turn", "2:53 min"),
        ("2", "subagent", "3:21 min"),
        ("3", "suggestion", ""),
    ]
    assert shown.waiting[1].doing == "a subagent waits for it: people go first"
    assert [each.background for each in shown.waiting] == [False, False, True]
    many = [call(n, outcome="waiting", place=23 - n) for n in range(23)]
    shown = seen(calls=many)
    assert (len(shown.waiting), shown.more) == (20, 3)
    assert [each.place for each in shown.waiting[:2]] == ["1", "2"]
    (loading,) = seen(calls=[call(1, outcome="waiting")]).waiting
    assert loading.doing == "its server has to come up first"


def test_what_was() -> None:
    """Times, tokens, share and speed; what went wrong is marked."""
    last = view(status(), []).last
    assert (last[1].share, last[1].speed, last[1].took) == ("99 %", "9.8/s", "35 s")
    assert (last[0].share, last[0].cached) == ("0 %", "0")
    assert [each.outcome for each in last if not each.is_well] == ["broken: overloaded_error"]
    assert last[0].at == time.strftime("%H:%M:%S", time.localtime(call(5)["at"]))
    assert len(seen(last=[call(n) for n in range(40)]).last) == 25


@pytest.mark.parametrize(
    "said",
    [
        {"output": 1},
        {"output": 5, "first": None},
        {"output": 5, "first": 3.0, "took": 3.0},
        {"output": None},
    ],
)
def test_a_speed_that_cannot_be_known(said: Any) -> None:
    """One token has none, and neither has an answer of no duration."""
    assert seen(last=[call(1, **said)]).last[0].speed == ""


def test_cold_prompts_are_explained() -> None:
    """Why, how many tokens, and how long they took; older ones too, but only some."""
    cold = view(status(), []).cold
    assert [(each.kind, each.cost) for each in cold] == [
        ("turn", "21 906 tokens, 4:57 min"),
        ("turn", "13 210 tokens, 2:59 min"),
    ]
    assert cold[0].why.startswith("About 21906 tokens of its past were written anew: messages[4]")
    lost = {"avoidable": 5000, "rewritten": 0, "sentence": "x"}
    many = seen(last=[call(n, cold=lost) for n in range(40)]).cold
    assert [each.cost for each in many] == ["5 000 tokens"] * 8


def bucket(**more: Any) -> dict[str, Any]:
    none = {"calls": 0, "input": 0, "cached": 0, "output": 0, "first": None, "with_first": 0}
    return {"at": NOW, **none, **more}


def test_no_chart_of_nothing() -> None:
    """Neither before the first call nor after hours without one."""
    assert view({}, []).charts is None
    assert view({}, [bucket()] * 72).charts is None


def test_charts() -> None:
    """Bars of what is known, as shares of the highest; a bucket without calls has no bar."""
    busy = bucket(calls=2, input=100, cached=300, output=20, first=4.0)
    cold = bucket(calls=2, input=200, cached=0, output=20, first=8.0)
    shown = view({}, [bucket(), busy, cold]).charts
    assert shown is not None
    tokens, share, first = shown.charts
    assert tokens.top == "400"
    assert tokens.says == "300 were evaluated and 300 were cached; at most 400 in five minutes."
    evaluated, cached = tokens.series
    assert evaluated.bars == ((0.0, 0.0), (0.0, 0.25), (0.0, 0.5))
    assert cached.bars == ((0.0, 0.0), (0.25, 1.0), (0.5, 0.5))
    assert share.says == "50 % of all prompt tokens were cached."
    assert share.series[0].bars == (None, (0.0, 0.75), (0.0, 0.0))
    assert (first.top, first.series[0].bars) == ("8.0 s", (None, (0.0, 0.5), (0.0, 1.0)))


def test_the_same_by_the_hour() -> None:
    """Twelve buckets are one row; the mean goes by the calls that had any content."""
    slow = bucket(calls=3, input=10, cached=30, output=1, first=8.0, with_first=3)
    fast = bucket(calls=9, input=10, cached=30, output=1, first=4.0, with_first=1)
    shown = view({}, [slow, fast, *[bucket()] * 11, slow]).charts
    assert shown is not None
    begin = time.strftime("%H:%M", time.localtime(NOW))
    assert shown.hours == (
        (begin, "12", "20", "60", "75 %", "2", "7.0 s"),
        (begin, "3", "10", "30", "75 %", "1", "8.0 s"),
    )
    hours = view({}, [bucket(calls=1), *[bucket()] * 12]).charts
    assert hours is not None
    assert hours.hours[1] == (begin, "0", "0", "0", "", "0", "")


def test_what_is_the_same_looks_the_same() -> None:
    """Nothing is drawn anew for no reason."""
    said, now = status(), chart(NOW)
    assert view(said, now) == view(said, now)


@settings(deadline=None)
@given(STATUSES.filter(lambda said: isinstance(said, dict)))
def test_whatever_is_said_is_drawn(said: Any) -> None:
    """Nothing that a status may say keeps the page from being drawn."""
    shown = view(said, [])
    for name, section in SECTIONS.items():
        assert _html(section.drawn(name, section.of(shown))).startswith(f'<section id="{name}"')


@given(st.text(max_size=30))
def test_names_are_escaped(name: str) -> None:
    """Whatever a client calls its model, the page has no element by it."""
    evil = f'"><script>alert(1)</script>{name}'
    shown = seen(last=[call(1, model=evil, kind=evil, rule=evil)])
    html = _html(SECTIONS["last"].drawn("last", shown.last))
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_bars() -> None:
    """One for each bucket in its place; none of nothing, and none too low to be seen."""
    assert _path(Series("x", (None, (0.25, 1.0), (0.5, 0.5), (0.0, 0.001)))) == (
        "M110 75.0V0.0h80V75.0zM310 100.0V99.0h80V100.0z"
    )
