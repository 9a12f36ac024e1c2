"""
Checks of a parsed body: each takes a value and its path, and raises at the first mistake.

They are put together to what a body must be (`gateway.wire.request`, `gateway.wire.openai`).  What
they do not name passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from gateway.wire.errors import invalid

Json = Any

_TYPES: Final = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}

#: Raises ApiError, 400 with the path, where the value is not as it should be.
Check = Callable[[Json, str], None]


def wrong(path: str, expected: str) -> Exception:
    """The mistake at `path`, where `expected` should stand."""
    return invalid(f"{path}: Input should be {expected}")


def is_a(kind: type) -> Check:
    """A value of one of the types of JSON."""

    def check(value: Json, path: str) -> None:
        if not isinstance(value, kind):
            raise wrong(path, _TYPES[kind])

    return check


_string = is_a(str)
_list = is_a(list)
_object = is_a(dict)


def one_of(*allowed: str) -> Check:
    """One of these words."""

    def check(value: Json, path: str) -> None:
        if value not in allowed:
            raise wrong(path, " or ".join(repr(each) for each in allowed))

    return check


def integer(least: int) -> Check:
    """A whole number from `least` on."""

    def check(value: Json, path: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise wrong(path, f"an integer of at least {least}")

    return check


def number(least: float, most: float) -> Check:
    """A number between two bounds, both included."""

    def check(value: Json, path: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(path, "a number")
        if not least <= value <= most:
            raise wrong(path, f"between {least} and {most}")

    return check


def filled(value: Json, path: str) -> None:
    """A string that is not empty."""
    _string(value, path)
    if not value:
        raise wrong(path, "a string of at least one character")


def each(check: Check) -> Check:
    """A list of such values."""

    def check_all(value: Json, path: str) -> None:
        _list(value, path)
        for number, item in enumerate(value):
            check(item, f"{path}.{number}")

    return check_all


def fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with these fields; an optional one may be null as well as missing."""
    optional = optional or {}

    def check(value: Json, path: str) -> None:
        _object(value, path)
        prefix = f"{path}." if path else ""
        for name, check_field in required.items():
            if name not in value:
                raise invalid(f"{prefix}{name}: Field required")
            check_field(value[name], prefix + name)
        for name, check_field in optional.items():
            if value.get(name) is not None:
                check_field(value[name], prefix + name)

    return check


_typed = fields({"type": filled})


def by_type(known: Mapping[str, Check]) -> Check:
    """An object with a ``type``; what else it must have depends on that, if we know it."""

    def check(value: Json, path: str) -> None:
        _typed(value, path)
        known.get(value["type"], anything)(value, path)

    return check


def anything(value: Json, path: str) -> None:
    """Somebody's future."""


def text_or(blocks: Check) -> Check:
    """A string, or what `blocks` takes."""

    def check(value: Json, path: str) -> None:
        if isinstance(value, str):
            return
        if not isinstance(value, list):
            raise wrong(path, "a string or a list of content blocks")
        blocks(value, path)

    return check
