"""
What an answer under a schema may look like.

A schema says what is forbidden; a grammar needs to know what is there.  A `Shape` stands between
them: all that remains of a schema (`gateway.policy.schema`) and all that a grammar is written from
(`gateway.policy.grammar`).  Lengths are characters of the JSON text.
"""

from __future__ import annotations

import math
from decimal import Decimal
from functools import cached_property
from itertools import chain
from typing import ClassVar

import attrs

from gateway.policy.pattern import Piece

#: What is longer than any answer.
ENDLESS = math.inf


@attrs.frozen(slots=False)
class Values:
    """
    One of these.

    Attributes:
        texts: each as JSON.
    """

    texts: tuple[str, ...]

    @cached_property
    def shortest(self) -> int:
        return min(map(len, self.texts))

    @cached_property
    def longest(self) -> float:
        return max(map(len, self.texts))


@attrs.frozen
class Text:
    """A string of so many characters."""

    least: int = 0
    most: float = ENDLESS

    @property
    def shortest(self) -> int:
        return self.least + 2

    @property
    def longest(self) -> float:
        return self.most + 2


@attrs.frozen
class Matching:
    """A string that matches a pattern from end to end, and has at most so many characters."""

    piece: Piece
    most: float = ENDLESS

    @property
    def shortest(self) -> int:
        return self.piece.shortest + 2

    @property
    def longest(self) -> float:
        return min(self.piece.longest, self.most) + 2


@attrs.frozen
class Number:
    """A number from `low` to `high`, both included; a `whole` one has no fraction."""

    low: Decimal
    high: Decimal
    whole: bool

    @property
    def shortest(self) -> int:
        """As the longest: its digits are not bounded any further."""
        digits = max(len(str(int(self.low))), len(str(int(self.high))))
        return digits if self.whole else digits + 7

    @property
    def longest(self) -> float:
        return self.shortest


@attrs.frozen(slots=False)
class List:
    """So many items of one shape."""

    items: Shape
    least: int = 0
    most: float = ENDLESS

    @cached_property
    def shortest(self) -> int:
        return 2 + self.least * (self.items.shortest + 2)

    @cached_property
    def longest(self) -> float:
        return 2 + self.most * (self.items.longest + 2) if self.most else 2


@attrs.frozen(slots=False)
class Member:
    """
    One member of an object.

    Attributes:
        name: its name, as JSON.
    """

    name: str
    shape: Shape
    required: bool

    @property
    def overhead(self) -> int:
        """Characters of the name and the signs around it."""
        return len(self.name) + 4


@attrs.frozen(slots=False)
class Object:
    """An object of these members and no others, in this order."""

    members: tuple[Member, ...]

    @cached_property
    def shortest(self) -> int:
        return 2 + sum(
            member.overhead + member.shape.shortest for member in self.members if member.required
        )

    @cached_property
    def longest(self) -> float:
        return 2 + sum(member.overhead + member.shape.longest for member in self.members)


@attrs.frozen(slots=False)
class Either:
    """One of these shapes."""

    shapes: tuple[Shape, ...]

    @cached_property
    def shortest(self) -> int:
        return min(shape.shortest for shape in self.shapes)

    @cached_property
    def longest(self) -> float:
        return max(shape.longest for shape in self.shapes)


@attrs.frozen
class AnyObject:
    """An object of any members, as long as its writer likes."""

    shortest: ClassVar[int] = 2
    longest: ClassVar[float] = ENDLESS


Shape = Values | Text | Matching | Number | List | Object | AnyObject | Either


def either(shapes: list[Shape]) -> Shape:
    """One shape for several, not none."""
    flat = chain.from_iterable(
        shape.shapes if isinstance(shape, Either) else (shape,) for shape in shapes
    )
    different = tuple(dict.fromkeys(flat))
    return different[0] if len(different) == 1 else Either(different)


def portions(room: int, shortest: int, longest: float) -> tuple[int, int]:
    """
    How many things fit into `room` characters, and the room of each.

    There are few long ones or many short ones; this goes the middle way, so that a list of paths
    has room for a path: 8 of 128 characters in 1 000, 63 of 1 000 in 64 000.
    """
    middle = min(room, 4 * math.isqrt(max(0, room)))
    each = int(min(longest, max(shortest, middle)))
    return max(1, room // max(1, each)), each
