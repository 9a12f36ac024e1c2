"""Broken set-ups: each is found and named, and its remedy, followed, mends it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from gateway.commands.doctor import facts
from gateway.commands.doctor.checks import would_work
from gateway.commands.doctor.finding import Finding
from gateway.commands.doctor.machine import Listener, Reply
from gateway.config import load
from gateway.policy.calls import KINDS
from tests.commands.doctor.world import GATEWAY, MAIN, VERSION, World, follow, gguf_file, look, of

OTHER = Listener("python3", 4711, ("python3", "-m", "http.server"))


@attrs.frozen
class Setup:
    """
    A set-up that is broken in one way.

    Attributes:
        breaks: makes it so.
        check: who finds it.
        status: how bad it is.
        found, remedy: words of the finding.
        mend: does what a remedy says that is no command or change; None for one that is.
    """

    breaks: Callable[[World], object]
    check: str
    status: str
    found: str
    remedy: str
    mend: Callable[[World], object] | None = None


def _env(world: World, **env: str) -> None:
    path = world.home / ".claude/settings.json"
    said = json.loads(path.read_text())
    said["env"].update(env)
    path.write_text(json.dumps(said))


def _command(world: World, *words: str) -> None:
    world.config["tier.main.server"]["command"] += words


def _size(world: World, size: str) -> None:
    world.config["tier.main.server"]["command"][-1] = size


def _cut(world: World) -> None:
    path = world.at / "model.gguf"
    path.write_bytes(path.read_bytes()[:-100])


def _window(world: World) -> None:
    gguf_file(world.at / "model.gguf", attention__sliding_window=512)


def _open_token(world: World) -> None:
    world.config["gateway"]["token"] = world.token = "secret"
    world.write()
    world.path.chmod(0o644)


def _down(world: World) -> None:
    world.unsupervised("--ctx-size", "65536")
    world.server = False


def _three_calls(world: World) -> None:
    world.unsupervised("--ctx-size", "65536")
    world.config["tier.main"]["slots"] = 3


def _no_folder(world: World) -> None:
    (world.at / "file").write_text("")
    world.config["gateway"]["state_dir"] = str(world.at / "file")


def _of_another_user(world: World) -> None:
    world.user += 1
    world.running = False


def _elsewhere(world: World, **gateway: str) -> None:
    listen = f"tcp:{GATEWAY}:interface=192.0.2.1"
    world.config["gateway"].update(listen=listen, token="secret", **gateway)
    world.token, world.addresses = "secret", {"127.0.0.1"}


def _itself(world: World) -> None:
    world.unsupervised("--ctx-size", "65536")
    world.config["tier.main"]["url"] = f"http://127.0.0.1:{GATEWAY}"


def _starting(world: World) -> None:
    world.programs.discard("llama-server")  # nothing listens yet
    world.tier["process"] = {"state": "starting"}


def _started(world: World) -> None:
    world.programs.add("llama-server")
    world.tier.clear()


def _trained_short(world: World) -> None:
    _size(world, "8192")
    gguf_file(world.at / "model.gguf", context_length=8192)


def _another_model(world: World) -> None:
    _size(world, "65536")
    gguf_file(world.at / "model.gguf")


SETUPS = {
    "a file in the place of the state folder": Setup(
        _no_folder, "state", "problem", "is no folder", "mv "
    ),
    "a gateway with other tiers": Setup(
        lambda world: world.tier.update(url="http://127.0.0.1:1"),
        "gateway",
        "warning",
        "has other tiers than",
        "Restart the gateway with this configuration",
        lambda world: world.tier.clear(),
    ),
    "an address of another machine": Setup(
        _elsewhere,
        "gateway",
        "problem",
        "192.0.2.1 is no address of this machine",
        'listen = "tcp:40000:interface=127.0.0.1"',
    ),
    "an address of another machine, behind a proxy": Setup(
        lambda world: _elsewhere(world, url="http://proxy.example:80"),
        "gateway",
        "problem",
        "192.0.2.1 is no address of this machine",
        'listen = "tcp:40000:interface=127.0.0.1"',
        lambda world: world.config["gateway"].update(
            listen=f"tcp:{GATEWAY}:interface=127.0.0.1", url=f"http://127.0.0.1:{GATEWAY}"
        ),
    ),
    "a gateway of another version": Setup(
        lambda world: setattr(world, "release", "0.0.1"),
        "gateway",
        "warning",
        f"claudegw 0.0.1 runs at http://127.0.0.1:{GATEWAY}, and {VERSION} is installed",
        "Stop it and start it again: `twistd -n claudegw",
    ),
    "a tier that is the gateway itself": Setup(
        _itself,
        "main.server",
        "problem",
        "is the gateway itself",
        'url = "http://127.0.0.1:40000"',
    ),
    "a server that is starting": Setup(
        _starting, "main.server", "warning", "is starting", "Wait", _started
    ),
    "a model that was trained with less": Setup(
        _trained_short,
        "main.window",
        "problem",
        "8192 tokens a slot",
        "this one was with 8192",
        _another_model,
    ),
    "a similarity that takes slots over": Setup(
        lambda world: _command(world, "--slot-prompt-similarity", "0.5"),
        "main.flags",
        "warning",
        "--slot-prompt-similarity is 0.5",
        "`--slot-prompt-similarity 0`",
    ),
    "no room for conversations that wait": Setup(
        lambda world: _command(world, "--cache-ram", "0"),
        "main.flags",
        "warning",
        "--cache-ram is 0",
        "`--cache-ram 8192`",
    ),
    "a server that falls asleep": Setup(
        lambda world: _command(world, "--sleep-idle-seconds", "600"),
        "main.flags",
        "warning",
        "unloads the model",
        "`--sleep-idle-seconds -1`",
    ),
    "a route that takes a tier's calls": Setup(
        lambda world: setattr(world, "went", "small"),
        "main.round-trip",
        "warning",
        "went to small instead",
        "the [[route]]",
        lambda world: setattr(world, "went", "main"),
    ),
    "a key with a typing error": Setup(
        lambda world: world.config["gateway"].update(graze=3),
        "config",
        "problem",
        "gateway: unknown key: graze",
        "Remove that key in",
        lambda world: world.config["gateway"].pop("graze"),
    ),
    "a value of another kind": Setup(
        lambda world: world.config["tier.main"].update(slots="two"),
        "config",
        "problem",
        "tier.main.slots: expected an integer",
        "Correct tier.main.slots in",
        lambda world: world.config["tier.main"].update(slots=1),
    ),
    "a token that everybody can read": Setup(
        _open_token, "token", "warning", "mode 0644", "chmod 600"
    ),
    "a state folder that all can look into": Setup(
        lambda world: (world.at / "state").chmod(0o755), "state", "warning", "0755", "chmod 700"
    ),
    "a state folder of another user": Setup(
        _of_another_user,
        "state",
        "problem",
        "belongs to another user",
        "Start it as that user",
        lambda world: setattr(world, "running", True),
    ),
    "a folder for slots that cannot be written to": Setup(
        lambda world: (world.at / "state/slots").chmod(0o500),
        "state",
        "warning",
        "cannot be written to",
        "chmod 700",
    ),
    "a disk that is too small for the snapshots": Setup(
        lambda world: setattr(world, "room", 3 * 1024**3),
        "disk",
        "warning",
        "3072 MiB are free, and saved slots may take 32768 MiB",
        "snapshot_budget = 2048",
    ),
    "no gateway": Setup(
        lambda world: setattr(world, "running", False),
        "gateway",
        "problem",
        "nobody listens at http://127.0.0.1:9090",
        "twistd -n claudegw",
    ),
    "a port of the gateway that is taken": Setup(
        lambda world: world.others.update({GATEWAY: OTHER}),
        "gateway",
        "problem",
        "taken by python3 (process 4711), which is no claudegw",
        'listen = "tcp:40000:interface=127.0.0.1"',
    ),
    "an endpoint that no client can use": Setup(
        lambda world: world.config["gateway"].update(listen="unix:/run/gw.sock:1"),
        "gateway",
        "problem",
        "needs a TCP port",
        'listen = "tcp:40000:interface=127.0.0.1"',
    ),
    "another token than the running gateway's": Setup(
        lambda world: setattr(world, "token", "other"),
        "gateway",
        "problem",
        "wants another token",
        "Restart the gateway with this configuration",
        lambda world: setattr(world, "token", None),
    ),
    "a beginning after the client's patience": Setup(
        lambda world: world.config["gateway"].update(start_after=585.0),
        "clocks",
        "warning",
        "after 585 s, and Claude Code gives up at 600 s",
        "start_after = 500",
    ),
    "no patience with a server that loads": Setup(
        lambda world: world.config["tier.main"].update(startup_patience=0.0),
        "clocks",
        "warning",
        "tier main waits 0 s",
        "startup_patience = 900",
    ),
    "systemd that is not told of the end": Setup(
        lambda world: world.unit.write_text("[Service]\nType=simple\n"),
        "grace",
        "warning",
        "may need 100 s to stop",
        "etc/systemd/claudegw.service",
        lambda world: world.unit.write_text("[Service]\nType=notify\nTimeoutStopSec=120\n"),
    ),
    "no client": Setup(
        lambda world: world.programs.discard("claude"),
        "client",
        "warning",
        "not on the PATH",
        "npm install",
    ),
    "a client of long ago": Setup(
        lambda world: setattr(world, "client", "2.0.5 (Claude Code)"),
        "client",
        "warning",
        "2.0.5 (Claude Code) is too old",
        "claude update",
    ),
    "a client that asks somebody else": Setup(
        lambda world: _env(world, ANTHROPIC_BASE_URL="http://127.0.0.1:3456"),
        "settings",
        "warning",
        "would ask http://127.0.0.1:3456, not this gateway",
        "claudegw settings --config",
        lambda world: _env(world, ANTHROPIC_BASE_URL="http://127.0.0.1:9090"),
    ),
    "a client that takes the window for larger": Setup(
        lambda world: _env(world, CLAUDE_CODE_MAX_CONTEXT_TOKENS="200000"),
        "settings",
        "problem",
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS is 200000",
        "`65536` under env in",
    ),
    "a client that never compacts": Setup(
        lambda world: _env(world, DISABLE_COMPACT="1"),
        "settings",
        "problem",
        "a conversation ends when the window is full",
        "Remove `DISABLE_COMPACT`",
    ),
    "a client in a hurry": Setup(
        lambda world: _env(world, API_TIMEOUT_MS="60000"),
        "settings",
        "warning",
        "API_TIMEOUT_MS is 60000",
        "`3600000` under env in",
    ),
    "a server's port that is taken": Setup(
        lambda world: world.others.update({MAIN: OTHER}),
        "main.server",
        "problem",
        "taken by python3 (process 4711), which is no llama-server",
        'url = "http://127.0.0.1:40000"',
    ),
    "a server that nobody starts": Setup(
        _down,
        "main.server",
        "problem",
        "no server answers at http://127.0.0.1:8080",
        "llama-server --model FILE --port 8080",
    ),
    "a program that is not there": Setup(
        lambda world: world.programs.discard("llama-server"),
        "main.program",
        "problem",
        "no program llama-server on the PATH",
        "Install it",
        lambda world: world.programs.add("llama-server"),
    ),
    "a model that is not there": Setup(
        lambda world: (world.at / "model.gguf").unlink(),
        "main.model",
        "problem",
        "no such file",
        "Get the file once more",
        lambda world: gguf_file(world.at / "model.gguf"),
    ),
    "a model that is cut off": Setup(
        _cut,
        "main.model",
        "problem",
        "it is cut off",
        "Get the file once more, whole",
        lambda world: gguf_file(world.at / "model.gguf"),
    ),
    "a window that is too small": Setup(
        lambda world: _size(world, "8192"),
        "main.window",
        "problem",
        "8192 tokens a slot; Claude Code's own prompt has 24000",
        "--ctx-size 65536",
    ),
    "a window with no room for a conversation": Setup(
        lambda world: _size(world, "32768"),
        "main.window",
        "warning",
        "compacts a conversation at 14826",
        "--ctx-size 65536",
    ),
    "a second slot that nobody uses": Setup(
        lambda world: _command(world, "--parallel", "2", "--ctx-size", "131072"),
        "main.slots",
        "warning",
        "2 slots and gets 1 calls at once",
        "--parallel 1",
    ),
    "fewer slots than calls": Setup(
        _three_calls,
        "main.slots",
        "warning",
        "3 calls are sent at once, and the server has 1 slots",
        "slots = 1",
    ),
    "a template without tools": Setup(
        lambda world: setattr(world, "tools", False),
        "main.template",
        "problem",
        "does not take tools",
        "--chat-template-file FILE",
    ),
    "a template that refuses system messages": Setup(
        lambda world: setattr(world, "system", False),
        "main.template",
        "problem",
        "does not take system messages",
        "--chat-template-file FILE",
    ),
    "a model with a sliding window": Setup(
        _window,
        "main.kv",
        "warning",
        "sliding-window: a state that was kept serves only a prompt that goes on exactly",
        "use a model that keeps every token",
        lambda world: gguf_file(world.at / "model.gguf"),
    ),
    "flags that nobody gives": Setup(
        lambda world: world.config["tier.main.server"].update(manage_flags=False),
        "main.flags",
        "warning",
        "the server has no --slot-prompt-similarity: a subagent takes the main conversation's slot",
        "manage_flags = true",
    ),
    "a server that counts wrongly": Setup(
        lambda world: setattr(world, "miscounts", 5),
        "main.round-trip",
        "problem",
        "17 tokens were counted, and the call used 12",
        "Use a llama-server of build 11434 or newer",
        lambda world: setattr(world, "miscounts", 0),
    ),
}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.built(tmp_path)


def test_nothing_is_wrong_where_nothing_is(world: World) -> None:
    """On a machine on which all is well nothing else is said."""
    found = look(world)
    assert {each.status for each in found} == {"ok"}, found
    assert not any(each.remedy for each in found)


@pytest.mark.parametrize("name", SETUPS)
def test_a_broken_setup(world: World, name: str) -> None:
    """It is found by its check, and what the remedy says makes the finding go."""
    setup = SETUPS[name]
    setup.breaks(world)
    before = look(world)
    found = of(before, setup.check)
    assert found, before
    assert setup.found in found[0].found
    assert setup.remedy in found[0].remedy
    assert found[0].status == setup.status
    assert would_work(before) is not any(each.status == "problem" for each in before)
    assert setup.status != "problem" or not would_work(before)
    if setup.mend is not None:
        setup.mend(world)
    else:
        follow(found[0].remedy, world)
    assert not of(look(world), setup.check)


def test_a_configuration_that_is_not_there(world: World) -> None:
    """The remedy copies the one that explains itself, and that one has no mistake."""
    world.config = {}
    [found] = of(look(world), "config")
    assert (found.status, "is not there" in found.found) == ("problem", True)
    assert not would_work([found])
    follow(found.remedy, world)
    assert load(world.path, KINDS).tier["main"].slots == 1


def test_a_service_reads_its_configuration_as_its_group(world: World) -> None:
    """That it can is no fault; that all can is one."""
    world.config["gateway"]["token"] = world.token = "secret"
    world.write()
    world.path.chmod(0o640)
    assert of(look(world), "token")
    world.unit.write_text("[Service]\nType=notify\nTimeoutStopSec=1h\n")
    assert not of(look(world), "token")
    world.path.chmod(0o644)
    (found,) = of(look(world), "token")
    assert "chmod 640" in found.remedy
    follow(found.remedy, world)
    assert not of(look(world), "token")


def test_an_organizations_settings_are_looked_at(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that lie in a folder of their own."""
    managed = world.at / "etc"
    (managed / "managed-settings.d").mkdir(parents=True)
    settings = json.dumps({"env": {"ANTHROPIC_BASE_URL": "https://proxy.example"}})
    (managed / "managed-settings.d/10.json").write_text(settings)
    monkeypatch.setattr(facts, "MANAGED", {sys.platform: managed})
    (found,) = of(look(world), "settings")
    assert found.status == "problem"
    assert str(managed / "managed-settings.d/10.json") in found.remedy


def test_settings_nested_without_end(world: World) -> None:
    """They are none that the client could use, and the rest is looked at."""
    (world.home / ".claude/settings.json").write_text("[" * 100_000)
    assert {each.check for each in look(world) if each.status != "ok"} == {"settings"}


def test_every_mistake_is_told(world: World) -> None:
    """Each mistake of a configuration is found, and what needs none is looked at."""
    world.config["gateway"].update(graze=3, grace="long")
    found = look(world)
    assert len(of(found, "config")) == 2
    assert [each.check for each in found if each.status == "skipped"] == ["gateway"]
    assert any(each.check == "client" for each in found)


def test_without_the_gateway_servers_are_asked_directly(world: World) -> None:
    """What a server says of itself is judged while the gateway is down."""
    world.unsupervised("--ctx-size", "8192")
    world.running = False
    found = look(world)
    assert of(found, "main.window")[0].status == "problem"
    assert of(found, "main.round-trip")[0].status == "skipped"


@pytest.mark.parametrize("kept", ["api_key", "api_key_env"])
def test_a_server_is_shown_its_key(
    kept: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is kept; where it is another one, the remedy says where it goes."""
    world.key = "secret"
    for said in ("wrong", "secret"):
        monkeypatch.setenv("MODEL_KEY", said)
        world.config["tier.main"][kept] = said if kept == "api_key" else "MODEL_KEY"
        found = of(look(world), "main.server")
        assert [each.found.endswith("wants another key") for each in found] == (
            [True] if said == "wrong" else []
        ), found
        place = "`api_key` in [tier.main]" if kept == "api_key" else "`MODEL_KEY` in the envir"
        assert all(place in each.remedy for each in found)
    assert {each.status for each in look(world)} == {"ok"}


def test_a_tier_at_work_gets_no_work(world: World) -> None:
    """While a call is under way no other is sent behind it."""
    world.says["/status"] = Reply(200, {"version": VERSION, "tiers": {"main": {"running": 1}}})
    [found] = of(look(world), "main.round-trip")
    assert (found.status, "at work" in found.found) == ("skipped", True)


def test_advice_of_the_gateway_is_passed_on(world: World) -> None:
    """What /status advises is said in its own words."""
    cache = {"cache": {"advice": ["It lost prompts."]}}
    world.says["/status"] = Reply(200, {"version": VERSION, "tiers": {"main": cache}})
    assert of(look(world), "main.flags")[0].found == "It lost prompts."


def test_a_round_trip_that_fails(world: World) -> None:
    """What the gateway says of a call that failed is said, and no further call is made."""
    world.says["/v1/messages"] = Reply(503, {"error": {"message": "It is down."}})
    found: list[Finding] = of(look(world), "main.round-trip")
    assert [(each.status, each.found) for each in found] == [("problem", "text: It is down.")]


def test_a_model_that_calls_no_tool(world: World) -> None:
    """Whether it calls one is the model's to choose: it is said, and keeps nobody from working."""
    world.says["/v1/messages"] = Reply(200, {"content": [{"type": "text", "text": "No."}]})
    found = of(look(world), "main.round-trip")
    said = {each.found.partition(":")[0]: each.status for each in found}
    assert said == {"count": "problem", "tool": "warning", "schema": "problem"}


@pytest.mark.parametrize("given", [{}, {"deep": "yes"}, None, "{}"])
def test_a_tool_that_is_called_wrongly(world: World, given: object) -> None:
    """A call without the arguments that the tool needs is none that can be run."""
    world.gives = given
    [found] = of(look(world), "main.round-trip")
    assert (found.status, found.remedy[:25]) == ("warning", "Use a model that was trai")
    assert found.found == "tool: the model called a tool without the arguments that it needs"


def test_a_server_of_somebody_else_needs_no_folder_for_slots(world: World) -> None:
    """A flag that would not be used is not asked for."""
    world.unsupervised("--ctx-size", "65536")
    assert not of(look(world), "main.flags")


def test_a_server_of_another_kind_is_asked_through_the_gateway(world: World) -> None:
    """Nothing of a llama-server is wanted of it, and it need not be able to count."""
    del world.config["tier.main.server"]
    world.config["tier.main"] = {"url": "https://models.example/v1", "kind": "openai"}
    world.says["/v1/messages/count_tokens"] = Reply(404, {"error": {"message": "It cannot."}})
    found = [each for each in look(world) if each.check.startswith("main.")]
    assert {each.check for each in found} == {"main.round-trip"}
    assert [each.found for each in found if each.status == "warning"] == ["count: It cannot."]
    assert would_work(found)


def test_a_flag_is_wrong_or_missing_and_never_both(world: World) -> None:
    """One that is not there has no wrong value; where one is wrong, not all is well."""
    world.config["tier.main.server"]["manage_flags"] = False
    assert not [each for each in of(look(world), "main.flags") if " is None" in each.found]
    del world.config["tier.main.server"]["manage_flags"]
    _command(world, "--cache-ram", "0")
    assert [each.status for each in look(world) if each.check == "main.flags"] == ["warning"]
