"""
Simple regular expressions, as pieces that a grammar can be written from.

What is understood is what structured outputs promise: characters, classes, groups, alternatives and
quantifiers, with ``^`` and ``$`` at the ends of an alternative; an end that is not held may have
anything before or after it.  What looks around itself, refers back or knows of word boundaries is
refused by name.  The syntax is that of ECMA-262, which JSON Schema refers to; nothing here ever
matches a text, so no pattern can take long.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from typing import Final

import attrs

#: The characters that JSON text can hold: first and last of each range.
_LAST: Final = 0x10FFFF
_ALL: Final = ((0, 0xD7FF), (0xE000, _LAST))

#: Largest number in a quantifier, and deepest nesting of groups.
_MOST: Final = 10_000
_DEEPEST: Final = 50

Ranges = tuple[tuple[int, int], ...]


class NotUnderstood(ValueError):
    """The pattern is none of these; the message says what in it."""


@attrs.frozen
class Chars:
    """
    One character.

    Attributes:
        ranges: first and last code point of each range, in order, apart from each other.
    """

    ranges: Ranges
    shortest: int = 1
    longest: float = 1


@attrs.frozen(slots=False)
class Row:
    """One piece after the other."""

    pieces: tuple[Piece, ...]

    @cached_property
    def shortest(self) -> int:
        return sum(piece.shortest for piece in self.pieces)

    @cached_property
    def longest(self) -> float:
        return sum(piece.longest for piece in self.pieces)


@attrs.frozen(slots=False)
class Choice:
    """One of these pieces."""

    pieces: tuple[Piece, ...]

    @cached_property
    def shortest(self) -> int:
        return min(piece.shortest for piece in self.pieces)

    @cached_property
    def longest(self) -> float:
        return max(piece.longest for piece in self.pieces)


@attrs.frozen(slots=False)
class Times:
    """A piece, so many times."""

    piece: Piece
    least: int
    most: float

    @cached_property
    def shortest(self) -> int:
        return self.least * self.piece.shortest

    @cached_property
    def longest(self) -> float:
        return self.most * self.piece.longest if self.most and self.piece.longest else 0


Piece = Chars | Row | Choice | Times


# --- sets of characters -----------------------------------------------------------------------


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(high, found[-1][1])
        else:
            found.append((low, high))
    return tuple(found)


def without(ranges: Ranges, others: Ranges) -> Ranges:
    """Those characters of `ranges` that are not in `others`; both in order, in one pass."""
    found: list[tuple[int, int]] = []
    at = 0
    for first, last in ranges:
        while at < len(others) and others[at][1] < first:
            at += 1
        rest, here = first, at
        while here < len(others) and others[here][0] <= last:
            low, high = others[here]
            if rest < low:
                found.append((rest, low - 1))
            rest, here = high + 1, here + 1
        if rest <= last:
            found.append((rest, last))
        at = max(at, here - 1)
    return tuple(found)


def _of(text: str) -> Ranges:
    return _merged((ord(each), ord(each)) for each in text)


_DIGIT: Final = ((0x30, 0x39),)
_WORD: Final = _merged([*_DIGIT, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
_SPACE: Final = _of(" \t\n\r\f\v")
#: What some engine or other holds to be white space, beside control characters.
_SPACES: Final = _of("\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff")
#: As narrow as every engine reads them: some know of other digits, letters and spaces.
_CLASSES: Final = {
    "d": _DIGIT,
    "w": _WORD,
    "s": _SPACE,
    "D": without(((0, 0x65F),), _DIGIT),
    "W": without(((0, 0x7F),), _WORD),
    "S": without(_ALL, _merged([(0, 0x20), (0x2000, 0x200A), *_SPACES])),
}
_CONTROLS: Final = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_HEX: Final = {"x": 2, "u": 4}

#: Not a line break, as ECMA-262 has it.
_DOT: Final = Chars(without(_ALL, _of("\n\r\u2028\u2029")))
_ANYTHING: Final = Times(Chars(_ALL), 0, math.inf)


# --- reading ----------------------------------------------------------------------------------


def read(pattern: str) -> Piece:
    """
    The texts that `pattern` can be found in.

    Raises:
        NotUnderstood: it is no regular expression, or no simple one.
    """
    reading = _Reading(pattern)
    pieces = reading.alternatives(0, held=False)
    if reading.at < len(pattern):
        raise NotUnderstood("a group ends that was never begun")
    return pieces


@attrs.define
class _Reading:
    """A pattern, read up to `at`."""

    text: str
    at: int = 0

    @property
    def next(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self, expected: str) -> bool:
        """Whether this stands here; it is taken then."""
        if self.text.startswith(expected, self.at):
            self.at += len(expected)
            return True
        return False

    def alternatives(self, depth: int, *, held: bool) -> Piece:
        """What stands between ``|`` up to the end of the group; not `held` are the outer ends."""
        if depth > _DEEPEST:
            raise NotUnderstood("groups nested too deep")
        found = [self.row(depth, held=held)]
        while self.take("|"):
            found.append(self.row(depth, held=held))
        return found[0] if len(found) == 1 else Choice(tuple(found))

    def row(self, depth: int, *, held: bool) -> Piece:
        pieces: list[Piece] = []
        if not held and not self.take("^"):
            pieces.append(_ANYTHING)
        ends = held
        while self.next and self.next not in "|)":
            if not held and self.take("$"):
                ends = True
                break
            pieces.append(self.times(self.atom(depth)))
        if self.next and self.next not in "|)":
            raise NotUnderstood("something after a $")
        if not ends:
            pieces.append(_ANYTHING)
        return pieces[0] if len(pieces) == 1 else Row(tuple(pieces))

    def atom(self, depth: int) -> Piece:
        if self.take("("):
            return self.group(depth)
        if self.take("["):
            return Chars(self.one_of())
        if self.take("."):
            return _DOT
        if self.next in "^$":
            raise NotUnderstood(f"a {self.next} in the middle")
        if self.next in "*+?":
            raise NotUnderstood(f"a {self.next} after nothing")
        return Chars(self.character(in_class=False))

    def group(self, depth: int) -> Piece:
        if self.take("?") and not self.take(":"):
            if not self.take("<") or self.next in "=!":
                raise NotUnderstood("a group that looks around itself")
            name, bracket, _ = self.text[self.at :].partition(">")
            if not bracket or not name.isidentifier():
                raise NotUnderstood("a group with no proper name")
            self.at += len(name) + 1
        inside = self.alternatives(depth + 1, held=True)
        if not self.take(")"):
            raise NotUnderstood("a group without end")
        return inside

    def times(self, piece: Piece) -> Piece:
        """`piece`, as often as the quantifier behind it says."""
        start = self.at
        if self.take("*"):
            least, most = 0, math.inf
        elif self.take("+"):
            least, most = 1, math.inf
        elif self.take("?"):
            least, most = 0, 1.0
        elif self.take("{"):
            inside, brace, _ = self.text[self.at :].partition("}")
            first, comma, last = inside.partition(",")
            if not brace or not first.isdecimal() or (last and not last.isdecimal()):
                raise NotUnderstood(f"the quantifier {self.text[start : start + 20]!r}")
            self.at += len(inside) + 1
            if max(len(first), len(last)) > len(str(_MOST)):
                raise NotUnderstood(f"a quantifier above {_MOST}")
            least = int(first)
            most = float(last) if last else (math.inf if comma else least)
            if least > most or least > _MOST:
                raise NotUnderstood(f"the quantifier {self.text[start : self.at]!r}")
        else:
            return piece
        self.take("?")  # as few as may be: the same texts
        if self.next and self.next in "*+?{":
            raise NotUnderstood("a quantifier after a quantifier")
        return Times(piece, least, most)

    def one_of(self) -> Ranges:
        """A class, up to its end."""
        negated = self.take("^")
        found: list[tuple[int, int]] = []
        while not self.take("]"):
            if not self.next:
                raise NotUnderstood("a class without end")
            first = self.character(in_class=True)
            if self.next == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                last = self.character(in_class=True)
                if _is_class(first) or _is_class(last) or first[0][0] > last[0][0]:
                    raise NotUnderstood("a range of characters that is none")
                first = ((first[0][0], last[0][0]),)
            found += first
        ranges = without(_ALL, _merged(found)) if negated else _merged(found)
        if not ranges:
            raise NotUnderstood("a class that is empty")
        return ranges

    def character(self, *, in_class: bool) -> Ranges:
        """One character, or the class that an escape stands for."""
        one = self.next
        self.at += 1
        if one != "\\":
            return _of(one)
        escaped = self.next
        self.at += 1
        if escaped in _CLASSES:
            return _CLASSES[escaped]
        if escaped == "b" and in_class:
            return _of("\b")
        if escaped in _CONTROLS:
            return _of(_CONTROLS[escaped])
        if escaped in _HEX:
            digits = self.text[self.at : self.at + _HEX[escaped]]
            self.at += _HEX[escaped]
            try:
                point = int(digits, 16) if digits.isalnum() else -1
            except ValueError:
                point = -1
            if len(digits) < _HEX[escaped] or not any(a <= point <= b for a, b in _ALL):
                raise NotUnderstood("an escape that stands for no character")
            return ((point, point),)
        if not escaped or escaped.isalnum():
            raise NotUnderstood(f"the escape \\{escaped}")
        return _of(escaped)


def _is_class(ranges: Ranges) -> bool:
    return len(ranges) > 1 or ranges[0][0] != ranges[0][1]


# --- formats ----------------------------------------------------------------------------------

_DATE: Final = (
    r"[12][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    r"|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_TIME: Final = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_LABEL: Final = r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?"
_OCTET: Final = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"

#: The formats of structured outputs (docs/protocol.md, "Schemas"); each text is a valid one, though
#: not each valid one can be written so.
FORMATS: Final = {
    name: read(f"^({pattern})$")
    for name, pattern in {
        "date": _DATE,
        "time": _TIME,
        "date-time": f"{_DATE}T{_TIME}",
        "duration": r"P([1-9][0-9]{0,3}[YMWD]|[1-9][0-9]{0,3}DT[1-9][0-9]?H|T[1-9][0-9]{0,4}[HMS])",
        "email": rf"[A-Za-z0-9_+-]{{1,30}}(\.[A-Za-z0-9_+-]{{1,20}}){{0,2}}@"
        rf"{_LABEL}(\.{_LABEL}){{0,2}}\.[a-z]{{2,8}}",
        "hostname": rf"{_LABEL}(\.{_LABEL}){{0,4}}",
        "uri": rf"https?://{_LABEL}(\.{_LABEL}){{0,4}}(:[1-9][0-9]{{1,3}})?(/[A-Za-z0-9._~-]{{0,40}}){{0,8}}"
        r"(\?[A-Za-z0-9._~=&-]{0,60})?(#[A-Za-z0-9._~-]{0,30})?",
        "ipv4": rf"{_OCTET}(\.{_OCTET}){{3}}",
        "ipv6": r"([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
        "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[1-5][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    }.items()
}
