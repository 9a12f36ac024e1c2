"""The doctor's findings, drawn for a terminal or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Final

import attrs
from rich.console import Group, RenderableType
from rich.text import Text

from gateway.commands.doctor.checks import would_work
from gateway.commands.doctor.finding import Finding

#: How each status looks; its sign says it without colour too.
_LOOKS: Final = {
    "ok": ("  ok     ", "dim green"),
    "warning": ("  warning", "yellow"),
    "problem": ("  problem", "bold red"),
    "skipped": ("  skipped", "dim"),
}

#: Characters of a text that a server may have a part in.
_LONGEST: Final = 600


def as_json(found: Sequence[Finding]) -> str:
    """A list of ``{check, status, found, remedy}``."""
    return json.dumps([attrs.asdict(each) for each in found], indent=2)


def page(found: Sequence[Finding]) -> RenderableType:
    """All of them, a paragraph for the house and one for each tier, and what follows."""
    lines: list[RenderableType] = []
    for place, group in groupby(found, key=_place):
        lines += [Text(place, style="bold"), *(part for each in group for part in _drawn(each))]
        lines.append(Text())
    return Group(*lines, _sum(found))


def _place(each: Finding) -> str:
    tier, dot, _ = each.check.rpartition(".")
    return f"tier {_plain(tier)}" if dot else "this machine"


def _drawn(each: Finding) -> list[RenderableType]:
    sign, style = _LOOKS[each.status]
    name = _plain(each.check.rpartition(".")[2])
    line = Text.assemble((sign, style), f"  {name}: {_plain(each.found)}")
    if not each.remedy:
        return [line]
    return [line, Text(f"           -> {_plain(each.remedy)}")]


def _sum(found: Sequence[Finding]) -> Text:
    counts = {status: sum(each.status == status for each in found) for status in _LOOKS}
    rest = f" ({_many(counts['problem'], 'problem')}, {_many(counts['warning'], 'warning')})"
    if would_work(list(found)):
        return Text("Claude Code would work." + rest, style="green")
    return Text("Claude Code would not work yet." + rest, style="bold red")


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _plain(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(each if each.isprintable() else "?" for each in text[:_LONGEST])
