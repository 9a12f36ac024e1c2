"""
Every sample in the documentation, and what becomes of it in a test.

Samples are the fenced blocks of ``docs/*.md`` and the code blocks of ``*.rst``; commands are also
what stands in running text as code, begins with one of `PROGRAMS` and has more than one word.
Each command is in one of the four tables below: it is run on a real gateway (`RUN`), make says
what it would do (`DRY`), another test does it (`ELSEWHERE`), or it is not run and there is a reason
(`NOT_RUN`).  One that is in none of them fails, and so does a row that no command needs any more.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PurePath
from typing import Final

import attrs
from docutils import nodes
from docutils.core import publish_doctree
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT: Final = Path(__file__).parents[2]

#: Languages that a sample may be in; a picture is ``text``, and Sphinx's own are in braces.
LANGUAGES: Final = frozenset({"toml", "sh", "json", "yaml", "python", "text", "{toctree}"})

#: What makes code in running text a command.
PROGRAMS: Final = frozenset(
    {"brew", "claude", "claudegw", "curl", "journalctl", "kill", "launchctl", "lsof", "make"}
    | {"pip", "pytest", "python", "python3", "sudo", "systemctl", "twistd"}
)

#: Begins of commands that `tests.docs.test_commands` runs on a real gateway, and what it shows that
#: each has worked: a part of what it prints.
RUN: Final[Mapping[str, str]] = {
    "make run": " listens on ",
    "cd ~/claudegw": "",
    "cp etc/gw.toml ~/claudegw/": "",
    "(umask 077; .venv/bin/claudegw settings": "",
    "(umask 077; venv/bin/claudegw settings": "",
    "claude --settings": "",
    "curl http://127.0.0.1:9090/v1/messages -H": '"type":"message"',
    "curl --no-buffer http://127.0.0.1:9090/v1/messages -H": '"type":"message_stop"',
    "curl http://127.0.0.1:9090/v1/messages/count_tokens": '{"input_tokens":',
    "curl http://127.0.0.1:9090/healthz": '"ok"',
    "curl http://127.0.0.1:9090/status": '"tiers"',
    "curl http://127.0.0.1:9090/v1/models": "claudegw-main",
    ".venv/bin/claudegw status": "gemma-3-270m",
    "venv/bin/claudegw status": "gemma-3-270m",
    "/opt/claudegw/bin/claudegw status": "gemma-3-270m",
    "claudegw status": "gemma-3-270m",
    "claudegw status --last": "outcome",
    "claudegw settings": "ANTHROPIC_BASE_URL",
    "claudegw settings --for sdk": "OPENAI_BASE_URL",
    "venv/bin/claudegw settings": "ANTHROPIC_BASE_URL",
    "venv/bin/claudegw settings --for opencode": '"small_model"',
    "venv/bin/claudegw doctor": "Claude Code would work",
    "claudegw doctor": "Claude Code would work",
    'eval "$(venv/bin/claudegw settings --shell': "",
    ".venv/bin/pytest": "tests collected",
}

#: Goals of make whose real run is this very test run, or longer: ``make --dry-run`` takes them.
DRY: Final = (
    "make test",
    "make lint",
    "make types",
    "make layers",
    "make docs",
    "make audit",
    "make bench",
    "make clean",
    "make fuzz",
    'make fuzz TARGETS="answers http" SECONDS=600',
)

#: Begins of commands that another test runs, and which.
ELSEWHERE: Final[Mapping[str, str]] = {
    "python3 -m venv": "e2e/test_install.py::installed",
    "python3.12 -m venv": "e2e/test_install.py::installed",
    "venv/bin/pip install .": "e2e/test_install.py::installed",
    "~/claudegw/venv/bin/pip install": "e2e/test_install.py::installed",
    "venv/bin/twistd -n": "e2e/test_daemon.py::handed",
    "twistd --pidfile=gw.pid": "e2e/test_install.py::test_an_installed_gateway_runs_as_a_daemon",
    "kill $(cat gw.pid)": "e2e/test_install.py::test_an_installed_gateway_runs_as_a_daemon",
    ".venv/bin/python -m docs.house": (
        "docs/test_build.py::test_the_floors_are_those_that_are_proved"
    ),
    ".venv/bin/claudegw claude": "e2e/test_claude_command.py::test_a_prompt",
    "venv/bin/claudegw claude": "e2e/test_claude_command.py::test_a_prompt",
    "claudegw claude": "e2e/test_claude_command.py::test_a_prompt",
    "claudegw statusline": "commands/test_statusline.py::test_the_running_gateway_is_asked",
    "claudegw launchd": "test_cli.py::test_the_launch_agent_is_installed",
    "venv/bin/claudegw launchd": "test_cli.py::test_the_launch_agent_is_installed",
}

#: Begins of commands that are not run, and why.
NOT_RUN: Final[Mapping[str, str]] = {
    "sudo ": "it needs root, and changes the machine",
    "brew ": "a Mac's, and it installs programs for the whole machine",
    "launchctl ": "a Mac's",
    "mkdir -p /Users": "a Mac's folder, outside of every home",
    "printf 'models": "it needs root, and a Mac",
    "systemctl ": "it needs a systemd that runs; the units are verified in tests/daemon",
    "journalctl ": "it needs a systemd that runs",
    "lsof ": "it only looks, with a program that not every machine has",
    "kill $(cat ~/.local": "it would end the gateway of who runs the tests",
    "rm -r ~": "it takes away what the other commands are tried on",
    "python -m bench.soak": "it takes half an hour",
    "python -m bench.load": "it takes half an hour; what it judges by is in tests/bench",
    "python -m bench.cache": "it takes half an hour",
    "python -m bench.overhead": "it takes minutes; its parts are in tests/bench",
    "python -m bench.abuse": "it takes minutes; what it throws is in tests/web",
    "python -m bench.audit": "it takes many minutes; what it counts with is in tests/e2e",
}


@attrs.frozen
class Sample:
    """
    One sample.

    Attributes:
        page: its file, below the repository.
        line: where it begins.
        language: one of `LANGUAGES`; "" where nothing says it.
        text: the sample.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@attrs.frozen
class Command:
    """
    One command.

    Attributes:
        sample: where it stands.
        text: the command, with all its lines.
    """

    sample: Sample
    text: str

    def __str__(self) -> str:
        return f"{self.sample} {self.text.splitlines()[0][:60]}"


def pages() -> list[Path]:
    """The files of the documentation."""
    return [*sorted(ROOT.glob("*.rst")), *sorted((ROOT / "docs").glob("*.md"))]


@cache
def blocks() -> tuple[Sample, ...]:
    """Every block of code."""
    return tuple(found for found, inline in _all() if not inline)


@cache
def commands() -> tuple[Command, ...]:
    """Every command, in blocks and in running text."""
    return tuple(
        Command(sample, text)
        for sample, inline in _all()
        for text in ([sample.text] if inline else _logical_lines(sample))
        if not inline or is_command(text)
    )


def is_command(code: str) -> bool:
    """Whether code in running text is a command that a person could type."""
    first, _, rest = code.partition(" ")
    return bool(rest) and PurePath(first).name in PROGRAMS


def row_of(command: str) -> str:
    """The row that a command belongs to, the longest of those that fit; "" for none."""
    every = (*RUN, *DRY, *ELSEWHERE, *NOT_RUN)
    return max((row for row in every if command.startswith(row)), key=len, default="")


def _logical_lines(sample: Sample) -> Iterator[str]:
    """The commands of a block; one goes on while a quote is open or its line says so."""
    if sample.language != "sh":
        return
    command = ""
    for line in sample.text.splitlines():
        command = f"{command}\n{line}" if command else line
        try:
            shlex.split(command, comments=True)
        except ValueError:
            continue
        if command.strip() and not command.endswith("\\"):
            yield command
            command = ""
    assert not command.strip(), f"{sample} does not end: {command}"


def _all() -> Iterator[tuple[Sample, bool]]:
    """Every piece of code, and whether it stands in running text."""
    for path in pages():
        found = _of_markdown(path) if path.suffix == ".md" else _of_rst(path)
        for line, language, text, inline in found:
            yield Sample(str(path.relative_to(ROOT)), line, language, text), inline


def _of_markdown(path: Path) -> Iterator[tuple[int, str, str, bool]]:
    line = 0
    for token in MarkdownIt().enable("table").parse(path.read_text()):
        line = token.map[0] + 1 if token.map else line
        if token.type in ("fence", "code_block"):
            yield line, token.info.strip(), token.content, False
        for child in _inline_code(token):
            yield line, "", child.content, True


def _inline_code(token: Token) -> Iterator[Token]:
    return (child for child in token.children or () if child.type == "code_inline")


def _of_rst(path: Path) -> Iterator[tuple[int, str, str, bool]]:
    tree = publish_doctree(path.read_text(), settings_overrides={"report_level": 5})
    for node in tree.findall(nodes.literal_block):
        (language,) = [name for name in node["classes"] if name != "code"] or [""]
        yield node.line or 0, language, node.astext(), False
    for literal in tree.findall(nodes.literal):
        yield 0, "", " ".join(literal.astext().split()), True
