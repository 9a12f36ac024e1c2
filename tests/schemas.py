"""Random schemas of the supported kind, and the texts that a grammar lets through."""

from __future__ import annotations

import re
from random import Random
from typing import Any, Final

import attrs
from hypothesis import strategies as st

Json = Any

PATTERNS: Final = (
    "^[a-z]{2,8}$",
    "^v[0-9]+(\\.[0-9]+){0,2}$",
    "^(feat|fix|docs): .+$",
    "^#[0-9a-fA-F]{6}$",
    "TODO",
    '^"[^"]*"$',
    "^\\w+\\\\\\w+$",
    "(a|bc)*d?$",
)
FORMATS: Final = (
    *("date", "time", "date-time", "duration", "email"),
    *("hostname", "uri", "ipv4", "ipv6", "uuid"),
)
NAMES: Final = st.sampled_from(
    [
        "title",
        "ok",
        "reason",
        "files",
        "größe",
        'a "b"',
        "line\nbreak",
        "x",
        "path\\to",
        "$ref",
        "n",
    ]
)


def _bounded(draw: st.DrawFn, kind: str, values: st.SearchStrategy[Any]) -> Json:
    schema: dict[str, Json] = {"type": kind}
    low, high = sorted([draw(values), draw(values)])
    if draw(st.booleans()):
        schema["minimum"] = low
    if draw(st.booleans()):
        schema["maximum"] = high
    if draw(st.booleans()) and low + 2 < high:
        schema["exclusiveMaximum"] = high
    return schema


@st.composite
def numbers(draw: st.DrawFn) -> Json:
    if draw(st.booleans()):
        return _bounded(draw, "integer", st.integers(-(10**6), 10**6) | st.integers(-5, 5))
    floats = st.floats(-1e6, 1e6) | st.decimals(-5, 5, places=2).map(float)
    schema = _bounded(draw, "number", floats)
    schema.pop("exclusiveMaximum", None)
    if "minimum" in schema and "maximum" in schema:  # else there may be none with six places
        schema["maximum"] += 1
    return schema


@st.composite
def texts(draw: st.DrawFn) -> Json:
    match draw(st.integers(0, 3)):
        case 0:
            return {"type": "string", "pattern": draw(st.sampled_from(PATTERNS))}
        case 1:
            return {"type": "string", "format": draw(st.sampled_from(FORMATS))}
        case 2:
            least = draw(st.integers(0, 5))
            return {
                "type": "string",
                "minLength": least,
                "maxLength": least + draw(st.integers(0, 40)),
            }
        case _:
            return {"type": "string", "description": "Anything."}


VALUES: Final = st.one_of(
    st.sampled_from(
        [{"type": "boolean"}, {"type": "null"}, {"const": "fixed"}, {"enum": ["red", 3, None, 2.5]}]
    ),
    st.just({"type": ["string", "null"], "enum": ["a", "ß", None]}),
    numbers(),
    texts(),
)


def _objects(inner: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    @st.composite
    def objects(draw: st.DrawFn) -> Json:
        properties = draw(st.dictionaries(NAMES, inner, min_size=1, max_size=4))
        required = [name for name in properties if draw(st.integers(0, 3))]
        schema: Json = {"type": "object", "properties": properties, "required": required}
        if draw(st.booleans()):
            schema["additionalProperties"] = False
        return schema

    return objects()


def _lists(inner: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    bounds = st.sampled_from(
        [{}, {}, {"minItems": 1}, {"maxItems": 3}, {"minItems": 2, "maxItems": 2}]
    )
    return st.builds(lambda items, more: {"type": "array", "items": items, **more}, inner, bounds)


def _tagged(inner: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    """A union whose members a tag tells apart, as pydantic and zod write it."""

    def union(members: list[Json]) -> Json:
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": f"k{number}"}, "value": member},
                    "required": ["kind", "value"],
                    "additionalProperties": False,
                }
                for number, member in enumerate(members)
            ]
        }

    return st.lists(inner, min_size=2, max_size=3).map(union)


def _parted(inner: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    """An object that is said in two parts."""

    def both(first: Json, second: Json) -> Json:
        one = {"type": "object", "properties": {"first": first}, "required": ["first"]}
        return {"allOf": [one, {"properties": {"second": second}, "required": ["second"]}]}

    return st.builds(both, inner, inner)


SCHEMAS: Final = st.recursive(
    VALUES,
    lambda inner: st.one_of(
        _objects(inner),
        _lists(inner),
        _tagged(inner),
        _parted(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda members: {"anyOf": members}),
    ),
    max_leaves=6,
)


@st.composite
def answers(draw: st.DrawFn) -> Json:
    """A schema as clients send them: an object, whose parts may be referred to."""
    schema = draw(_objects(SCHEMAS))
    if draw(st.booleans()):
        schema["$defs"] = {"part": draw(SCHEMAS)}
        schema["properties"]["part"] = {"$ref": "#/$defs/part", "description": "A part."}
    return schema


# --- the other way round ----------------------------------------------------------------------

_TOKEN: Final = re.compile(
    r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\{[0-9,]+\}|[()|?]|[a-z][a-z0-9]*'
)
_ESCAPE: Final = re.compile(r"\\(.)")
_CLASS: Final = re.compile(r"(\\U.{8}|\\u.{4}|.)(?:-(\\U.{8}|\\u.{4}|.))?")


class Plain(Random):
    """Nothing is left to chance: the first of several, letters, and every fiftieth repetition."""

    asked = -1

    def random(self) -> float:
        self.asked += 1
        return self.asked % 50 / 50

    def choice(self, seq: Any) -> Any:
        ranges = (each for each in seq if isinstance(each, tuple))
        with_letters = (each for each in ranges if _has(each, "g"))
        return next(with_letters, seq[0])

    def randint(self, a: int, b: int) -> int:
        return ord("g") if a <= ord("g") <= b else a


@attrs.define
class Speaker:
    """Says texts that a grammar of ours lets through; nothing of llama.cpp is in it."""

    grammar: str
    random: Random
    #: How much of what may be said again is said: 0 is the least, 1 the most.
    talkative: float
    rules: dict[str, list[str]] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        for line in self.grammar.splitlines():
            name, _, rule = line.partition(" ::= ")
            self.rules[name] = _TOKEN.findall(rule)

    def say(self, name: str = "root") -> str:
        tokens = [*self.rules[name]]
        said = self._alternatives(tokens)
        assert not tokens
        return said

    def _alternatives(self, tokens: list[str]) -> str:
        """Reads all of them, and says one."""
        ways = [[]]  # type: list[list[tuple[list[str], int, int]]]
        while tokens and tokens[0] != ")":
            token = tokens.pop(0)
            if token == "|":
                ways.append([])
                continue
            inside = [token]
            if token == "(":
                depth, inside = 1, []
                while depth:
                    each = tokens.pop(0)
                    depth += (each == "(") - (each == ")")
                    inside.append(each)
                inside.pop()
                inside = ["(", *inside]
            least = most = 1
            if tokens and tokens[0] == "?":
                tokens.pop(0)
                least = 0
            elif tokens and tokens[0].startswith("{"):
                numbers = [int(number) for number in tokens.pop(0)[1:-1].split(",")]
                least, most = numbers[0], numbers[-1]
            ways[-1].append((inside, least, most))
        said = []
        for atom, least, most in self.random.choice(ways):
            times = sum(self.random.random() < self.talkative for _ in range(most - least))
            said += [self._atom(atom) for _ in range(least + times)]
        return "".join(said)

    def _atom(self, atom: list[str]) -> str:
        first = atom[0]
        if first == "(":
            return self._alternatives(atom[1:])
        if first.startswith('"'):
            return _ESCAPE.sub(lambda found: {"n": "\n"}.get(found[1], found[1]), first[1:-1])
        if first.startswith("["):
            low, high = self.random.choice(_CLASS.findall(first[1:-1]))
            start = _point(low)
            return chr(self.random.randint(start, min(_point(high or low), start + 300)))
        return self.say(first)


def _has(ends: tuple[str, str], letter: str) -> bool:
    low, high = ends
    return _point(low) <= ord(letter) <= _point(high or low)


def _point(written: str) -> int:
    return (
        ord(written)
        if len(written) == 1
        else int(written.removeprefix("\\U").removeprefix("\\u"), 16)
    )
