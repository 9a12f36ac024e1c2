"""
What ``/status`` says, in words for people: the terminal and the page show it the same way.

A gateway of another version may say more, less or other things, so each of these takes any value:
what is missing or is not what it should be is left blank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

Json = Any

#: Characters of a text; names come from outside.
_LONGEST: Final = 60

#: Characters of a remark.
_LONGEST_LINE: Final = 300


#: What became of a call that a person ended.
ENDED_BY_HAND: Final = "ended by hand"

#: What became of a call that nobody has to look into.
WELL: Final = frozenset({"answered", "cancelled", ENDED_BY_HAND})


def mapping(value: Json) -> Mapping[str, Json]:
    """An object; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def listed(value: Json) -> Sequence[Json]:
    """A list; an empty one for anything else."""
    return value if isinstance(value, list) else []


def word(value: Json) -> str:
    """A short text, on one line and without what would steer a terminal."""
    return line(value[:_LONGEST] if isinstance(value, str) else "")


def line(text: str) -> str:
    """A text of some length, as `word`."""
    return "".join(each if each.isprintable() else "?" for each in text[:_LONGEST_LINE])


def number(value: Json) -> float | None:
    """A number that can be shown."""
    return value if isinstance(value, int | float) and abs(value) < 1e15 else None


def count(value: Json) -> str:
    """A whole number, its thousands apart."""
    known = number(value)
    return "" if known is None else f"{known:,.0f}".replace(",", " ")


def speed(value: Json) -> str:
    """Tokens a second."""
    known = number(value)
    if known is None:
        return ""
    return f"{count(known)}/s" if known >= 100 else f"{known:.1f}/s"


def percent(fraction: float | None) -> str:
    """A share, from 0 to 1."""
    return "" if fraction is None else f"{100 * fraction:.0f} %"


def size(value: Json) -> str:
    """Bytes, in the unit that suits them."""
    known = number(value)
    if known is None:
        return ""
    return f"{known / 1e6:.0f} MB" if known < 1e9 else f"{known / 1e9:.1f} GB"


def duration(value: Json) -> str:
    """Seconds, in the unit that suits them."""
    known = number(value)
    if known is None:
        return ""
    if 0 <= known < 9.95:
        return f"{known:.1f} s"
    minutes, seconds = divmod(round(max(0, known)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{count(hours)}:{minutes:02} h"
    return f"{minutes}:{seconds:02} min" if minutes else f"{seconds} s"


# --- calls ----------------------------------------------------------------------------------------


def fraction(prefill: Mapping[str, Json]) -> float | None:
    """How far a prefill is, from 0 to 1."""
    known = number(prefill.get("fraction"))
    done, total = number(prefill.get("done")), number(prefill.get("total"))
    if known is None and done is not None and total:
        known = done / total
    return None if known is None else min(1.0, max(0.0, known))


def pace_of(prefill: Mapping[str, Json]) -> str:
    """How far a prefill is, how long it will take still, and how fast it goes."""
    left = duration(prefill.get("seconds_left"))
    parts = [
        percent(fraction(prefill)),
        f"{left} left" if left else "",
        speed(prefill.get("tokens_per_second")),
    ]
    return ", ".join(part for part in parts if part)


def of_total(prefill: Mapping[str, Json]) -> str:
    """The tokens that a prefill has behind it, of all."""
    done, total = count(prefill.get("done")), count(prefill.get("total"))
    if done and total:
        return f"{done} of {total} tokens"
    return f"{done or total} tokens" if done or total else ""


def by_place(call: Mapping[str, Json]) -> tuple[str, float]:
    """Orders those who wait; a call without a place waits for its server to load."""
    known = number(call.get("place"))
    return word(call.get("tier")), 0 if known is None else known


def parted(calls: Json) -> tuple[list[Mapping[str, Json]], list[Mapping[str, Json]]]:
    """Those of the open calls that run, and those that wait, in their order."""
    known = [mapping(call) for call in listed(calls)]
    waiting = [call for call in known if call.get("outcome") == "waiting"]
    running = [call for call in known if call.get("outcome") != "waiting"]
    return running, sorted(waiting, key=by_place)


# --- tiers ----------------------------------------------------------------------------------------


def state(tier: Mapping[str, Json]) -> str:
    """How the server of a tier is."""
    process, error = (mapping(tier.get(part)) for part in ("process", "error"))
    if "state" in process:
        return word(process["state"])
    if error:
        return "away" if error.get("passes") else "refuses"
    return "up" if tier.get("server") else "not known yet"


def model(tier: Mapping[str, Json]) -> str:
    """The name of its model."""
    return word(mapping(tier.get("server")).get("alias")).rpartition("/")[2]


def busy(tier: Mapping[str, Json]) -> str:
    """Slots that work, of all, and those that still work for a client that left."""
    said = f"{count(tier.get('running'))}/{count(tier.get('slots'))}"
    settling = number(tier.get("settling"))
    return f"{said} (+{settling:.0f})" if settling else said


def _since(process: Mapping[str, Json]) -> str:
    """The state of a server of ours, and how long it has been in it, as the end of a sentence."""
    now, lasts = word(process.get("state")), duration(process.get("for"))
    if not lasts:
        return f"is {now}"
    if now == "failed":
        return f"failed {lasts} ago"
    return f"has been {'in ' * (now == 'backoff')}{now} for {lasts}"


def remarks(name: str, tier: Mapping[str, Json]) -> list[str]:
    """What is out of order with a tier."""
    process, error = (mapping(tier.get(part)) for part in ("process", "error"))
    said = []
    if process.get("state") not in (None, "ready") and process.get("reason"):
        said.append(f"{name} {_since(process)}: {process['reason']}")
    elif error.get("message"):
        said.append(f"{name}: {error['message']}")
    said += [f"{name} refuses {word(call)} for an hour" for call in listed(tier.get("refused"))]
    return [line(words) for words in said]
