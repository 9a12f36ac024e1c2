"""The reference of gw.toml that is written from its classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain

import attrs

from docs.config_reference import MARK, Key, reference, tables
from gateway import config
from tests.docs.samples import ROOT

#: Each class of the configuration, with the heading of its table.
CLASSES: Mapping[str, type] = {
    "[gateway]": config.Gateway,
    "[tier.NAME]": config.Tier,
    "[tier.NAME.server]": config.Server,
    "[[route]]": config.RouteRule,
}


def keys() -> dict[tuple[str, str], Key]:
    return {(table.heading, key.name): key for table in tables() for key in table.keys}


def test_every_class_is_a_table() -> None:
    """No class of the configuration is left out."""
    known = {kind for kind in vars(config).values() if attrs.has(kind)} - {config.Config}
    assert {*CLASSES.values()} == known
    assert [table.heading for table in tables()] == [*CLASSES]


def test_every_key_is_there() -> None:
    """Each key stands in its table, with a meaning and what it takes."""
    expected = chain.from_iterable(
        [(heading, field.name) for field in attrs.fields(kind) if field.name != "server"]
        for heading, kind in CLASSES.items()
    )
    assert [*keys()] == [*expected]
    assert all(key.meaning and key.takes and key.default for key in keys().values())


def test_every_key_is_in_the_shipped_configuration() -> None:
    """etc/gw.toml names each of them, used or commented out."""
    text = (ROOT / "etc/gw.toml").read_text()
    for _, name in keys():
        assert f"\n{name} = " in text or f"\n# {name} = " in text or f"\n#   {name} " in text, name


def test_bounds_are_those_of_the_check() -> None:
    """What is said of a value is what its check says of a wrong one."""
    found = keys()
    assert found["[gateway]", "grace"].takes == "number: between 0 and 3600"
    assert found["[tier.NAME]", "cache_ram"].takes == "integer: at least 0"
    assert found["[tier.NAME]", "url"].takes.startswith('string: `"http://host:port"` or ')
    assert found["[gateway]", "token"].takes == "string"
    assert "compaction" in found["[[route]]", "kind"].takes


def test_defaults_are_toml() -> None:
    """A default can be copied into the file."""
    found = keys()
    assert found["[gateway]", "listen"].default == '`"tcp:9090:interface=127.0.0.1"`'
    assert found["[gateway]", "grace"].default == "`30`"
    assert found["[gateway]", "hosts"].default == "`[]`"
    assert found["[gateway]", "token"].default == "None"
    assert found["[tier.NAME]", "url"].default == "required"
    assert found["[tier.NAME.server]", "env"].default == "`{}`"
    assert found["[tier.NAME.server]", "manage_flags"].default == "`true`"


def test_a_restart_is_said_where_it_is_needed() -> None:
    """It is for where clients and servers find each other, and for nothing that can be had now."""
    waiting = {(heading, name) for (heading, name), key in keys().items() if key.restart}
    assert waiting >= {
        *(("[gateway]", name) for name in ("listen", "state_dir", "token")),
        *(("[tier.NAME]", name) for name in ("url", "kind", "slots", "api_key")),
    }
    assert waiting.isdisjoint(
        {
            *(("[gateway]", name) for name in ("grace", "hosts", "snapshot_budget")),
            *(("[tier.NAME]", name) for name in ("max_waiting", "stall")),
            *(("[tier.NAME.server]", name) for name in ("command", "env")),
            ("[[route]]", "tier"),
        }
    )


def test_a_long_meaning_is_whole() -> None:
    """One that goes over two lines of the docstring is told to its end."""
    assert keys()["[tier.NAME.server]", "max_restarts"].meaning.endswith(
        "until somebody asks for it."
    )


def test_the_page_has_the_mark() -> None:
    """Where the reference goes is said once."""
    assert (ROOT / "docs/configuration.md").read_text().count(MARK) == 1
    assert MARK not in reference()


def test_a_route_names_what_can_be_routed() -> None:
    """A kind that no route can match is not among those that it may name."""
    assert "count" not in keys()["[[route]]", "kind"].takes


def test_what_waits_for_a_restart_is_said_beside_what_does_not() -> None:
    """docs/operations.md names each key whose new value waits."""
    text = (ROOT / "docs/operations.md").read_text()
    (about,) = re.findall(r"^## Reading the conf.*?(?=^## )", text, re.MULTILINE | re.DOTALL)
    waiting = [line.split("|")[2] for line in about.splitlines() if line.startswith("|")]
    said = {*re.findall(r"`(\w+)`", "".join(waiting))}
    assert said == {name for (_, name), key in keys().items() if key.restart}
