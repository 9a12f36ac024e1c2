"""Every sample of the documentation: configurations load, commands are accounted for."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import PurePath
from typing import Any

import orjson
import pytest
import yaml

from gateway.cli import _parser
from gateway.config import parse
from gateway.daemon.launchd import LABEL
from gateway.policy.calls import KINDS
from tests.docs.samples import (
    DRY,
    ELSEWHERE,
    LANGUAGES,
    NOT_RUN,
    ROOT,
    RUN,
    Command,
    Sample,
    blocks,
    commands,
    is_command,
    pages,
    row_of,
)

Json = Any

#: What a fragment is put into: the least that has both of the tiers a route can name.
MINIMAL = {
    "tier": {"main": {"url": "http://127.0.0.1:8080"}, "small": {"url": "http://127.0.0.1:8081"}}
}


def in_language(name: str) -> list[Sample]:
    return [sample for sample in blocks() if sample.language == name]


def merged(below: Mapping[str, Json], above: Mapping[str, Json]) -> dict[str, Json]:
    """`below` with what `above` says; tables are merged, everything else is replaced."""
    both = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], dict) and isinstance(above[name], dict):
            both[name] = merged(below[name], above[name])
    return both


# --- blocks ---------------------------------------------------------------------------------------


def test_there_are_samples() -> None:
    """They are found in the languages that are checked, and on the pages that people use."""
    assert {sample.language for sample in blocks()} >= {"toml", "sh", "json", "python", "text"}
    assert {"README.rst", "docs/start.md", "docs/operations.md"} <= {
        sample.page for sample in blocks()
    }


@pytest.mark.parametrize("sample", blocks(), ids=str)
def test_a_block_says_its_language(sample: Sample) -> None:
    """What has no language would be checked by nobody."""
    assert sample.language in LANGUAGES


@pytest.mark.parametrize("sample", in_language("toml"), ids=str)
def test_a_configuration_loads(sample: Sample) -> None:
    """A sample of gw.toml is without a mistake, put into a configuration that has both tiers."""
    said = tomllib.loads(sample.text)
    config = parse(merged(MINIMAL, said), KINDS)
    assert said.keys() <= {"gateway", "tier", "route"}
    assert len(config.route) == len(said.get("route", ()))


@pytest.mark.parametrize("sample", in_language("json"), ids=str)
def test_json_is_json(sample: Sample) -> None:
    """A sample of JSON can be read."""
    assert orjson.loads(sample.text)


def test_yaml_is_yaml() -> None:
    """A sample for another program's configuration can be read."""
    for sample in in_language("yaml"):
        assert yaml.safe_load(sample.text), sample


# --- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", commands(), ids=str)
def test_a_command_is_accounted_for(command: Command) -> None:
    """It is run here or elsewhere, or there is a reason why it is not."""
    assert row_of(command.text), f"{command.text} is in no table of tests/docs/samples.py"


def test_no_row_is_left_over() -> None:
    """Each row of the tables is there for a command that the documentation has."""
    rows = [*RUN, *DRY, *ELSEWHERE, *NOT_RUN]
    assert len(rows) == len({*rows})
    assert {*rows} == {row_of(command.text) for command in commands()}


@pytest.mark.parametrize("where", sorted({*ELSEWHERE.values()}))
def test_what_is_run_elsewhere_is_run_there(where: str) -> None:
    """The test, or what it is made of, exists."""
    path, _, name = where.partition("::")
    assert f"\ndef {name}(" in (ROOT / "tests" / path).read_text()


@pytest.mark.parametrize("command", commands(), ids=str)
def test_a_command_has_the_form_of_one(command: Command) -> None:
    """A shell can read it; goals, modules, units and labels that it names exist."""
    subprocess.run(["sh", "-n", "-c", command.text], check=True, timeout=60)
    words = command.text.split()
    if "systemctl" in words:
        for unit in re.findall(r"claudegw\.\w+", command.text):
            assert (ROOT / "etc/systemd" / unit).exists()
    if words[0] == "launchctl":
        assert LABEL in command.text
    if words[:2] == ["python", "-m"]:
        assert find_spec(words[2]) is not None


#: A use of ``claudegw`` itself, with what it is told.
CLAUDEGW = re.compile(r"(?:^|\$\(|; )(?:\S*/)?claudegw ([^)#>]*)")


@pytest.mark.parametrize(
    "command", [each for each in commands() if CLAUDEGW.search(each.text)], ids=str
)
def test_claudegw_knows_what_it_is_told(command: Command) -> None:
    """Whatever is written of ``claudegw`` is a command of it, with options that it has."""
    for told in CLAUDEGW.findall(command.text):
        _parser().parse_args(shlex.split(told))


# --- what the text names --------------------------------------------------------------------------


def test_code_in_running_text() -> None:
    """A word alone is no command, and neither is what begins with no program."""
    assert is_command("venv/bin/claudegw status")
    assert not is_command("claudegw")
    assert not is_command("content-type: application/json")


@pytest.mark.parametrize("page", pages(), ids=lambda page: PurePath(page).name)
def test_paths_exist(page: PurePath) -> None:
    """What the text names as a file or a folder of the repository is there."""
    text = (ROOT / page).read_text()
    places = r"`((?:gateway|tests|docs|etc|bin|bench|newsfragments|\.ci)/[\w./-]*)`"
    for path in re.findall(places, text):
        assert (ROOT / path).exists() or path.startswith("build/"), path
