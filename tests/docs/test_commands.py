"""
The commands of the documentation, typed.

`make run` is typed in a copy of the repository that differs in its ports alone; everything else is
typed at what then runs.  The folders that the pages install to are the copy's own environment.
Claude Code is started on a gateway with a scripted model, since its prompt is long: what the
demo's models answer it is in tests/e2e/test_claude_code.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import orjson
import pytest

from tests.docs.samples import DRY, ROOT, RUN, Command, blocks, commands, row_of
from tests.e2e.clients import claude, eventually, program
from tests.e2e.scripted_llama import ScriptedLlama, Text
from tests.e2e.stack import Running, free_port, run_gateway, start

Json = Any

#: Seconds for what takes no time on an idle machine, and for two models that load.
PATIENCE: Final = 120
LOADS: Final = 900

#: The ports of etc/demo.toml: the gateway's and its models'.
PORTS: Final = ("9090", "9091", "9092")

#: That the client's settings are there, for their owner alone.
_IS_PRIVATE: Final = (
    "grep -q ANTHROPIC_BASE_URL claude.json; ls -l claude.json | grep -q '^-rw-------'"
)

#: What is added to a command so that it ends, or shows what it did.
ADDED: Final = {
    "(umask 077; .venv/bin/claudegw settings": "\n" + _IS_PRIVATE,
    "(umask 077; venv/bin/claudegw settings": "\n" + _IS_PRIVATE,
    "claude --settings": " -p hello",
    'eval "$(venv/bin/claudegw settings --shell': '\ntest "$ANTHROPIC_MODEL" = claudegw-main',
    ".venv/bin/pytest": " --collect-only -q tests/wire",
    "cp etc/gw.toml ~/claudegw/": "\ncmp etc/gw.toml ~/claudegw/gw.toml",
    "cd ~/claudegw": "\ntest -e gw.toml",
}


@attrs.frozen
class Stage:
    """
    A place where the commands can be typed.

    Attributes:
        folder: the copy of the repository, with a ``gw.toml`` of its own.
        home: the home of who types.
        ports: those that stand in the place of `PORTS`.
    """

    folder: Path
    home: Path
    ports: tuple[str, ...]

    @classmethod
    def made(cls, folder: Path, config: str) -> Stage:
        """A new one in an empty folder, with `config` wherever a configuration is named."""
        stage = cls(folder / "claudegw", folder / "home", tuple(str(free_port()) for _ in PORTS))
        (stage.folder / "etc").mkdir(parents=True)
        (stage.home / "claudegw").mkdir(parents=True)
        for name in ("Makefile", "gateway", "tests", "twisted"):
            (stage.folder / name).symlink_to(ROOT / name)
        for name in ("pyproject.toml", "setup.cfg"):
            shutil.copy(ROOT / name, stage.folder)
            os.utime(stage.folder / name, (0, 0))  # so that nothing is to be installed
        for name in (".venv", "venv"):
            (stage.folder / name).symlink_to(sys.prefix)
        (stage.folder / "etc/demo-template.jinja").symlink_to(ROOT / "etc/demo-template.jinja")
        for name in ("etc/demo.toml", "etc/gw.toml", "gw.toml"):
            (stage.folder / name).write_text(stage.here(config))
        shutil.copy(stage.folder / "gw.toml", stage.home / "claudegw")
        return stage

    def here(self, text: str) -> str:
        """What has to be typed here for what the documentation says."""
        for said, ours in zip(PORTS, self.ports, strict=True):
            text = re.sub(rf"\b{said}\b", ours, text)
        text = text.replace("/opt/claudegw/bin/", f"{sys.prefix}/bin/")
        text = text.replace("/etc/claudegw/", f"{self.folder}/")
        return text.replace("--config FILE", "--config gw.toml")

    @property
    def environment(self) -> dict[str, str]:
        """Made from nothing; only the environment that the pages install to is in the PATH."""
        pythonpath = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        path = f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        return {"HOME": str(self.home), "PATH": path, "LANG": "C.UTF-8", **pythonpath}

    def type(self, text: str, **environment: str) -> str:
        """Type a command, in the folder, that must succeed; returns what it printed."""
        done = subprocess.run(
            ["sh", "-eu", "-c", self.here(text)],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage.made(tmp_path_factory.mktemp("documented"), (ROOT / "etc/demo.toml").read_text())


@pytest.fixture(scope="module")
def running(stage: Stage) -> Iterator[Running]:
    """What ``make run`` starts: the gateway and both its models."""
    assert (stage.folder / ".venv/demo").exists(), "nothing to run is installed: make run"
    log = stage.folder / "make.log"
    command = ["make", "--no-print-directory", "run"]
    made = start(command, int(stage.ports[0]), log, cwd=stage.folder, env=stage.environment)
    try:
        made.wait("/healthz")
        assert eventually(lambda: both_are_up(made), LOADS)
        yield made
    finally:
        made.stop()


def both_are_up(gateway: Running) -> bool:
    """Whether both models answer."""
    return all(model["max_input_tokens"] for model in gateway.ask("/v1/models")[1]["data"])


def run_here(*but: str) -> list[Command]:
    """The commands that are typed, each once a page, in their order there."""
    first: dict[tuple[str, str], Command] = {}
    for command in commands():
        if row_of(command.text) in RUN:
            first.setdefault((command.sample.page, command.text), command)
    return [command for command in first.values() if not command.text.startswith(but)]


def of_row(*rows: str) -> list[Command]:
    return [command for command in run_here() if row_of(command.text) in rows]


@pytest.mark.server
def test_make_run(stage: Stage, running: Running) -> None:
    """It listens, and says the command that the documentation goes on with."""
    assert eventually(lambda: "type:\n" in running.log.read_text(), PATIENCE)
    # That a server is ready is logged by who started it, which may come to it last.
    before, _, after = running.log.read_text().partition("type:\n")
    assert RUN["make run"] in before
    said = next(it.text for it in commands() if row_of(it.text) == ".venv/bin/claudegw claude")
    whole = said.replace(".venv", sys.prefix).replace("etc/", f"{stage.folder}/etc/")
    assert after.splitlines()[0].strip() == whole


@pytest.mark.server
@pytest.mark.parametrize("command", run_here("make run", "claude --"), ids=str)
def test_a_command_works(command: Command, stage: Stage, running: Running) -> None:
    """It ends well, and prints what shows that it has worked."""
    row = row_of(command.text)
    said = stage.type(command.text + ADDED.get(row, ""))
    assert RUN[row] in said
    assert running.process.poll() is None


@pytest.mark.client
def test_claude_code_is_started(tmp_path: Path) -> None:
    """The newest client takes the settings as they are given to it, and gets the model's words."""
    path = f"{claude('newest').parent}:{program('node').parent}"
    nowhere = "http://127.0.0.1:9"
    quiet = {"DISABLE_TELEMETRY": "1", "DISABLE_ERROR_REPORTING": "1", "DISABLE_AUTOUPDATER": "1"}
    proxies = {"HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere, "NO_PROXY": "127.0.0.1"}
    with ScriptedLlama(lambda _: [Text("Said by main.")]).serving() as llama:
        config = (
            '[gateway]\nlisten = "tcp:9090:interface=127.0.0.1"\n'
            f'state_dir = "{tmp_path}/state"\n[tier.main]\nurl = "{llama.url}"\n'
        )
        stage = Stage.made(tmp_path, config)
        gateway = run_gateway(stage.folder, int(stage.ports[0]))
        try:
            for command in of_row(*(row for row in RUN if row.startswith(("(umask", "claude --")))):
                row = row_of(command.text)
                environment = {"PATH": f"{path}:{stage.environment['PATH']}", **quiet, **proxies}
                said = stage.type(command.text + ADDED[row], **environment)
                assert said == ("" if row.startswith("(") else "Said by main.\n")
        finally:
            assert gateway.stop() == 0


@pytest.mark.parametrize("goal", DRY)
def test_a_goal_of_make(goal: str) -> None:
    """Make knows how it would reach it."""
    program_, *rest = shlex.split(goal)
    done = subprocess.run(
        [program_, "--dry-run", *rest], cwd=ROOT, capture_output=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.server
@pytest.mark.parametrize(
    "sample", [sample for sample in blocks() if sample.language == "python"], ids=str
)
def test_a_program_runs(sample: Any, stage: Stage, running: Running) -> None:
    """A sample of Python runs to its end and prints what the model said."""
    program_ = stage.folder / "sample.py"
    program_.write_text(stage.here(sample.text))
    assert stage.type(f"{sys.executable} {program_}").strip()
    assert running.process.poll() is None


@pytest.mark.server
def test_the_count_that_is_shown(stage: Stage, running: Running) -> None:
    """The JSON beside ``count_tokens`` is what that command prints."""
    (command,) = of_row("curl http://127.0.0.1:9090/v1/messages/count_tokens")
    (shown,) = [sample for sample in blocks() if sample.language == "json"]
    assert shown.page == command.sample.page
    assert orjson.loads(stage.type(command.text)) == orjson.loads(shown.text)
    assert running.process.poll() is None
