"""
Other cases made of one: bytes that are cut and spliced, JSON that is changed at a random place.

What is changed at random is hardly ever JSON any more, so JSON is changed as a tree: a value for
another one, a value for one from elsewhere, a member that is gone, twice there or has another name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

import orjson

Json = Any

#: Values that programs trip over.
_ODD: Final[Sequence[Json]] = (
    *(None, True, False, 0, 1, -1, 0.5, -0.0, 1e300, 2**31, 2**53, 2**63, 2**64 - 1, -(2**63)),
    *("", " ", "\x00", "\n\n", "\r\n", "é", "\u2028", "\N{GRINNING FACE}", "data: ", "x" * 300),
    *([], {}, [None], [[]], [""], {"": None}, {"type": None}, {"type": "text"}, {"text": 5}),
)

#: Bytes that formats are made of.
_SIGNS: Final = (
    *(b"\n", b"\r", b"\r\n", b"\n\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b" "),
    *(b'"', b"\\", b"\\u0000", b"\\ud800", b"[", b"]", b"{", b"}", b":", b",", b"=", b"#", b"'"),
    *(b"0", b"-1", b"9" * 30, b"1e999", b"nan", b"null", b"true"),
)

#: Steps of one change at most, and nodes of a tree among which one is chosen.
_STEPS: Final = 4
_NODES: Final = 2000

#: A value within a tree: what holds it, and under which name or number.
_Place = tuple[Any, Any]


def of_json(words: Sequence[Json] = ()) -> Callable[[bytes, Random], bytes]:
    """Changes JSON, and puts `words` into it now and then."""

    def change(data: bytes, random: Random) -> bytes:
        try:
            root = [orjson.loads(data)]
        except ValueError:
            return of_bytes()(data, random)
        for _ in range(random.randint(1, _STEPS)):
            _change_once(root, words, random)
        try:
            return orjson.dumps(root[0])
        except TypeError:  # it is nested too deep by now
            return data

    return change


def _places(root: Json) -> list[_Place]:
    """The places of all values, but for the rest of a very large tree."""
    found: list[_Place] = []
    left = [root]
    while left and len(found) < _NODES:
        here = left.pop()
        for name in here if isinstance(here, dict) else range(len(here)):
            found.append((here, name))
            if isinstance(here[name], dict | list):
                left.append(here[name])
    return found


def _copy(value: Json) -> Json:
    return orjson.loads(orjson.dumps(value))


def _change_once(root: list[Json], words: Sequence[Json], random: Random) -> None:
    places = _places(root)
    if not places:
        return
    here, name = random.choice(places)
    try:
        match random.randrange(8):
            case 0 | 1:
                here[name] = _copy(random.choice(_ODD))
            case 2 if words:
                here[name] = _copy(random.choice(words))
            case 2 | 3:
                there, other = random.choice(places)
                here[name] = _copy(there[other])
            case 4 if here is not root:
                del here[name]
            case 5 if isinstance(here, list) and here is not root:
                here.insert(random.randint(0, len(here)), _copy(here[name]))
            case 5:
                there, other = random.choice(places)
                if isinstance(here, dict) and isinstance(other, str):
                    here[other] = here.pop(name)
            case 6:
                here[name] = _wrapped(here[name], random)
            case _:
                here[name] = _nudged(here[name], random)
    except TypeError:  # a copy of what is nested too deep
        return


def _wrapped(value: Json, random: Random) -> Json:
    return random.choice(
        ([value], [value, value], {"type": "text", "text": value}, {"content": value}, [[[value]]])
    )


def _nudged(value: Json, random: Random) -> Json:
    """A value of the same type."""
    match value:
        case bool():
            return not value
        case int():
            return max(-(2**63), min(2**63, value + random.choice((-1, 1, -256, 2**31))))
        case float():
            return -value
        case str():
            at = random.randint(0, len(value))
            sign = random.choice(_SIGNS).decode("utf-8", "ignore")
            return value[:at] + sign + value[at + random.randint(0, 2) :]
        case list():
            return random.sample(value, len(value))
        case _:
            return value


def of_bytes(words: Sequence[bytes] = ()) -> Callable[[bytes, Random], bytes]:
    """Cuts, doubles and splices, and puts signs or `words` in between."""
    signs = (*_SIGNS, *words)

    def change(data: bytes, random: Random) -> bytes:
        for _ in range(random.randint(1, _STEPS)):
            at, to = sorted(random.randint(0, len(data)) for _ in range(2))
            match random.randrange(6):
                case 0 | 1:
                    data = data[:at] + random.choice(signs) + data[at:]
                case 2:
                    data = data[:at] + data[min(to, at + 8) :]
                case 3:
                    data = data[:to] + data[at:]
                case 4:
                    data = data[:at] + random.randbytes(min(4, to - at)) + data[min(to, at + 4) :]
                case _:
                    data = data[:to] if random.randrange(2) else data[at:]
        return data[:_LONGEST]

    return change


#: Bytes of a case at most.
_LONGEST: Final = 4096
