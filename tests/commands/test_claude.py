"""Claude Code on the running gateway: what is decided, and what is done."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest

from gateway.commands import claude
from gateway.commands.claude import Source, found, session, split
from gateway.commands.running import NoGateway, Unusable
from gateway.commands.settings import Loading, settings
from gateway.config import parse
from gateway.policy.calls import KINDS

Json = Any

WINDOW = 131072
CONFIG = parse({"tier": {"main": {"url": "http://127.0.0.1:1"}}}, KINDS)
OURS = settings(CONFIG, {"main": WINDOW}, "claudegw statusline")


def started(
    *sources: Source,
    environ: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
    window: int = WINDOW,
) -> claude.Session:
    return session(OURS, window, sources, environ or {}, arguments)


def theirs(**env: str) -> Source:
    return Source("theirs", {"env": env})


# --- the arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "ours", "passed"),
    [
        ("claude", "claude", ""),
        ("claude -p hello", "claude", "-p hello"),
        ("claude --config x -p --config y", "claude --config x", "-p --config y"),
        ("claude --config=x --client y -c", "claude --config=x --client y", "-c"),
        ("claude --help", "claude --help", ""),
        ("claude -- --help", "claude", "--help"),
        ("claude -p -- --help", "claude", "-p -- --help"),
        ("claude --configs x", "claude", "--configs x"),
        ("claude --config", "claude --config", ""),
        ("status --config x -p", "status --config x -p", ""),
        ("", "", ""),
    ],
)
def test_its_own_arguments_come_first(given: str, ours: str, passed: str) -> None:
    """What comes from the first other one on is the client's, untouched."""
    assert split(given.split()) == (ours.split(), passed.split())


# --- what is decided ------------------------------------------------------------------------------


def test_a_user_who_has_set_nothing() -> None:
    """The client gets our settings as they are, in its environment as well, and nothing is said."""
    start = started(environ={"HOME": "/home/ada"})
    assert start.settings == OURS
    assert start.environ == {"HOME": "/home/ada", **OURS["env"]}
    assert start.said == []


def test_what_is_harmless_is_left_alone() -> None:
    """Settings of the user's that ours outrank, or that do no harm, are no reason for a word."""
    source = theirs(ANTHROPIC_BASE_URL="https://elsewhere", DISABLE_TELEMETRY="1")
    start = started(source, environ={"ANTHROPIC_BASE_URL": "https://elsewhere", "EDITOR": "ed"})
    assert start.said == []
    assert start.settings == OURS
    assert start.environ == {"EDITOR": "ed", **OURS["env"]}


def test_a_hostile_environment() -> None:
    """What would lead elsewhere is taken out of the client's environment, in one sentence."""
    environ = {"ANTHROPIC_API_KEY": "k", "DISABLE_COMPACT": "1", "CLAUDE_CODE_USE_VERTEX": ""}
    start = started(environ=environ)
    assert start.environ == OURS["env"]
    (said,) = start.said
    names = "ANTHROPIC_API_KEY and DISABLE_COMPACT"
    assert said.startswith(f"In this session {names} from the environment are overridden,")
    assert start.settings == OURS


def test_hostile_settings() -> None:
    """What files of the user's set beside ours is overridden in ours, and the files are named."""
    bedrock = {"env": {"CLAUDE_CODE_USE_BEDROCK": "1"}}
    start = started(Source("this", bedrock), Source("that", bedrock), Source("other", {}))
    assert start.settings["env"] == {**OURS["env"], "CLAUDE_CODE_USE_BEDROCK": ""}
    assert start.environ == OURS["env"]
    (said,) = start.said
    assert "CLAUDE_CODE_USE_BEDROCK from this and that is overridden" in said


def test_what_nothing_overrides() -> None:
    """It is said where it is, and ours does not set it either: any value counts."""
    start = started(theirs(DISABLE_COMPACT="0"))
    assert start.settings == OURS
    (said,) = start.said
    assert said.startswith("theirs sets DISABLE_COMPACT, which nothing overrides")


def test_a_list_of_models() -> None:
    """Where the user has a list of models, ours stand in it; else there is none."""
    start = started(Source("theirs", {"availableModels": ["sonnet"]}))
    assert start.settings["availableModels"] == ["claudegw-main"]
    assert start.said == []
    assert "availableModels" not in started().settings


def test_an_organization_outranks_us() -> None:
    """What nobody but an organization can change is said, and by whom it can be."""
    env = {
        "ANTHROPIC_BASE_URL": "https://elsewhere",
        "ENABLE_TOOL_SEARCH": "false",
        "CLAUDE_CODE_USE_BEDROCK": "1",
    }
    keys = {"availableModels": ["sonnet"], "autoCompactEnabled": False, "model": "opus"}
    start = started(Source("managed", {"env": env, **keys}, managed=True))
    assert start.settings["env"] == OURS["env"]
    (said,) = start.said
    names = "ANTHROPIC_BASE_URL, CLAUDE_CODE_USE_BEDROCK, availableModels and autoCompactEnabled"
    assert said.startswith(f"managed sets {names}, which outranks")
    assert started(Source("managed", {"autoCompactEnabled": True}, managed=True)).said == []


@pytest.mark.parametrize(
    ("window", "fits"), [(32768, False), (40000, False), (49152, True), (65536, True)]
)
def test_a_window_that_is_too_small(window: int, fits: bool) -> None:
    """Where the client's own prompt is longer than what it compacts at, the remedy is said."""
    said = started(window=window).said
    assert bool(said) is not fits
    assert all(str(window) in each and "--ctx-size" in each for each in said)


def test_a_proxy_is_gone_around() -> None:
    """Calls to this machine go past a proxy, whoever set it, and so does what did before."""
    start = started(theirs(NO_PROXY="intern"), environ={"https_proxy": "http://proxy"})
    (said,) = start.said
    assert said.startswith("https_proxy would send")
    for name in ("NO_PROXY", "no_proxy"):
        assert start.settings["env"][name] == start.environ[name] == "intern,127.0.0.1"
    assert started(theirs(HTTP_PROXY="http://proxy")).environ["NO_PROXY"] == "127.0.0.1"


def test_a_proxy_and_a_url_without_a_port() -> None:
    """The host is what stands in the URL, and numbers in the user's settings are words."""
    ours = {**OURS, "env": {**OURS["env"], "ANTHROPIC_BASE_URL": "http://gateway"}}
    theirs = Source("theirs", {"env": {"NO_PROXY": 1, "HTTPS_PROXY": "x"}})
    start = session(ours, WINDOW, [theirs], {}, [])
    assert start.environ["NO_PROXY"] == "1,gateway"


@pytest.mark.parametrize("direct", ["localhost, 127.0.0.1", "*"])
def test_a_proxy_that_is_gone_around_already(direct: str) -> None:
    """There is nothing to do and nothing to say."""
    start = started(environ={"HTTP_PROXY": "http://proxy", "no_proxy": direct})
    assert start.said == []
    assert start.environ["no_proxy"] == direct


def test_a_status_line_of_the_users_own() -> None:
    """It stays."""
    own = Source("theirs", {"statusLine": {"type": "command", "command": "date"}})
    assert "statusLine" not in started(own).settings
    assert started().settings["statusLine"]["command"] == "claudegw statusline"


def test_settings_of_the_users_on_the_command_line() -> None:
    """A second --settings stands in place of ours."""
    for arguments in (["--settings", "x"], ["--settings={}"]):
        (said,) = started(arguments=arguments).said
        assert "--settings" in said


def test_bare_takes_no_token() -> None:
    """With --bare the client shows a key, and takes one from its environment only."""
    start = started(environ={"ANTHROPIC_API_KEY": "theirs"}, arguments=["--bare"])
    assert start.environ["ANTHROPIC_API_KEY"] == "none"


# --- what is done ---------------------------------------------------------------------------------


def written(path: Path, value: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def test_the_files_that_are_read(tmp_path: Path) -> None:
    """The user's, the project's, and an organization's, those that outrank others last."""
    home, folder, managed = tmp_path / "home", tmp_path / "project", tmp_path / "etc"
    written(home / ".claude/settings.json", {"env": {"A": "1"}})
    written(folder / ".claude/settings.json", "no json")
    written(folder / ".claude/settings.local.json", {"model": "opus"})
    written(managed / "managed-settings.json", {"env": []})
    written(managed / "managed-settings.d/10.json", {"env": {"B": 2}})
    written(managed / "managed-settings.d/20.json", "[" * 100_000)
    sources = list(found(home, folder, {}, managed))
    assert [(source.name, source.env, source.managed) for source in sources] == [
        ("~/.claude/settings.json", {"A": "1"}, False),
        (str(folder / ".claude/settings.local.json"), {}, False),
        (str(managed / "managed-settings.json"), {}, True),
        (str(managed / "managed-settings.d/10.json"), {"B": "2"}, True),
    ]


def test_the_users_settings_may_lie_elsewhere(tmp_path: Path) -> None:
    """CLAUDE_CONFIG_DIR takes the place of ~/.claude."""
    written(tmp_path / "home/.claude/settings.json", {})
    written(tmp_path / "conf/settings.json", {"env": {"A": "1"}})
    environ = {"CLAUDE_CONFIG_DIR": str(tmp_path / "conf")}
    (source,) = found(tmp_path / "home", tmp_path, environ, None)
    assert source.name == str(tmp_path / "conf/settings.json")


def test_a_folder_in_ones_home_is_read_once(tmp_path: Path) -> None:
    """Where the project is the home itself, one file is both."""
    written(tmp_path / ".claude/settings.json", {})
    assert len(list(found(tmp_path, tmp_path, {}, None))) == 1


def test_the_program_is_found(tmp_path: Path) -> None:
    """As named, as CLAUDE names it, or on the PATH; else a sentence says what to do."""
    for name in ("claude", "other"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": str(tmp_path)}
    assert claude.find(None, environ) == str(tmp_path / "claude")
    assert claude.find(None, {**environ, "CLAUDE": str(tmp_path / "other")}).endswith("other")
    assert claude.find("other", {**environ, "CLAUDE": "x"}) == str(tmp_path / "other")
    with pytest.raises(Unusable, match="no program claude: install"):
        claude.find(None, {"PATH": "/nowhere"})


@attrs.define(eq=False)
class House:
    """
    A user's machine.

    Attributes:
        config: of the gateway.
        main: what main's window is at each look; the exception that is raised instead.
        process: what the status says of main's process.
        error: what it says of main's last error.
        is_up: whether a gateway listens.
        ran: what was executed.
    """

    config: Any
    main: list[int | Exception] = attrs.field(factory=lambda: [WINDOW])
    process: Json = None
    error: Json = None
    is_up: bool = True
    ran: list[Any] = attrs.field(factory=list)
    now: float = 0.0

    def ask(self, _: Any, path: str) -> Json:
        if not self.is_up:
            raise NoGateway("none")
        main = {"process": self.process, "error": self.error}
        return {"tiers": {"main": main}} if path == "/status" else {}

    def windows(self, _: Any) -> dict[str, int]:
        found = self.main[0] if len(self.main) == 1 else self.main.pop(0)
        if isinstance(found, Exception):
            raise found
        return {"main": found}

    def execve(self, *what: Any) -> None:
        self.ran.append(what)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def run(self, *arguments: str) -> None:
        claude.run(self.config, Path("gw.toml"), arguments, "claude")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    """One where all is well, and nobody sits at a terminal."""
    program = tmp_path / "bin/claude"
    written(program, "#!/bin/sh\n")
    program.chmod(0o755)
    gateway = {"state_dir": str(tmp_path / "state")}
    house = House(parse({"gateway": gateway, "tier": {"main": {"url": "http://h:1"}}}, KINDS))
    for name in [*os.environ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claude, "MANAGED", {})
    monkeypatch.setattr(claude, "ask", house.ask)
    monkeypatch.setattr(claude, "windows", house.windows)
    monkeypatch.setattr("gateway.commands.claude.os.execve", house.execve)
    monkeypatch.setattr("gateway.commands.claude.time.sleep", house.sleep)
    monkeypatch.setattr("gateway.commands.claude.time.monotonic", lambda: house.now)
    return house


def test_the_client_is_executed(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the arguments as they are, and our settings in a file for its user's eyes only."""
    house.run("-p", "hello there")
    ((program, command, environ),) = house.ran
    file = tmp_path / "state/claude-code.json"
    assert program == str(tmp_path / "bin/claude")
    assert command == [program, "--settings", str(file), "-p", "hello there"]
    written = json.loads(file.read_bytes())
    assert written["env"]["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == str(WINDOW)
    assert written["statusLine"]["command"].endswith(f"statusline --config {tmp_path}/gw.toml")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    assert environ["ANTHROPIC_MODEL"] == "claudegw-main"
    assert capsys.readouterr() == ("", "")


def test_a_gateway_that_cannot_be_started_here(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state folder is somebody else's: that is said, and nothing more."""

    def up(*_: object) -> None:
        raise PermissionError(1, "it belongs to another user", "/var/lib/claudegw")

    monkeypatch.setattr(claude, "up", up)
    with pytest.raises(Unusable, match="/var/lib/claudegw: it belongs to another user"):
        house.run()


@pytest.mark.usefixtures("house")
def test_the_folder_of_a_service_is_left_alone(tmp_path: Path) -> None:
    """Who may read its configuration, and is somebody else, has the file in a folder of theirs."""
    state = tmp_path / "state"
    assert claude.folder_for(state, os.geteuid()) == state  # it will be made
    state.mkdir()
    assert claude.folder_for(state, os.geteuid()) == state
    theirs = tmp_path / "home/.local/share/claudegw"
    assert claude.folder_for(state, os.geteuid() + 1) == theirs


def test_nothing_of_the_users_is_changed(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hostile settings are overridden and told, and stay in their file as they were."""
    users = tmp_path / "home/.claude/settings.json"
    written(users, {"env": {"CLAUDE_CODE_USE_BEDROCK": "1"}})
    before = users.read_bytes()
    house.run()
    assert capsys.readouterr().err.startswith(
        "claudegw: In this session CLAUDE_CODE_USE_BEDROCK from ~/.claude/"
    )
    assert users.read_bytes() == before
    assert [each.name for each in users.parent.iterdir()] == ["settings.json"]


def test_without_a_gateway_and_a_terminal(house: House, tmp_path: Path) -> None:
    """The command that starts one is said, and nothing is run."""
    house.is_up = False
    with pytest.raises(Unusable, match=rf"twistd --pidfile=\S+ .* --config {tmp_path}/gw.toml$"):
        house.run()
    assert house.ran == []


def test_a_state_folder_that_cannot_be_written(house: House, tmp_path: Path) -> None:
    """The reason is one sentence, and nothing is run."""
    (tmp_path / "state").write_text("a file in the folder's place")
    with pytest.raises(Unusable, match="state"):
        house.run()
    assert house.ran == []


def test_a_model_that_loads_is_waited_for(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    """And that is said, once."""
    house.main, house.process = [Loading(), Loading(), WINDOW], {"state": "loading"}
    house.run()
    assert len(house.ran) == 1
    assert capsys.readouterr().err == "claudegw: the main model is loading, 0 s\n"


@pytest.mark.parametrize(
    ("process", "said", "waited"),
    [
        ({"state": "failed", "reason": "no such file"}, r"failed \(no such file\)", 0),
        ({"state": "loading", "reason": None}, "is loading:", 900),
        (None, "is down:", 900),
    ],
)
def test_a_model_that_does_not_come_up(
    process: Json, said: str, waited: float, house: House
) -> None:
    """The wait has an end, at once where there is nothing to wait for."""
    house.main, house.process = [Loading()], process
    with pytest.raises(Unusable, match=said):
        house.run()
    assert house.ran == []
    assert waited <= house.now <= waited + 1


@pytest.mark.parametrize("process", [None, {"state": "ready", "reason": None}])
def test_a_model_that_refuses(process: Json, house: House) -> None:
    """Why it does is said, at once: waiting would not change it."""
    house.main, house.process = [Loading()], process
    house.error = {"message": "It refuses the gateway's key (401).", "passes": False}
    with pytest.raises(Unusable, match=r"\(It refuses the gateway's key \(401\)\): claudegw doc"):
        house.run()
    assert house.now == 0
    assert house.ran == []


def test_a_server_elsewhere_that_is_down(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    """What is known of it is said, and it is waited for."""
    house.main, house.error = (
        [Loading(), WINDOW],
        {"message": "Nobody\x1b answers.", "passes": True},
    )
    house.run()
    assert len(house.ran) == 1
    said = "claudegw: Nobody? answers.\nclaudegw: the main model is down, 0 s\n"
    assert capsys.readouterr().err == said
    house.main, house.ran = [Loading()], []
    with pytest.raises(Unusable, match=r"down \(Nobody\? answers\): claudegw doctor"):
        house.run()


def test_an_impatient_user(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption is a sentence, and nothing is run."""

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gateway.commands.claude.time.sleep", interrupt)
    house.main = [Loading()]
    with pytest.raises(Unusable, match="Interrupted"):
        house.run()


# --- at a terminal --------------------------------------------------------------------------------


@attrs.frozen
class Terminal:
    """A standard input or error that is a terminal, on which its user types `typed`."""

    typed: str = ""
    shown: list[str] = attrs.field(factory=list)

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self.typed

    def write(self, text: str) -> None:
        self.shown.append(text)

    def flush(self) -> None: ...


def at_a_terminal(
    house: House,
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
    status: int = 0,
    listens: bool = True,
) -> Terminal:
    """What the user sees who types this; what is started then ends with `status`, and `listens`."""
    house.is_up, terminal = False, Terminal()

    def run(command: Sequence[str], **_: Any) -> Any:
        house.ran.append(command)
        house.is_up = listens
        return subprocess.CompletedProcess(command, status, b"", b"no such plugin")

    monkeypatch.setattr("sys.stdin", Terminal(typed))
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("gateway.commands.claude.subprocess.run", run)
    return terminal


@pytest.mark.parametrize("typed", ["\n", "y\n", "Yes\n"])
def test_a_gateway_is_started(
    typed: str, house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If the user wants that, as a daemon of the same configuration; then it is waited for."""
    terminal = at_a_terminal(house, monkeypatch, typed)
    house.main, house.process = [Loading(), WINDOW], {"state": "loading"}
    house.run()
    command, (program, *_) = house.ran
    assert [Path(command[0]).name, *command[-3:]] == [
        "twistd",
        "claudegw",
        "--config",
        str(tmp_path / "gw.toml"),
    ]
    assert "-n" not in command
    assert program.endswith("claude")
    assert "Start it now?" in "".join(terminal.shown)
    assert "the main model is loading, 0 s\n" in "".join(terminal.shown)


def test_a_gateway_that_is_not_wanted(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is said, and nothing is run."""
    at_a_terminal(house, monkeypatch, "n\n")
    with pytest.raises(Unusable, match=r"Start it first: .*twistd"):
        house.run()
    assert house.ran == []


def test_a_gateway_that_does_not_start(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said is said, with the place of its log."""
    at_a_terminal(house, monkeypatch, "\n", status=1)
    with pytest.raises(Unusable, match=r"state/claudegw\.log .*no such plugin"):
        house.run()
    assert len(house.ran) == 1


def test_a_gateway_that_does_not_listen(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for without end."""
    at_a_terminal(house, monkeypatch, "\n", listens=False)
    with pytest.raises(Unusable, match="does not listen"):
        house.run()
    assert 60 <= house.now <= 61
