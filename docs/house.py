"""
Draws ``docs/house.svg``, the floors of the house: ``python -m docs.house``.

The floors are those that import-linter proves (``setup.cfg``); what a room is for is said in
`ABOUT`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PICTURE: Final = ROOT / "docs/house.svg"

#: What each room is for, in a few words: rooms share a floor.
ABOUT: Final = {
    "background": "what nobody awaits",
    "capture": "bodies, when asked for",
    "changes": "what a reload can change",
    "cli": "the command",
    "commands": "beside the running gateway",
    "config": "gw.toml as frozen values",
    "connection": "one request, one connection",
    "daemon": "launchd, systemd, log",
    "dispatch": "the way of one call",
    "figures": "numbers in words",
    "files": "private, whole or not there",
    "history": "the ledger on the disk",
    "ledger": "what it cost",
    "llama": "one llama-server",
    "policy": "decisions: values in, values out",
    "preparation": "a call made ready",
    "remote": "servers of other kinds",
    "service": "start, reload, drain, stop",
    "tier": "line, cache, answer",
    "upstream": "a model's server, asked",
    "web": "who may come in; HTTP",
    "wire": "the Messages API as values",
}

_HEAD: Final = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height}" role="img" \
aria-labelledby="title">
  <title id="title">The floors of the house; each room imports only from rooms below it</title>
  <style>
    text {{ font-family: sans-serif; font-size: 13px; fill: #1b1f24 }}
    .name {{ font-family: monospace; font-size: 16px; font-weight: bold }}
    .room {{ fill: #dce9f7; stroke: #4a6f9a }}
    .value {{ fill: #e3f0dc; stroke: #5a8a45 }}
    path {{ fill: none; stroke: #1b1f24; stroke-width: 1.5 }}
  </style>
  <rect width="900" height="{height}" fill="#ffffff"/>
"""

#: Pixels: of a floor with its ceiling, of a room's height, and where the house stands.
_FLOOR, _HIGH, _LEFT, _WIDE = 54, 46, 120, 660


def floors() -> list[list[str]]:
    """The rooms of each floor, the highest first."""
    lines = _contract("floors")["layers"].split("\n")
    return [re.findall(r"gateway\.(\w+)", line) for line in lines if line.strip()]


def _contract(name: str) -> dict[str, str]:
    setup = ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    return dict(setup[f"importlinter:contract:{name}"])


def draw() -> str:
    """The picture."""
    house = floors()
    values = re.findall(r"gateway\.(\w+)", _contract("values")["source_modules"])
    rooms = [line for number, floor in enumerate(house) for line in _floor(number, floor, values)]
    return "\n".join(
        [_HEAD.format(height=_FLOOR * len(house) + 32) + rooms[0], *rooms[1:], "</svg>\n"]
    )


def _floor(number: int, rooms: list[str], values: list[str]) -> Iterator[str]:
    top, wide = 20 + number * _FLOOR, (_WIDE - 8 * (len(rooms) - 1)) // len(rooms)
    for place, room in enumerate(rooms):
        left, kind = _LEFT + place * (wide + 8), "value" if room in values else "room"
        size = f'width="{wide}" height="{_HIGH}" rx="4"'
        yield f'  <rect class="{kind}" x="{left}" y="{top}" {size}/>'
        yield f'  <text class="name" x="{left + 12}" y="{top + 20}">{room}</text>'
        yield f'  <text x="{left + 12}" y="{top + 37}">{ABOUT[room]}</text>'
    if "web" in rooms:
        yield f'  <text x="8" y="{top + 20}">Claude Code</text>'
        yield f'  <path d="M8 {top + 30} h104 m-7 -4 l7 4 l-7 4"/>'
    if "llama" in rooms:
        yield f'  <text x="{_LEFT + _WIDE + 12}" y="{top + 20}">llama-servers</text>'
        yield f'  <path d="M{_LEFT + _WIDE + 8} {top + 30} h94 m-7 -4 l7 4 l-7 4"/>'


if __name__ == "__main__":
    PICTURE.write_text(draw())
