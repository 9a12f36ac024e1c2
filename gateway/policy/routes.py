"""
Which tier a call goes to, and by which rule.

1. The rules of the configuration come first, in their order.
2. A kind that has a tier of its own goes there, whatever its name: today's client gives its side
   calls the name of the main model, and a verdict on safety is no work for a tiny one.
3. A tier's own name (``claudegw-small``) is a rule that needs no writing.
4. What Claude Code names after the small model goes to the small tier.
5. All else goes to the main tier: turns at once, what nobody waits for in the background.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final

import attrs

from gateway.config import RouteRule
from gateway.policy.calls import Call, Kind, names_small

MAIN: Final = "main"
SMALL: Final = "small"

#: Kinds whose tier does not depend on a name.
_OWN_TIER: Final[Mapping[Kind, str]] = {
    "title": SMALL,
    "hook": SMALL,
    "fetch": SMALL,
    "probe": SMALL,
    "classifier": MAIN,
}

#: Kinds that nobody waits for.  They share the main conversation's prefix, so they stay with it.
_BACKGROUND: Final = frozenset({"suggestion", "recap"})

#: A tier's own model name is this and its name.  Claude Code's model discovery keeps only names
#: with "claude" in them, and takes no window for one that starts with "claude-".
MODEL_PREFIX: Final = "claudegw-"


@attrs.frozen
class Route:
    """
    Where a call goes.

    Attributes:
        tier: the name of the tier.
        rule: what sent it there, for the log and ``/status``.
        background: it gives way to every call that somebody waits for.
        degraded: why it does not go where it belongs; "" where it does.
    """

    tier: str
    rule: str
    background: bool = False
    degraded: str = ""


def choose(call: Call, model: str, rules: Sequence[RouteRule], tiers: Collection[str]) -> Route:
    """
    The route of `call`.

    Args:
        call: the call, understood.
        model: the client's name for the model.
        rules: those of the configuration; all that a rule names must match.
        tiers: the names of the tiers that exist.
    """
    lowered = model.lower()
    for number, rule in enumerate(rules, 1):
        fits_model = rule.model is None or fnmatchcase(lowered, rule.model.lower())
        fits_kind = rule.kind is None or rule.kind == call.kind
        if fits_model and fits_kind:
            return Route(rule.tier, f"route {number}", call.kind in _BACKGROUND)
    because = f"{call.kind}: {call.why}"
    background = call.kind in _BACKGROUND
    own = _OWN_TIER.get(call.kind)
    if own is not None and own in tiers:
        return Route(own, because)
    named = lowered.removeprefix(MODEL_PREFIX)
    if named != lowered and named in tiers:
        return Route(named, "the tier's own name", background)
    if call.from_claude_code and names_small(model) and SMALL in tiers:
        return Route(SMALL, "the name of the small model", background)
    return Route(MAIN, because, background)


def while_down(route: Route) -> Route:
    """The route of a call whose tier is down."""
    why = f"{route.tier} is down"
    return Route(MAIN, f"{route.rule}; {why}", background=True, degraded=why)


def too_long_for_small(route: Route, tokens: int, window: int) -> Route:
    """The route of a call of `tokens` that does not fit the window of the tier it was for."""
    rule = f"{route.rule}; {tokens} tokens do not fit the {window} of {route.tier}"
    return Route(MAIN, rule, background=True)
