"""docs/security.md is held to its word: each threat names its tests, and each test is there."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.samples import ROOT

PAGE = (ROOT / "docs/security.md").read_text()

#: Each threat: its first words, and all that is said of it.
THREATS = re.findall(r"^\* \*\*(.+?)\.?\*\*(.*(?:\n  .*)*)", PAGE, re.MULTILINE)

NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


def test_each_threat_names_a_test() -> None:
    """There is none that is only said to be met."""
    assert len(THREATS) == PAGE.count("* **") > 30
    assert [threat for threat, said in THREATS if "::test_" not in said] == []


def test_each_line_of_a_test_is_one() -> None:
    """What begins as a test's name is one to its end."""
    lines = [line.strip() for line in PAGE.splitlines() if line.strip().startswith("`tests/")]
    assert [line for line in lines if not re.fullmatch(r"`tests/[\w/]+\.py::test_\w+`", line)] == []


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_test_that_is_named_is_there(path: str, name: str) -> None:
    """A test that is renamed or goes takes its line of the page with it."""
    module = ast.parse((ROOT / path).read_text())
    functions = [
        each for each in module.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert name in [each.name for each in functions]
