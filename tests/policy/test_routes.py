"""Which tier, and by which rule."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import RouteRule
from gateway.policy.calls import KINDS, Call
from gateway.policy.routes import Route, choose, too_long_for_small

BOTH = ("main", "small")
TURN, TITLE = Call("turn", "no mark"), Call("title", "a title")


@pytest.mark.parametrize(
    ("kind", "tier"),
    [
        ("turn", "main"),
        ("subagent", "main"),
        ("title", "small"),
        ("hook", "small"),
        ("fetch", "small"),
        ("classifier", "main"),
        ("compaction", "main"),
        ("suggestion", "main"),
        ("recap", "main"),
        ("probe", "small"),
        ("other", "main"),
    ],
)
def test_each_kind_has_a_default(kind: Any, tier: str) -> None:
    """Housekeeping goes to the small tier, everything else to the main one, and it says why."""
    background = kind in ("suggestion", "recap")
    expected = Route(tier, f"{kind}: because", background)
    assert choose(Call(kind, "because"), "m", (), BOTH) == expected


_GLOBS = st.text("ab*?[]!-\\{}", max_size=8)
_RULES = st.lists(
    st.builds(
        RouteRule,
        tier=st.sampled_from(BOTH),
        model=st.none() | _GLOBS,
        kind=st.none() | st.sampled_from(KINDS),
    ),
    max_size=4,
)


@given(st.sampled_from(KINDS), st.booleans(), st.text("ab*", max_size=6) | st.text(), _RULES)
def test_any_rules_lead_somewhere(
    kind: Any, ours: bool, model: str, rules: list[RouteRule]
) -> None:
    """The first rule that matches decides, those behind it change nothing, and a tier is found."""
    call = Call(kind, "because", from_claude_code=ours)
    found = choose(call, model, rules, BOTH)
    assert found.tier in BOTH
    if found.rule.startswith("route "):
        number = int(found.rule.removeprefix("route "))
        assert found == choose(call, model, rules[:number], BOTH)
        assert found.tier == rules[number - 1].tier
    else:
        assert found == choose(call, model, (), BOTH)


@pytest.mark.parametrize("model", ["claudegw-main", "claude-opus-5", "claudegw-small"])
@pytest.mark.parametrize(
    ("kind", "tier"),
    [("title", "small"), ("hook", "small"), ("fetch", "small"), ("probe", "small")],
)
def test_housekeeping_is_known_by_what_it_is(kind: Any, tier: str, model: str) -> None:
    """Today's client gives its side calls the main model's name; only a rule sends them there."""
    ours = Call(kind, "because", from_claude_code=True)
    assert choose(ours, model, (), BOTH).tier == tier
    assert choose(ours, model, [RouteRule("main", kind=kind)], BOTH).tier == "main"


@pytest.mark.parametrize("model", ["claudegw-small", "claude-haiku-4-5", "claude-sonnet-5"])
def test_a_verdict_is_no_work_for_the_small_tier(model: str) -> None:
    """A safety check goes to main whatever its name, unless a rule says otherwise."""
    check = Call("classifier", "because", from_claude_code=True)
    assert choose(check, model, (), BOTH).tier == "main"
    assert choose(check, model, [RouteRule("small", kind="classifier")], BOTH).tier == "small"


@pytest.mark.parametrize("kind", ["suggestion", "recap"])
def test_what_nobody_waits_for_gives_way_wherever_it_goes(kind: Any) -> None:
    """A rule or a name changes its tier; it stays in the background."""
    ours = Call(kind, "because", from_claude_code=True)
    assert choose(ours, "m", [RouteRule("x", model="m")], BOTH) == Route("x", "route 1", True)
    assert choose(ours, "claude-haiku-4-5", (), BOTH).background
    assert choose(ours, "claudegw-small", (), BOTH).background


@pytest.mark.parametrize("kind", ["turn", "title"])
def test_without_a_small_tier_all_goes_to_main(kind: Any) -> None:
    """A gateway with one tier answers everything with it."""
    assert choose(Call(kind, ""), "m", (), ("main",)).tier == "main"


@pytest.mark.parametrize(
    ("rule", "call", "model", "fits"),
    [
        (RouteRule("x", model="*haiku*"), TURN, "claude-haiku-4-5", True),
        (RouteRule("x", model="*haiku*"), TURN, "Claude-HAIKU", True),
        (RouteRule("x", model="*HAIKU*"), TURN, "claude-haiku-4-5", True),
        (RouteRule("x", model="haiku"), TURN, "claude-haiku-4-5", False),
        (RouteRule("x", model="claude-[os]*"), TURN, "claude-opus", True),
        (RouteRule("x", model="claude-?"), TURN, "claude-opus", False),
        (RouteRule("x", model="*"), TURN, "a/b c", True),
        (RouteRule("x", kind="title"), TITLE, "m", True),
        (RouteRule("x", kind="title"), TURN, "m", False),
        (RouteRule("x", model="m", kind="title"), TITLE, "m", True),
        (RouteRule("x", model="m", kind="title"), TURN, "m", False),
        (RouteRule("x", model="n", kind="title"), TITLE, "m", False),
    ],
)
def test_all_that_a_rule_names_must_match(
    rule: RouteRule, call: Call, model: str, fits: bool
) -> None:
    """A glob on the name, capitals or not, and the kind."""
    found = choose(call, model, [rule], BOTH)
    assert (found == Route("x", "route 1")) == fits
    assert fits or found == choose(call, model, [], BOTH)


def test_the_first_rule_that_matches_wins() -> None:
    """Rules stand in the order of the file, before everything else."""
    rules = [
        RouteRule("a", model="nothing"),
        RouteRule("b", kind="turn"),
        RouteRule("c", model="*"),
    ]
    assert choose(TURN, "m", rules, BOTH) == Route("b", "route 2")
    assert choose(TITLE, "m", rules, BOTH) == Route("c", "route 3")
    assert choose(TITLE, "claudegw-small", rules, BOTH) == Route("c", "route 3")


@pytest.mark.parametrize(
    ("model", "tier"),
    [
        ("claudegw-small", "small"),
        ("ClaudeGW-Small", "small"),
        ("claudegw-main", "main"),
        ("claudegw-huge", "main"),
        ("small", "main"),
        ("claudegw-", "main"),
    ],
)
def test_a_tiers_own_name_is_a_rule(model: str, tier: str) -> None:
    """Who names a tier that exists gets it; a name of nobody means nothing."""
    assert choose(TURN, model, (), BOTH).tier == tier


@pytest.mark.parametrize("model", ["claude-haiku-4-5", "Local-HAIKU", "claudegw-small[1m]"])
@pytest.mark.parametrize("kind", ["turn", "subagent"])
def test_claude_code_names_the_small_model(model: str, kind: Any) -> None:
    """What it names after the small model goes there; without a small tier, and for others, not."""
    ours = Call(kind, "because", from_claude_code=True)
    assert choose(ours, model, (), BOTH) == Route("small", "the name of the small model")
    assert choose(ours, model, (), ("main",)).tier == "main"
    assert choose(ours, "my-model", (), BOTH).tier == "main"
    assert choose(Call(kind, "because"), model, (), BOTH).tier == "main"


def test_a_tier_by_name_may_have_any_name() -> None:
    """Tiers beside main and small are reached by their names."""
    assert choose(TURN, "claudegw-huge", (), (*BOTH, "huge")) == Route(
        "huge", "the tier's own name"
    )


def test_housekeeping_that_is_too_long_gives_way_on_main() -> None:
    """It goes to main as background, and the rule says which size did not fit which window."""
    route = too_long_for_small(Route("small", "title: because"), 5000, 4096)
    assert (route.tier, route.background) == ("main", True)
    assert route.rule.startswith("title: because; ")
    assert "5000" in route.rule
    assert "4096" in route.rule
