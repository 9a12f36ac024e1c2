"""
What the page shows, as plain values: made from what ``/status`` says, and drawn by `drawing`.

Everything is in words already, so two views that are the same look the same, and nothing is drawn
again that has not changed.  Times are those of this machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import attrs

from gateway import figures
from gateway.figures import count, duration, line, listed, mapping, number, percent, speed, word

Json = Any

#: Past calls that are shown, and calls in line.
_LAST: Final = 25
_WAITING: Final = 20

#: Cold prompts that are explained.
_COLD: Final = 8

#: States in which a server does not answer.
_BAD: Final = frozenset({"unwell", "backoff", "failed", "stopped", "away", "refuses"})

#: Buckets of a chart that make an hour.
_HOUR: Final = 12

Tone = Literal["good", "busy", "bad", "still"]


@attrs.frozen
class Tier:
    """
    A tier.

    Attributes:
        state, tone: how it is, in a word and a colour.
        figures: names and values.
        remarks: what is out of order.
        advice: what could be better.
        is_ours: its server can be started anew.
        saves: its slot can be saved.
    """

    name: str
    state: str
    tone: Tone
    model: str
    figures: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]
    advice: tuple[str, ...]
    is_ours: bool
    saves: bool


@attrs.frozen
class Call:
    """
    A call; what is not known of it is blank.

    Attributes:
        at: the time of day when it came.
        share: of its prompt that the server had still.
        fraction: of its prefill, from 0 to 1; None where it has none.
        doing: what it does; or, of one that waits, why it stands where it does.
        detail: more of that.
        first: how long its first token took.
        is_well: nobody has to look into what became of it.
    """

    id: str
    at: str
    kind: str
    model: str
    tier: str
    rule: str
    background: bool
    waited: str
    took: str
    first: str
    new: str
    cached: str
    share: str
    output: str
    speed: str
    outcome: str
    is_well: bool
    place: str
    eta: str
    fraction: float | None
    doing: str
    detail: str


@attrs.frozen
class Cold:
    """A call that evaluated what it need not have: why, and what that cost."""

    id: str
    at: str
    kind: str
    tier: str
    why: str
    cost: str


@attrs.frozen
class Series:
    """One row of bars: what it is, and of each bucket from where to where, from 0 to 1."""

    name: str
    bars: tuple[tuple[float, float] | None, ...]


@attrs.frozen
class Chart:
    """
    A chart of the last hours.

    Attributes:
        says: in a sentence, for who does not see it.
        top: what the upper edge stands for.
    """

    title: str
    says: str
    top: str
    series: tuple[Series, ...]


@attrs.frozen
class Charts:
    """The charts, when they begin, and their figures by the hour."""

    begin: str
    charts: tuple[Chart, ...]
    hours: tuple[tuple[str, ...], ...]


@attrs.frozen
class View:
    """All that the page shows; `more` is how many more wait."""

    version: str
    tiers: tuple[Tier, ...]
    running: tuple[Call, ...]
    waiting: tuple[Call, ...]
    more: int
    last: tuple[Call, ...]
    cold: tuple[Cold, ...]
    charts: Charts | None


def view(status: Mapping[str, Json], chart: Sequence[Mapping[str, Json]]) -> View:
    """
    What is shown.

    Args:
        status: as ``/status`` has it.
        chart: as `gateway.ledger.Ledger.chart` gives it.
    """
    tiers = mapping(status.get("tiers"))
    running, waiting = figures.parted(status.get("calls"))
    last = [mapping(call) for call in listed(status.get("last"))]
    return View(
        word(status.get("version")),
        tuple(_tier(word(name), mapping(tier)) for name, tier in tiers.items()),
        tuple(map(_running, running)),
        tuple(map(_waiting, waiting[:_WAITING])),
        max(0, len(waiting) - _WAITING),
        tuple(map(_call, last[:_LAST])),
        tuple(_cold(call, tiers) for call in last if _cost(call))[:_COLD],
        _charts(chart),
    )


# --- tiers ----------------------------------------------------------------------------------------


def _tier(name: str, tier: Mapping[str, Json]) -> Tier:
    server, pace, cache = (mapping(tier.get(part)) for part in ("server", "pace", "cache"))
    state = figures.state(tier)
    moves = bool(cache.get("moves"))
    remarks = (*figures.remarks(name, tier), *(["its slot is saved or restored"] * moves))
    shown = (
        ("window", count(server.get("n_ctx"))),
        ("slots busy", figures.busy(tier)),
        ("in line", count(tier.get("waiting"))),
        ("prefill", speed(pace.get("prefill"))),
        ("answer", speed(pace.get("generation"))),
        ("cached", _share(cache.get("prefilled_tokens_total"), cache.get("cached_tokens_total"))),
        ("snapshots", _snapshots(cache)),
    )
    return Tier(
        name,
        state,
        _tone(state, is_busy=bool(tier.get("running"))),
        figures.model(tier),
        tuple((label, value) for label, value in shown if value),
        remarks,
        tuple(line(advice) for advice in listed(cache.get("advice"))),
        is_ours=tier.get("process") is not None,
        saves=cache.get("saves") is True,
    )


def _tone(state: str, *, is_busy: bool) -> Tone:
    if state in _BAD:
        return "bad"
    if state in ("up", "ready"):
        return "busy" if is_busy else "good"
    return "still"


def _snapshots(cache: Mapping[str, Json]) -> str:
    if not cache.get("snapshots"):
        return ""
    return f"{count(cache['snapshots'])}, {figures.size(cache.get('snapshot_bytes'))}"


def _share(new: Json, cached: Json) -> str:
    """The share of a prompt that was cached."""
    known, had = number(new), number(cached)
    whole = (known or 0) + (had or 0)
    return percent((had or 0) / whole) if whole > 0 else ""


# --- calls ----------------------------------------------------------------------------------------


def _call(call: Mapping[str, Json]) -> Call:
    outcome = word(call.get("outcome"))
    return Call(
        id=word(call.get("id")),
        at=_clock(call.get("at")),
        kind=word(call.get("kind")) or "?",
        model=word(call.get("model")),
        tier=word(call.get("tier")),
        rule=line(str(call.get("rule") or "")),
        background=call.get("background") is True,
        waited=duration(call.get("waited")),
        took=duration(call.get("took")),
        first=duration(call.get("first")),
        new=count(call.get("input")),
        cached=count(call.get("cached")),
        share=_share(call.get("input"), call.get("cached")),
        output=count(call.get("output")),
        speed=_speed(call),
        outcome=outcome,
        is_well=outcome in figures.WELL,
        place=count(call.get("place")),
        eta=duration(call.get("eta")),
        fraction=None,
        doing="",
        detail="",
    )


def _running(call: Mapping[str, Json]) -> Call:
    """A call that runs: how far its prefill is, or how much it has said."""
    shown, prefill = _call(call), mapping(call.get("progress"))
    again = f"sent again {count(call.get('resent'))} times" if call.get("resent") else ""
    if number(call.get("output")):
        said = [f"{shown.output} tokens out", shown.speed]
        doing = ", ".join(part for part in said if part)
        return attrs.evolve(shown, doing=doing, detail=again)
    return attrs.evolve(
        shown,
        fraction=figures.fraction(prefill),
        doing=figures.pace_of(prefill) or "begins",
        detail="; ".join(part for part in (figures.of_total(prefill), again) if part),
    )


def _waiting(call: Mapping[str, Json]) -> Call:
    """A call that waits, and why it stands where it does."""
    why = line(str(call.get("why") or "")) or "its server has to come up first"
    return attrs.evolve(_call(call), doing=why)


def _speed(call: Mapping[str, Json]) -> str:
    """Tokens a second of its answer, once there are some."""
    output, took, first = (number(call.get(name)) for name in ("output", "took", "first"))
    if output is None or took is None or first is None or output < 2 or took <= first:
        return ""
    return speed((output - 1) / (took - first))  # the first came with the prefill


def _clock(at: Json) -> str:
    known = number(at)
    return "" if known is None else time.strftime("%H:%M:%S", time.localtime(known))


# --- cold prompts ---------------------------------------------------------------------------------


def _cost(call: Mapping[str, Json]) -> float:
    """Tokens that it need not have evaluated."""
    cold = mapping(call.get("cold"))
    return (number(cold.get("avoidable")) or 0) + (number(cold.get("rewritten")) or 0)


def _cold(call: Mapping[str, Json], tiers: Mapping[str, Json]) -> Cold:
    tokens, shown = _cost(call), _call(call)
    why = line(str(mapping(call.get("cold")).get("sentence") or ""))
    rate = number(mapping(mapping(tiers.get(shown.tier)).get("pace")).get("prefill"))
    cost = f"{count(tokens)} tokens" + (f", {duration(tokens / rate)}" if rate else "")
    return Cold(shown.id, shown.at, shown.kind, shown.tier, why[:1].upper() + why[1:], cost)


# --- charts ---------------------------------------------------------------------------------------


def _charts(buckets: Sequence[Mapping[str, Json]]) -> Charts | None:
    """The charts; None where no call came in all that time."""
    if not any(bucket["calls"] for bucket in buckets):
        return None
    new, cached = ([bucket[name] for bucket in buckets] for name in ("input", "cached"))
    sums = [one + other for one, other in zip(new, cached, strict=True)]
    shares = [one / whole if whole else None for one, whole in zip(cached, sums, strict=True)]
    firsts = [bucket["first"] for bucket in buckets]
    most, longest = max(sums) or 1, max(first or 0 for first in firsts) or 1
    share = percent(sum(cached) / (sum(sums) or 1))
    tokens = Chart(
        "Tokens of prompts",
        f"{count(sum(new))} were evaluated and {count(sum(cached))} were cached; "
        f"at most {count(most)} in five minutes.",
        count(most),
        (
            Series("evaluated", tuple((0.0, one / most) for one in new)),
            Series(
                "cached",
                tuple((one / most, one_sum / most) for one, one_sum in zip(new, sums, strict=True)),
            ),
        ),
    )
    of_cache = Chart(
        "Cached share",
        f"{share} of all prompt tokens were cached.",
        "100 %",
        (Series("cached", tuple(None if one is None else (0.0, one) for one in shares)),),
    )
    first = Chart(
        "Time to the first token",
        f"At most {duration(longest)}, as a mean of five minutes.",
        duration(longest),
        (Series("mean", tuple(None if one is None else (0.0, one / longest) for one in firsts)),),
    )
    hours = [_hour(buckets[at : at + _HOUR]) for at in range(0, len(buckets), _HOUR)]
    begin = _clock(buckets[0]["at"])[:5]
    return Charts(begin, (tokens, of_cache, first), tuple(hours))


def _hour(buckets: Sequence[Mapping[str, Json]]) -> tuple[str, ...]:
    """Begin, calls, tokens evaluated, cached, share of these, tokens out, time to first token."""
    calls, new, cached, output = (
        sum(bucket[name] for bucket in buckets) for name in ("calls", "input", "cached", "output")
    )
    with_first = sum(bucket["with_first"] for bucket in buckets)
    waited = sum((bucket["first"] or 0) * bucket["with_first"] for bucket in buckets)
    mean = waited / with_first if with_first else None
    begin = _clock(buckets[0]["at"])[:5]
    share = _share(new, cached)
    return begin, count(calls), count(new), count(cached), share, count(output), duration(mean)
