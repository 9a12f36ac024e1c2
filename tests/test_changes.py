"""What a new configuration changes, and what it has to leave for a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from gateway.changes import between
from gateway.config import Config, Gateway, RouteRule, Server, Tier

SERVER = Server(("llama-server", "-m", "a.gguf"))
MAIN = Tier("http://127.0.0.1:8081", server=SERVER)
SMALL = Tier("http://127.0.0.1:8082")
OLD = Config(Gateway(), {"main": MAIN, "small": SMALL})


def with_main(**changes: Any) -> Config:
    return attrs.evolve(OLD, tier={**OLD.tier, "main": attrs.evolve(MAIN, **changes)})


def test_the_same_changes_nothing() -> None:
    """A file that is read again as it was asks for nothing."""
    changes = between(OLD, attrs.evolve(OLD))
    assert changes.config == OLD
    assert (changes.added, changes.removed, changes.postponed) == ((), (), ())


def test_tiers_come_and_go() -> None:
    """They are named, and main stays what it was."""
    vision = Tier("http://127.0.0.1:8083")
    new = attrs.evolve(OLD, tier={"main": MAIN, "vision": vision})
    changes = between(OLD, new)
    assert (changes.added, changes.removed) == (("vision",), ("small",))
    assert changes.config.tier == {"main": MAIN, "vision": vision}
    assert changes.postponed == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_waiting", 5),
        ("ageing", 1.0),
        ("startup_patience", 1.0),
        ("resends", 0),
        ("stall", 5.0),
        ("answer_tokens", 20),
        ("schema_tokens", 70),
        ("server", Server(("llama-server", "-m", "b.gguf"))),
        ("server", attrs.evolve(SERVER, env={"GGML_METAL": "0"}, max_restarts=1)),
    ],
)
def test_what_a_tier_takes_at_once(key: str, value: Any) -> None:
    """Bounds, times, and another command line for a server that was ours before."""
    changes = between(OLD, with_main(**{key: value}))
    assert getattr(changes.config.tier["main"], key) == value
    assert changes.postponed == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("url", "http://127.0.0.1:9999"),
        ("slots", 2),
        ("api_key", "another"),
        ("api_key_env", "ANOTHER"),
        ("model", "another"),
        ("window", 4096),
        ("server", None),
    ],
)
def test_what_a_tier_takes_only_after_a_restart(key: str, value: Any) -> None:
    """It keeps its old value and is named; everything else of the tier is taken."""
    changes = between(OLD, with_main(**{key: value, "stall": 5.0}))
    kept = changes.config.tier["main"]
    assert getattr(kept, key) == getattr(MAIN, key)
    assert kept.stall == 5.0
    assert changes.postponed[0] == f"tier.main.{key}"


def test_a_server_that_becomes_ours_waits_for_a_restart() -> None:
    """Somebody else's may still run in its place."""
    small = attrs.evolve(SMALL, server=SERVER)
    changes = between(OLD, attrs.evolve(OLD, tier={"main": MAIN, "small": small}))
    assert changes.config.tier["small"].server is None
    assert changes.postponed == ("tier.small.server",)


def test_a_command_waits_with_the_address_that_belongs_to_it() -> None:
    """A server that was started at its new port alone would never be found at the old one."""
    server = Server(("llama-server", "-m", "a.gguf", "--port", "9999"))
    changes = between(OLD, with_main(url="http://127.0.0.1:9999", server=server))
    assert changes.config.tier["main"] == MAIN
    assert changes.postponed == ("tier.main.url", "tier.main.server")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("body_limit", 2048),
        ("max_connections", 9),
        ("head_timeout", 3.0),
        ("grace", 1.0),
        ("start_after", 5.0),
        ("hosts", ("gw.example",)),
    ],
)
def test_what_the_door_takes_at_once(key: str, value: Any) -> None:
    """Its bounds, its times and its names."""
    changes = between(OLD, attrs.evolve(OLD, gateway=attrs.evolve(OLD.gateway, **{key: value})))
    assert getattr(changes.config.gateway, key) == value
    assert changes.postponed == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [("listen", "tcp:9091"), ("state_dir", Path("/elsewhere")), ("token", "a new one")],
)
def test_what_the_door_takes_only_after_a_restart(key: str, value: Any) -> None:
    """Where clients find us, and what they show."""
    changes = between(OLD, attrs.evolve(OLD, gateway=attrs.evolve(OLD.gateway, **{key: value})))
    assert changes.config == OLD
    assert changes.postponed == (f"gateway.{key}",)


def test_routes_change_at_once() -> None:
    """The calls that come later go by the new ones."""
    rules = (RouteRule("small", model="*haiku*"),)
    assert between(OLD, attrs.evolve(OLD, route=rules)).config.route == rules
