"""
A grammar that lets exactly the answers of one shape through, none longer than it may be.

It is written in GBNF (llama.cpp `grammars/README.md`), which every llama-server takes with
``/completion`` and holds in the same way, whatever it makes of a JSON schema.  Each grammar is
written for a number of characters: texts and lists get bounds of their own, sized so that the
longest answer still closes, since a tiny model would fill a title with 32 000 tokens.

1. There is one way to write each value: ``{"a": 1, "b": [2, 3]}``.
2. Any object has no bounds: nobody can say how long which of its members may be.
3. What must be there gets the room that it needs; what is left is shared.
4. A repetition is written with numbers below a thousand: llama.cpp refuses more than 2 000.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Final

import attrs

from gateway.policy.pattern import Chars, Choice, Piece, Ranges, Row, Times, without
from gateway.policy.shapes import (
    AnyObject,
    Either,
    List,
    Matching,
    Number,
    Object,
    Shape,
    Text,
    Values,
    portions,
)

#: Characters of a block, of which a long text is made, and the most blocks of one.
_BLOCK: Final = 64
_MOST_BLOCKS: Final = 1_000

#: The most items of a list, unless it must have more.
_MOST_ITEMS: Final = 500

#: Decimal places of a number that is held between two bounds: as many as give it a hundred values,
#: but two at least, and no more than six.
_PLACES: Final = range(2, 7)

#: Code points that JSON text cannot hold as they are, and how they are written there.
_ESCAPED: Final = {
    0x08: r"\b", 0x09: r"\t", 0x0A: r"\n", 0x0C: r"\f", 0x0D: r"\r", 0x22: r"\"", 0x5C: r"\\"
}  # fmt: skip
_NOT_PLAIN: Final[Ranges] = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F))


def write(shape: Shape, room: int) -> str:
    """
    The grammar of `shape`.

    Args:
        shape: what the answer looks like.
        room: characters that the whole answer may have; one that needs more gets that.
    """
    writing = _Writing()
    root = writing.value(shape, room)
    return "\n".join(
        [f"root ::= {root}", *(f"{n} ::= {rule}" for rule, n in writing.names.items())]
    )


@attrs.define
class _Writing:
    """
    A grammar, so far.

    Attributes:
        names: the name of each rule, by what it says.
    """

    names: dict[str, str] = attrs.field(factory=dict)

    def rule(self, says: str) -> str:
        return self.names.setdefault(says, f"r{len(self.names)}")

    # --- values -----------------------------------------------------------------------------------

    def value(self, shape: Shape, room: int) -> str:
        """What a value of `shape` is written as, within `room` characters if it can be."""
        match shape:
            case Values():
                fitting = [text for text in shape.texts if len(text) <= room]
                return self.rule(_any_of(map(_literal, fitting or [min(shape.texts, key=len)])))
            case Text():
                most = int(min(shape.most, max(shape.least, 1, room - 2)))
                return self.rule(_quoted(self.characters(shape.least, most)))
            case Matching():
                most = int(min(shape.most, max(1, room - 2)))
                return self.rule(_quoted(self.piece(shape.piece, most)))
            case Number():
                return self.rule(_number(shape))
            case List():
                return self.rule(self.items(shape, room - 2))
            case Object():
                return self.rule(self.members(shape, room - 2))
            case AnyObject():
                self.names |= _ANY
                return self.rule(_ANY_OBJECT)
            case Either():
                within = [each for each in shape.shapes if each.shortest <= room]
                alternatives = within or [min(shape.shapes, key=lambda each: each.shortest)]
                return self.rule(_any_of(self.value(each, room) for each in alternatives))

    def characters(self, least: int, most: int) -> str:
        """A text of so many characters."""
        one = self.rule(_characters(((0x20, 0x10FFFF),)))
        if most <= _BLOCK * 4:
            return _times(one, least, most)
        # Blocks and a shorter end: in each place at most two ways to go on.
        blocks, rest = divmod(least, _BLOCK)
        most_blocks = min((most - rest) // _BLOCK, _MOST_BLOCKS)
        tail = min(_BLOCK - 1, most - rest - most_blocks * _BLOCK)
        block = self.rule(_times(one, _BLOCK, _BLOCK))
        parts = [
            _times(one, rest, rest),
            _times(block, blocks, most_blocks),
            _times(one, 0, tail),
        ]
        return " ".join(filter(None, parts))

    def items(self, shape: List, room: int) -> str:
        if not shape.most or (not shape.least and shape.items.shortest > room):
            return '"[]"'
        count, each = portions(room, shape.items.shortest + 2, shape.items.longest + 2)
        most = int(min(shape.most, max(1, shape.least, min(count, _MOST_ITEMS))))
        if shape.least:
            each = max(shape.items.shortest + 2, min(each, room // shape.least))
        item = self.value(shape.items, each - 2)
        further = _times(f'(", " {item})', max(0, shape.least - 1), most - 1)
        listed = f"{item} {further}".strip()
        return f'"[" {listed} "]"' if shape.least else f'"[" ({listed})? "]"'

    def members(self, shape: Object, room: int) -> str:
        """The members in their order; the optional ones may be missing, or have no room."""
        left = room - (shape.shortest - 2)
        members = []
        for member in shape.members:
            if not member.required:
                left -= member.overhead + member.shape.shortest
            if member.required or left >= 0:
                members.append(member)
        rooms = _shared(
            room - sum(member.overhead for member in members),
            [member.shape.shortest for member in members],
            [member.shape.longest for member in members],
        )
        # From the end: what may come after other members, and what may come first.
        after, first = "", ""
        for member, each in zip(reversed(members), reversed(rooms), strict=True):
            said = f"{_literal(member.name + ': ')} {self.value(member.shape, each)}"
            begins = f"{said} {after}".strip()
            if member.required:
                first = self.rule(begins)
                after = self.rule(f'", " {begins}')
            else:
                first = self.rule(f"{begins} | {first}" if first else begins)
                after = self.rule(f'(", " {said})? {after}'.strip())
        if not first:
            return '"{}"'
        some = any(member.required for member in members)
        return f'"{{" {first} "}}"' if some else f'"{{" ({first})? "}}"'

    # --- patterns ---------------------------------------------------------------------------------

    def piece(self, piece: Piece, room: int) -> str:
        """A piece of a pattern, within `room` characters if it can be."""
        match piece:
            case Chars():
                return self.rule(_characters(piece.ranges))
            case Row():
                rooms = _shared(
                    room,
                    [each.shortest for each in piece.pieces],
                    [each.longest for each in piece.pieces],
                )
                return self.rule(" ".join(map(self.piece, piece.pieces, rooms)) or '""')
            case Choice():
                fitting = [each for each in piece.pieces if each.shortest <= room]
                alternatives = fitting or [min(piece.pieces, key=lambda each: each.shortest)]
                return self.rule(_any_of(self.piece(each, room) for each in alternatives))
            case Times():
                return self.times(piece, room)

    def times(self, piece: Times, room: int) -> str:
        if not piece.longest:
            return '""'
        count, each = portions(room, max(1, piece.piece.shortest), piece.piece.longest)
        count = min(count, _MOST_BLOCKS) if piece.piece.shortest <= room else 0
        most = int(min(piece.most, max(piece.least, count)))
        if piece.least:
            each = max(piece.piece.shortest, min(each, room // piece.least))
        return self.rule(_times(self.piece(piece.piece, each), piece.least, most) or '""')


def _shared(room: int, shortest: list[int], longest: list[float]) -> list[int]:
    """`room` among several: each what it needs, then the same for each that can use more."""
    rooms = list(shortest)
    spare = room - sum(rooms)
    growing = [index for index, most in enumerate(longest) if most > rooms[index]]
    # Who needs little more goes first, and leaves the rest to the others.
    growing.sort(key=lambda index: longest[index] - rooms[index])
    for position, index in enumerate(growing):
        more = int(min(longest[index] - rooms[index], max(0, spare) // (len(growing) - position)))
        rooms[index] += more
        spare -= more
    return rooms


def _quoted(inside: str) -> str:
    return f'"\\"" {inside} "\\""'


def _times(what: str, least: int, most: int) -> str:
    if not most:
        return ""
    return what if least == most == 1 else f"{what}{{{least},{most}}}"


def _any_of(alternatives: Iterable[str]) -> str:
    return " | ".join(dict.fromkeys(alternatives))


# --- text in a grammar --------------------------------------------------------------------------


def _literal(text: str) -> str:
    """`text` as GBNF says it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _characters(ranges: Ranges) -> str:
    """One character of `ranges`, as JSON writes it."""
    plain = without(ranges, _NOT_PLAIN)
    found = [f"[{''.join(map(_range, plain))}]"] if plain else []
    found += [
        _literal(written)
        for point, written in _ESCAPED.items()
        if any(low <= point <= high for low, high in ranges)
    ]
    return " | ".join(found or [_literal(f"\\u{ranges[0][0]:04x}")])


def _range(ends: tuple[int, int]) -> str:
    low, high = ends
    return _point(low) if low == high else f"{_point(low)}-{_point(high)}"


def _point(point: int) -> str:
    """A code point in a class: as itself where no sign of GBNF can be meant."""
    if chr(point).isascii() and chr(point).isalnum():
        return chr(point)
    return f"\\U{point:08X}" if point > 0xFFFF else f"\\u{point:04X}"


# --- anything -----------------------------------------------------------------------------------

_ANY_OBJECT: Final = '"{" members? "}"'

#: The rules of any JSON, by what they say.
_ANY: Final = {
    _ANY_OBJECT: "object",
    'string ": " anything (", " members)?': "members",
    'object | list | string | number | "true" | "false" | "null"': "anything",
    '"[" items? "]"': "list",
    'anything (", " items)?': "items",
    _quoted("text?"): "string",
    "character text?": "text",
    _characters(((0x09, 0x0A), (0x20, 0x10FFFF))): "character",
    '"-"? ("0" | [1-9] [0-9]{0,14}) ("." [0-9]{1,6})?': "number",
}


# --- numbers ----------------------------------------------------------------------------------


def _number(shape: Number) -> str:
    low, high = shape.low, shape.high
    wholes = _wholes(math.ceil(low), math.floor(high)) if math.ceil(low) <= math.floor(high) else []
    if shape.whole:
        return " | ".join(wholes)
    return " | ".join([*wholes, *_fractions(low, high)])


def _wholes(low: int, high: int) -> list[str]:
    """The whole numbers from `low` to `high`."""
    found = [f'"-" ({each})' for each in _naturals(max(1, -high), -low)] if low < 0 else []
    return found + (_naturals(max(0, low), high) if high >= 0 else [])


def _naturals(low: int, high: int) -> list[str]:
    found = []
    for width in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (width - 1) if width > 1 else 0)
        last = min(high, 10**width - 1)
        if first <= last:
            found.append(_digits(str(first), str(last)))
    return found


def _digits(low: str, high: str) -> str:
    """The numbers of as many digits from `low` to `high`."""
    if not low:
        return ""
    if low == "0" * len(low) and high == "9" * len(high):
        return f"[0-9]{{{len(low)}}}" if len(low) > 1 else "[0-9]"
    if low[0] == high[0]:
        return f"[{low[0]}] {_digits(low[1:], high[1:])}".strip()
    rest = len(low) - 1
    if not rest:
        return f"[{low}-{high}]"
    found = []
    first, last = int(low[0]), int(high[0])
    if low[1:] != "0" * rest:
        found.append(f"[{first}] {_digits(low[1:], '9' * rest)}")
        first += 1
    if high[1:] != "9" * rest:
        found.append(f"[{last}] {_digits('0' * rest, high[1:])}")
        last -= 1
    if first <= last:
        found.append(f"[{first}-{last}] {_digits('0' * rest, '9' * rest)}")
    return "(" + " | ".join(found) + ")"


def _fractions(low: Decimal, high: Decimal) -> list[str]:
    """Numbers with a fraction from `low` to `high`."""
    places = next((n for n in _PLACES if (high - low).scaleb(n) >= 100), _PLACES[-1])
    first = int(low.scaleb(places).to_integral_value(ROUND_CEILING))
    last = int(high.scaleb(places).to_integral_value(ROUND_FLOOR))
    found = []
    if first < 0:
        found += [f'"-" ({each})' for each in _pointed(max(1, -last), -first, places)]
    if last >= 0:
        found += _pointed(max(0, first), last, places)
    return found


def _pointed(low: int, high: int, places: int) -> list[str]:
    """The numbers from `low` to `high`, with a point before the last `places` digits."""
    if low > high:
        return []
    (first, begin), (last, end) = divmod(low, 10**places), divmod(high, 10**places)
    none, all_of_them = "0" * places, "9" * places

    def point(whole: str, begin: str, end: str) -> str:
        fraction = "[0-9]{1,6}" if begin == none and end == all_of_them else _digits(begin, end)
        return f'({whole}) "." ({fraction})'

    if first == last:
        return [point(f'"{first}"', f"{begin:0{places}}", f"{end:0{places}}")]
    found = [
        point(f'"{first}"', f"{begin:0{places}}", all_of_them),
        point(f'"{last}"', none, f"{end:0{places}}"),
    ]
    if first + 1 < last:
        found.append(point(" | ".join(_naturals(first + 1, last - 1)), none, all_of_them))
    return found
