"""
Answers that must fit a JSON schema.

llama-server's ``/v1/messages`` drops a schema, and its chat endpoints enforce one only with some
templates; a rendered prompt sent to ``/completion`` with ``json_schema`` holds it with every one
(docs/protocol.md, "Schemas").  Strings and lists get bounds of their own first, sized so that an
answer of the allowed length always closes: a tiny model would fill a title with 32 000 tokens.
llama-server ignores what it does not know in a schema, so the answer is validated here, asked for
once more if it does not fit, and then it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs
import orjson
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from referencing import Registry

from gateway.llama.client import Completion, LlamaClient
from gateway.wire import chat
from gateway.wire.errors import ApiError, invalid

Json = Any

#: Characters that a value gets at least, however little room there is.
_LEAST: Final = 16

#: Grammars of llguidance allow white space without end between two values, and tiny models like it.
#: Other servers do not know this key and pass it over (llguidance, `docs/json_schema.md`).
_NO_RAMBLING: Final = {
    "x-guidance": {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
    }
}

#: Steps that bounding a schema may take; references can make a small one endless.
_STEPS: Final = 20_000

#: The server's own limit, in multiples of the bound: a character may cost up to four tokens (an
#: emoji in bytes).
_SLACK: Final = 4

#: Largest number either way; without a bound some grammars allow endless digits.
_LARGEST: Final = 10**15

ATTEMPTS: Final = 2

_REFERENCES: Final = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})

_WHERE: Final = "output_config.format.schema"


async def complete(
    client: LlamaClient, body: Mapping[str, Json], schema: Mapping[str, Json], tokens: int
) -> Completion:
    """
    An answer to `body` that fits `schema`.

    Args:
        client: the server to ask; the caller holds a permit for it.
        body: a prepared body.
        schema: the client's own schema, one that `usable` lets pass.
        tokens: how long the answer may be.

    Raises:
        ApiError: no attempt gave a fitting answer.
    """
    validator = usable(schema)
    tight = bounded(schema, tokens) | _NO_RAMBLING
    prompt = await client.apply_template(chat.from_messages(body))
    wanted = {
        "prompt": prompt,
        "json_schema": tight,
        "n_predict": tokens * _SLACK,
        "cache_prompt": True,
    }
    sampling = {key: body[key] for key in ("temperature", "top_p", "top_k") if key in body}
    for attempt in range(ATTEMPTS):
        # The second time with the server's own sampling: at temperature 0 nothing would change.
        completion = await client.complete(wanted | (sampling if attempt == 0 else {}))
        if fits(validator, completion.text):
            return completion
    raise ApiError(
        "api_error",
        f"The model gave no answer that fits the schema in {ATTEMPTS} attempts.",
        should_retry=False,
    )


def usable(schema: Mapping[str, Json]) -> Draft202012Validator:
    """The validator of `schema`; raises ApiError, 400, where answers cannot be held to it."""
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise invalid(f"{_WHERE}: {error.message[:200]}") from None
    except RecursionError:
        raise _too_large() from None
    tight = bounded(schema, _STEPS)
    if not isinstance(tight, Mapping):
        raise invalid(f"{_WHERE}: a schema that allows everything holds an answer to nothing")
    if _refers(tight):
        raise invalid(
            f"{_WHERE}: a $ref can stand in properties, items, anyOf, oneOf and allOf only"
        )
    # Without a registry of its own it would fetch what a schema refers to.
    return Draft202012Validator(schema, registry=Registry())


def _refers(schema: Json) -> bool:
    """Whether there is a reference anywhere in `schema`."""
    if isinstance(schema, Mapping):
        return any(
            (name in _REFERENCES and isinstance(value, str)) or _refers(value)
            for name, value in schema.items()
        )
    return isinstance(schema, list) and any(map(_refers, schema))


def fits(validator: Draft202012Validator, text: str) -> bool:
    """Whether `text` is JSON that fits."""
    try:
        validator.validate(orjson.loads(text))
    except (ValueError, ValidationError):
        return False
    return True


def bounded(schema: Mapping[str, Json], room: int) -> Json:
    """
    `schema` with bounds on its strings, lists and numbers.

    Args:
        schema: a valid schema.
        room: characters that the whole answer may have, which is also the tokens that it may have
            where each character is a token of its own.

    Raises:
        ApiError: 400, the schema refers to itself or to what is not there, or is too large.
    """
    try:
        return _Bounding(schema).bound(schema, room, ())
    except RecursionError:
        raise _too_large() from None


def _too_large() -> ApiError:
    return invalid(f"{_WHERE}: the schema is too large or nested too deep")


@attrs.define
class _Bounding:
    """One schema, on its way to its bounds."""

    root: Mapping[str, Json]
    _left: int = _STEPS

    def _step(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise _too_large()

    def bound(self, schema: Json, room: int, inside: tuple[str, ...]) -> Json:
        """`schema` within `room` characters; `inside` are the references that led here."""
        self._step()
        if not isinstance(schema, Mapping):
            return schema  # true or false
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference in inside:
                raise invalid(f"{_WHERE}: recursive schemas are not supported")
            return self.bound(self._resolve(reference), room, (*inside, reference))
        tight = {key: value for key, value in schema.items() if key not in ("$defs", "definitions")}
        for key in ("anyOf", "oneOf", "allOf"):
            if key in schema:
                tight[key] = [self.bound(each, room, inside) for each in schema[key]]
        kinds = schema.get("type", ())
        kinds = {kinds} if isinstance(kinds, str) else set(kinds)
        if "enum" in schema or "const" in schema:
            return tight
        if "string" in kinds and "pattern" not in schema and "format" not in schema:
            most = max(1, room, schema.get("minLength", 0))
            tight["maxLength"] = min(most, schema.get("maxLength", most))
        if kinds & {"integer", "number"}:
            tight.setdefault("minimum", schema.get("exclusiveMinimum", -_LARGEST))
            tight.setdefault("maximum", schema.get("exclusiveMaximum", _LARGEST))
        if "array" in kinds or "items" in schema:
            items = schema.get("items", {"type": "string"})
            most = max(1, schema.get("minItems", 0), room // (self._least(items, inside) + 2))
            tight["maxItems"] = min(most, schema.get("maxItems", most))
            tight["items"] = self.bound(items, room // most, inside)
        if "properties" in schema:
            properties = schema["properties"]
            names = sum(len(name) + 6 for name in properties)
            share = max(_LEAST, (room - names) // max(1, len(properties)))
            tight["properties"] = {
                name: self.bound(each, share, inside) for name, each in properties.items()
            }
            tight.setdefault("additionalProperties", False)
        return tight

    def _least(self, schema: Json, inside: tuple[str, ...]) -> int:
        """Characters that a value of `schema` needs at least, its strings as short as may be."""
        self._step()
        if not isinstance(schema, Mapping):
            return _LEAST
        if "$ref" in schema:
            reference = schema["$ref"]
            if reference in inside:
                return _LEAST  # refused when it is bounded
            return self._least(self._resolve(reference), (*inside, reference))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return max(self._least(each, inside) for each in schema[key])
        if "properties" in schema:
            members = schema["properties"].items()
            return 2 + sum(len(name) + 6 + self._least(each, inside) for name, each in members)
        if "items" in schema:
            items = max(1, int(schema.get("minItems", 0)))
            return 2 + items * (self._least(schema["items"], inside) + 2)
        return _LEAST

    def _resolve(self, reference: Json) -> Json:
        found: Json = self.root
        start, *steps = str(reference).split("/")
        try:
            for step in steps:
                found = found[step.replace("~1", "/").replace("~0", "~")]
        except (KeyError, TypeError):
            start = ""
        if start != "#":
            raise invalid(f"{_WHERE}: $ref {str(reference)[:80]!r} leads nowhere")
        return found
