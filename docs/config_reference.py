"""
The reference of ``gw.toml``, written from `gateway.config` when the documentation is built.

Every key stands there with its type, bounds, default and meaning (the line of its class's
docstring), and whether a new value waits for a restart (what `gateway.changes` says of it).  As a
Sphinx extension it puts all that in the place of `MARK`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Final, get_args, get_origin, get_type_hints

import attrs
import orjson
from sphinx.application import Sphinx

from gateway.changes import between
from gateway.config import EXPECTED, Config, Gateway, RouteRule, Server, Tier
from gateway.policy.calls import ROUTED

#: The line of a page that is replaced.
MARK: Final = "% The keys of gateway/config.py"

_TYPES: Final = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "`true` or `false`",
    Path: "path",
    tuple[str, ...]: "list of strings",
    Mapping[str, str]: "table of strings",
}


@attrs.frozen
class Key:
    """
    One key.

    Attributes:
        name: without its table.
        takes: its type and bounds, in words.
        default: as TOML; "required"; or "None".
        meaning: what it is for, in Markdown.
        restart: whether a new value needs a restart of the gateway.
    """

    name: str
    takes: str
    default: str
    meaning: str
    restart: bool


@attrs.frozen
class Table:
    """
    One table.

    Attributes:
        heading: as in the file: ``[tier.NAME]``.
        about: the first sentence of its class.
        keys: in the order of the class, tables aside.
    """

    heading: str
    about: str
    keys: tuple[Key, ...]


def tables() -> Iterator[Table]:
    """All tables of the configuration, from the top."""
    yield from _tables(Config, "")


def _tables(kind: type[Any], path: str) -> Iterator[Table]:
    """Those below `kind`, which stands at `path`."""
    hints = get_type_hints(kind)
    meanings = _meanings(kind)
    keys, below = [], []
    for field in attrs.fields(kind):
        hint = _unless_none(hints[field.name])
        table = _table_of(hint, f"{path}.{field.name}".removeprefix("."))
        if table is not None:
            below.append(table)
        else:
            keys.append(_key(kind, field, hint, meanings[field.name]))
    if path:
        about = (inspect.getdoc(kind) or "").partition("\n")[0]
        yield Table(f"[[{path}]]" if kind is RouteRule else f"[{path}]", about, tuple(keys))
    for inner, where in below:
        yield from _tables(inner, where)


def _table_of(hint: Any, path: str) -> tuple[type[Any], str] | None:
    """The class of a key that is a table, or many of them, and its path; None for a value."""
    inner = get_args(hint)
    if get_origin(hint) is not None and attrs.has(inner[-1]):
        return inner[-1], f"{path}.NAME"
    if get_origin(hint) is tuple and attrs.has(inner[0]):
        return inner[0], path
    return (hint, path) if attrs.has(hint) else None


def _unless_none(hint: Any) -> Any:
    """A type without its ``| None``."""
    if NoneType not in get_args(hint):
        return hint
    (rest,) = (kind for kind in get_args(hint) if kind is not NoneType)
    return rest


def _key(kind: type[Any], field: Any, hint: Any, meaning: str) -> Key:
    expected = field.metadata.get(EXPECTED, "")
    if kind is RouteRule and field.name == "kind":  # what only a whole configuration is held to
        expected = "one of " + ", ".join(ROUTED)
    takes = _TYPES[hint] if not expected or expected == "something" else _takes(hint, expected)
    return Key(field.name, takes, _default(field), meaning, _needs_restart(kind, field.name))


def _takes(hint: Any, expected: str) -> str:
    """``integer, at least 1``; samples of strings in code."""
    return f"{_TYPES[hint]}: " + re.sub(r'"([^"]+)"', r'`"\1"`', expected)


def _default(field: Any) -> str:
    """The default of a key, as TOML."""
    default = field.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]  # typed as a function
        default = default.factory()
    match default:
        case attrs.NOTHING:
            return "required"
        case None:
            return "None"
        case Mapping():
            return "`{}`"
        case Path():
            return f"`{orjson.dumps(str(default)).decode()}`"
        case float() if default.is_integer():
            return f"`{int(default)}`"
        case _:
            return f"`{orjson.dumps(default).decode()}`"


def _meanings(kind: type[Any]) -> dict[str, str]:
    """What a class's docstring says of each of its attributes."""
    _, _, listed = (inspect.getdoc(kind) or "").partition("\nAttributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in listed.splitlines():
        begun = re.fullmatch(r" {4}(\w+): (.+)", line)
        if begun:
            name = begun[1]
            found[name] = begun[2]
        elif line.startswith(" " * 8):
            found[name] += " " + line.strip()
        else:
            break
    return found


def _needs_restart(kind: type[Any], name: str) -> bool:
    """Whether a reload keeps the old value of that key."""
    server = Server(command=("llama-server",))
    tier = Tier(url="http://127.0.0.1:1", server=server)
    values: dict[type[Any], Any] = {Gateway: Gateway(), Tier: tier, Server: server}
    if kind not in values:  # routes
        return False
    other = attrs.evolve(values[kind], **{name: object()})

    def house(changed: Any) -> Config:
        match changed:
            case Gateway():
                return Config(gateway=changed, tier={"main": tier})
            case Tier():
                return Config(tier={"main": changed})
            case _:
                return Config(tier={"main": attrs.evolve(tier, server=changed)})

    return bool(between(house(values[kind]), house(other)).postponed)


# --- as Markdown ----------------------------------------------------------------------------------


def reference() -> str:
    """The whole reference, one section a table."""
    return "\n\n".join(map(_section, tables()))


def _section(table: Table) -> str:
    return "\n\n".join([f"## `{table.heading}`", table.about, *map(_entry, table.keys)])


def _entry(key: Key) -> str:
    """The key, what it is, and below that what it takes."""
    default = key.default if key.default == "required" else f"default: {key.default}"
    meaning = key.meaning[0].upper() + key.meaning[1:]
    restart = " ↻" if key.restart else ""
    return f"`{key.name}`{restart}\n: {meaning}\n\n  {key.takes}; {default}"


def _fill(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Put the reference into the page that has the mark."""
    if MARK in source[0]:
        source[0] = source[0].replace(MARK, reference())


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True}
