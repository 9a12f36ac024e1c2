"""The configurations that we ship."""

from __future__ import annotations

import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import pytest

from gateway.config import Gateway, Server, Tier, load
from gateway.llama.command import command
from gateway.policy.calls import KINDS

ETC = Path(__file__).parents[1] / "etc"


@pytest.mark.parametrize("name", ["gw.toml", "demo.toml"])
def test_it_loads(name: str) -> None:
    """A shipped configuration has a main and a small tier, both of them supervised."""
    config = load(ETC / name, KINDS)
    assert list(config.tier) == ["main", "small"]
    assert all(tier.server is not None for tier in config.tier.values())
    assert [rule.tier for rule in config.route] == ["small"]


@pytest.mark.parametrize(
    ("table", "kind"), [("gateway", Gateway), ("tier.main", Tier), ("tier.main.server", Server)]
)
def test_a_key_that_is_commented_out_shows_its_default(table: str, kind: type[Any]) -> None:
    """Where it has one; so who takes the mark away changes nothing."""
    (about,) = re.findall(
        rf"^\[{re.escape(table)}\]\n(.*?)(?:^\[|\Z)",
        (ETC / "gw.toml").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    shown = tomllib.loads("\n".join(re.findall(r"^# (\w+ = .+)$", about, re.MULTILINE)))
    defaults = {field.name: field.default for field in attrs.fields(kind)}
    assert shown
    for name, value in shown.items():
        if defaults[name] not in (None, ()) and not isinstance(value, dict):
            assert value == defaults[name], name


def test_the_mac_studio_is_as_promised() -> None:
    """GLM-5 listens on 8080 with one slot, the small model on 8081, the gateway on 9090."""
    config = load(ETC / "gw.toml", KINDS)
    assert config.gateway.listen == "tcp:9090:interface=127.0.0.1"
    main, small = config.tier["main"], config.tier["small"]
    assert (main.url, main.slots) == ("http://127.0.0.1:8080", 1)
    assert (small.url, small.slots) == ("http://127.0.0.1:8081", 2)
    assert main.server is not None
    line = command(main, main.server, config.gateway.state_dir)
    assert line[:3] == ["llama-server", "--model", "/models/GLM-5-UD-IQ2_XXS.gguf"]
    flags = dict(pairwise(line))
    assert flags["--port"] == "8080"
    assert flags["--parallel"] == "1"
    assert flags["--slot-prompt-similarity"] == "0"
