"""
What a running gateway does, drawn for a terminal.

`page` draws what ``GET /status`` says and nothing else, so that looking costs no model server
anything.  A gateway of another version may say more or less: what is missing is left blank, what
is not known is not shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

Json = Any

#: Past calls that are shown.
_LAST: Final = 10

#: Calls in line that are shown; the rest is counted.
_WAITING: Final = 20

#: Characters of a text; names come from outside.
_LONGEST: Final = 60

#: Characters of a remark.
_LONGEST_LINE: Final = 300

#: Columns of a bar.
_BAR: Final = 12


def watch(console: Console, ask: Callable[[], Json], pause: Callable[[], None]) -> None:
    """Draw what `ask` says, again after each `pause`, until it is interrupted or `ask` fails."""
    with Live(page(ask()), console=console, auto_refresh=False, screen=True) as live:
        while True:
            pause()
            live.update(page(ask()), refresh=True)


def page(status: Json) -> RenderableType:
    """The whole page."""
    said = _mapping(status)
    calls = [_mapping(call) for call in _list(said.get("calls"))]
    waiting = [call for call in calls if call.get("outcome") == "waiting"]
    running = [call for call in calls if call.get("outcome") != "waiting"]
    last = [_mapping(call) for call in islice(_list(said.get("last")), _LAST)]
    return Group(
        Text(f"claudegw {_word(said.get('version'))}", style="bold"),
        *_section("Tiers", _tiers(_mapping(said.get("tiers")))),
        *_section("Under way", _running(running) if running else _nothing("No call is under way.")),
        *(_section("In line", _waiting(waiting)) if waiting else ()),
        *_section("Last calls", _past(last) if last else _nothing("No call has ended yet.")),
    )


def listed(calls: Sequence[Json]) -> RenderableType:
    """Calls that are over, in this order, each with when it came."""
    known = [_mapping(call) for call in calls]
    return _past(known, dated=True) if known else _nothing("No call has ended yet.")


def _section(title: str, content: RenderableType) -> tuple[RenderableType, ...]:
    return Text(), Rule(Text(title, style="bold"), align="left", style="dim"), content


def _nothing(why: str) -> Text:
    return Text(why, style="dim")


# --- the tables -----------------------------------------------------------------------------------


def _tiers(tiers: Mapping[str, Json]) -> RenderableType:
    table = _table("tier", "state", "model", "=window", "=busy", "=in line", "=prefill", "=answer")
    remarks: list[RenderableType] = []
    for name, about in tiers.items():
        tier = _mapping(about)
        server, pace = _mapping(tier.get("server")), _mapping(tier.get("pace"))
        process = _mapping(tier.get("process"))
        remarks += _remarks(_word(name), tier, process)
        table.add_row(
            _text(name),
            _text(process.get("state", "up" if server else "not known yet")),
            _text(_word(server.get("alias")).rpartition("/")[2]),
            _text(_count(server.get("n_ctx"))),
            _text(_busy(tier)),
            _text(_count(tier.get("waiting"))),
            _text(_speed(pace.get("prefill"))),
            _text(_speed(pace.get("generation"))),
        )
    return Group(table, *remarks) if remarks else table


def _remarks(
    name: str, tier: Mapping[str, Json], process: Mapping[str, Json]
) -> list[RenderableType]:
    """What is out of order with a tier."""
    said = []
    if process.get("state") not in (None, "ready") and process.get("reason"):
        lasts = _duration(process.get("for"))
        said.append(f"{name} is {_word(process.get('state'))} for {lasts}: {process['reason']}")
    said += [f"{name} refuses {_word(call)} for an hour" for call in _list(tier.get("refused"))]
    return [Text(_line(words), "yellow") for words in said]


def _busy(tier: Mapping[str, Json]) -> str:
    """Slots that work, of all, and those that still work for a client that left."""
    busy = f"{_count(tier.get('running'))}/{_count(tier.get('slots'))}"
    settling = _number(tier.get("settling"))
    return f"{busy} (+{settling:.0f})" if settling else busy


def _running(calls: Sequence[Mapping[str, Json]]) -> Table:
    table = _table("kind", "tier", "=waited", "=runs", "", "")
    for call in calls:
        waited, took = _duration(call.get("waited")), _duration(call.get("took"))
        table.add_row(*_who(call), _text(waited), _text(took), *_doing(call))
    return table


def _doing(call: Mapping[str, Json]) -> tuple[RenderableType, RenderableType]:
    """What a running call does: a bar, and what there is to say of it."""
    output, prefill = _number(call.get("output")), call.get("progress")
    if output:
        return Text(), _text(f"{_count(output)} tokens out")
    if not isinstance(prefill, Mapping):
        return Text(), Text()
    fraction, left = _fraction(prefill), _duration(prefill.get("seconds_left"))
    parts = [
        "" if fraction is None else f"{100 * fraction:.0f} %",
        f"{left} left" if left else "",
        _speed(prefill.get("tokens_per_second")),
    ]
    told = Text(", ".join(part for part in parts if part))
    if total := _of_total(prefill):
        told.append(f"\n{total}", "dim")
    bar = Text() if fraction is None else ProgressBar(total=1.0, completed=fraction, width=_BAR)
    return bar, told


def _fraction(prefill: Mapping[str, Json]) -> float | None:
    fraction = _number(prefill.get("fraction"))
    done, total = _number(prefill.get("done")), _number(prefill.get("total"))
    if fraction is None and done is not None and total:
        fraction = done / total
    return None if fraction is None else min(1.0, max(0.0, fraction))


def _of_total(prefill: Mapping[str, Json]) -> str:
    done, total = _count(prefill.get("done")), _count(prefill.get("total"))
    if done and total:
        return f"{done} of {total} tokens"
    return f"{done or total} tokens" if done or total else ""


def _waiting(calls: Sequence[Mapping[str, Json]]) -> RenderableType:
    """Who waits, by place; a call without one waits for its server to load."""

    def place(call: Mapping[str, Json]) -> tuple[str, float]:
        known = _number(call.get("place"))
        return _word(call.get("tier")), 0 if known is None else known

    table = _table("kind", "tier", "=place", "=waited", "=its turn in")
    for call in sorted(calls, key=place)[:_WAITING]:
        rest = _count(call.get("place")), _duration(call.get("waited")), _duration(call.get("eta"))
        table.add_row(*_who(call), *map(_text, rest))
    more = len(calls) - _WAITING
    return Group(table, _nothing(f"and {_count(more)} more")) if more > 0 else table


def _past(calls: Sequence[Mapping[str, Json]], *, dated: bool = False) -> Table:
    columns = ("kind", "tier", "=waited", "=took", "=new", "=cached", "=out", "outcome")
    table = _table(*(("when", *columns) if dated else columns))
    for call in calls:
        times = _duration(call.get("waited")), _duration(call.get("took"))
        tokens = (_count(call.get(name)) for name in ("input", "cached", "output"))
        outcome = _text(call.get("outcome"))
        if outcome.plain not in ("answered", "cancelled"):
            outcome.stylize("red")
        when = (_text(_moment(call.get("at"))),) if dated else ()
        table.add_row(*when, *_who(call), *map(_text, (*times, *tokens)), outcome)
    return table


def _who(call: Mapping[str, Json]) -> tuple[Text, Text]:
    kind = _word(call.get("kind")) or "?"
    style = "dim" if call.get("background") is True else ""
    return Text(kind, style), Text(_word(call.get("tier")), style)


def _table(*columns: str) -> Table:
    """A table; a column whose name begins with ``=`` holds numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        is_number = column.startswith("=")
        name = Text(column.removeprefix("="))
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    return table


# --- values, whatever they are --------------------------------------------------------------------


def _mapping(value: Json) -> Mapping[str, Json]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Json) -> Sequence[Json]:
    return value if isinstance(value, list) else []


def _word(value: Json) -> str:
    """A text, on one line and without what would steer a terminal."""
    known = value if isinstance(value, str) else ""
    return _line(known[:_LONGEST])


def _line(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text[:_LONGEST_LINE])


def _number(value: Json) -> float | None:
    """A number that can be shown."""
    return value if isinstance(value, int | float) and abs(value) < 1e15 else None


def _text(value: Json) -> Text:
    return Text(_word(value))


def _count(value: Json) -> str:
    """A whole number, its thousands apart."""
    number = _number(value)
    return "" if number is None else f"{number:,.0f}".replace(",", " ")


def _moment(value: Json) -> str:
    """Seconds of the epoch, on this machine's clock."""
    number = _number(value)
    try:
        return "" if number is None else time.strftime("%d %b %H:%M:%S", time.localtime(number))
    except (OverflowError, OSError, ValueError):
        return ""


def _speed(value: Json) -> str:
    """Tokens a second."""
    number = _number(value)
    if number is None:
        return ""
    return f"{_count(number)}/s" if number >= 100 else f"{number:.1f}/s"


def _duration(value: Json) -> str:
    """Seconds, in the unit that suits them."""
    number = _number(value)
    if number is None:
        return ""
    if 0 <= number < 9.95:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(max(0, number)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{_count(hours)}:{minutes:02} h"
    return f"{minutes}:{seconds:02} min" if minutes else f"{seconds} s"
