"""The documentation as it is built and shown."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from readme_renderer import rst

from docs import house
from docs.config_reference import tables
from tests.docs.samples import ROOT


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, as ``make docs`` builds them."""
    pages = tmp_path_factory.mktemp("docs")
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html"]
    command = [*sphinx, "-d", str(pages / ".doctrees"), str(ROOT / "docs"), str(pages)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return pages


def test_the_documentation_builds(built: Path) -> None:
    """There is no warning, and each page can be reached from the first one."""
    first = (built / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert (built / f"{page.stem}.html").exists()
        assert f'href="{page.stem}.html"' in first or page.stem == "index"


def test_the_reference_is_on_its_page(built: Path) -> None:
    """Each key has its row, and nothing of the mark is left."""
    page = unescape((built / "configuration.html").read_text())
    assert "The keys of" not in page
    for table in tables():
        assert f">{table.heading}<" in page
    terms = re.findall(r'<dt>\s*<code[^>]*><span class="pre">(\w+)<', page)
    assert terms == [key.name for table in tables() for key in table.keys]


def test_nothing_is_loaded_from_elsewhere(built: Path) -> None:
    """The pages need no network."""
    for page in built.glob("*.html"):
        assert not re.search(r'(?:src|<link[^>]* href)="(?:https?:)?//', page.read_text())


def test_the_readme_renders() -> None:
    """A package index shows it, without a warning."""
    warnings = io.StringIO()
    assert rst.render((ROOT / "README.rst").read_text(), stream=warnings)
    assert warnings.getvalue() == ""


# --- the picture of the house ---------------------------------------------------------------------


def test_the_floors_are_those_that_are_proved() -> None:
    """The picture is the one that is drawn of the layers in setup.cfg."""
    assert house.PICTURE.read_text() == house.draw(), "draw it anew: python -m docs.house"
    setup = (ROOT / "setup.cfg").read_text()
    for floor in house.floors():
        assert "\n    " + " | ".join(f"gateway.{room}" for room in floor) + "\n" in setup


def test_every_room_says_what_it_is_for() -> None:
    """No room is drawn without it, and none that is gone is spoken of."""
    assert {*house.ABOUT} == {room for floor in house.floors() for room in floor}


def test_the_way_of_a_request_goes_through_rooms_that_exist() -> None:
    """Each room of the picture is a module."""
    text = (ROOT / "docs/how-it-works.md").read_text()
    picture = text.partition("```text\n")[2].partition("```")[0]
    rooms = re.findall(r"^ *([a-z]+(?:/[a-z]+)?) {2,}\w", picture, re.MULTILINE)
    assert len(rooms) > 10
    assert [room for room in rooms if not (ROOT / "gateway" / f"{room}.py").exists()] == []
