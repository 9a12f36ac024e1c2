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

from gateway import figures
from gateway.figures import count, duration, mapping, speed, word

Json = Any

#: Past calls that are shown.
_LAST: Final = 10

#: Calls in line that are shown; the rest is counted.
_WAITING: Final = 20

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
    said = mapping(status)
    running, waiting = figures.parted(said.get("calls"))
    last = [mapping(call) for call in islice(figures.listed(said.get("last")), _LAST)]
    return Group(
        Text(f"claudegw {word(said.get('version'))}", style="bold"),
        *_section("Tiers", _tiers(mapping(said.get("tiers")))),
        *_section("Under way", _running(running) if running else _nothing("No call is under way.")),
        *(_section("In line", _waiting(waiting)) if waiting else ()),
        *_section("Last calls", _past(last) if last else _nothing("No call has ended yet.")),
    )


def listed(calls: Sequence[Json]) -> RenderableType:
    """Calls that are over, in this order, each with when it came."""
    known = [mapping(call) for call in calls]
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
        tier = mapping(about)
        server, pace = mapping(tier.get("server")), mapping(tier.get("pace"))
        remarks += [Text(said, "yellow") for said in figures.remarks(word(name), tier)]
        table.add_row(
            _text(name),
            Text(figures.state(tier)),
            Text(figures.model(tier)),
            _text(count(server.get("n_ctx"))),
            _text(figures.busy(tier)),
            _text(count(tier.get("waiting"))),
            _text(speed(pace.get("prefill"))),
            _text(speed(pace.get("generation"))),
        )
    return Group(table, *remarks) if remarks else table


def _running(calls: Sequence[Mapping[str, Json]]) -> Table:
    table = _table("kind", "tier", "=waited", "=runs", "", "")
    for call in calls:
        waited, took = duration(call.get("waited")), duration(call.get("took"))
        table.add_row(*_who(call), _text(waited), _text(took), *_doing(call))
    return table


def _doing(call: Mapping[str, Json]) -> tuple[RenderableType, RenderableType]:
    """What a running call does: a bar, and what there is to say of it."""
    output, prefill = figures.number(call.get("output")), call.get("progress")
    if output:
        return Text(), _text(f"{count(output)} tokens out")
    if not isinstance(prefill, Mapping):
        return Text(), Text()
    fraction = figures.fraction(prefill)
    told = Text(figures.pace_of(prefill))
    if total := figures.of_total(prefill):
        told.append(f"\n{total}", "dim")
    bar = Text() if fraction is None else ProgressBar(total=1.0, completed=fraction, width=_BAR)
    return bar, told


def _waiting(calls: Sequence[Mapping[str, Json]]) -> RenderableType:
    """Who waits, by place; a call without one waits for its server to load."""
    table = _table("kind", "tier", "=place", "=waited", "=its turn in")
    for call in calls[:_WAITING]:
        times = duration(call.get("waited")), duration(call.get("eta"))
        table.add_row(*_who(call), *map(_text, (count(call.get("place")), *times)))
    more = len(calls) - _WAITING
    return Group(table, _nothing(f"and {count(more)} more")) if more > 0 else table


def _past(calls: Sequence[Mapping[str, Json]], *, dated: bool = False) -> Table:
    columns = ("kind", "tier", "=waited", "=took", "=new", "=cached", "=out", "outcome")
    table = _table(*(("when", *columns) if dated else columns))
    for call in calls:
        times = duration(call.get("waited")), duration(call.get("took"))
        tokens = (count(call.get(name)) for name in ("input", "cached", "output"))
        outcome = _text(call.get("outcome"))
        if outcome.plain not in figures.WELL:
            outcome.stylize("red")
        when = (_text(_moment(call.get("at"))),) if dated else ()
        table.add_row(*when, *_who(call), *map(_text, (*times, *tokens)), outcome)
    return table


def _who(call: Mapping[str, Json]) -> tuple[Text, Text]:
    kind = word(call.get("kind")) or "?"
    style = "dim" if call.get("background") is True else ""
    return Text(kind, style), Text(word(call.get("tier")), style)


def _table(*columns: str) -> Table:
    """A table; a column whose name begins with ``=`` holds numbers, the last one gives way."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        is_number = column.startswith("=")
        name = Text(column.removeprefix("="))
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    table.columns[-1].no_wrap = False
    return table


def _text(value: Json) -> Text:
    return Text(word(value))


def _moment(value: Json) -> str:
    """Seconds of the epoch, on this machine's clock."""
    at = figures.number(value)
    try:
        return "" if at is None else time.strftime("%d %b %H:%M:%S", time.localtime(at))
    except (OverflowError, OSError, ValueError):
        return ""
