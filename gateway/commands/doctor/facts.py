"""
What the doctor knows: gathered once, and judged by `gateway.commands.doctor.checks`.

Nothing is changed on the way.  A tier whose slots are at work is not given further work.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs
from packaging.requirements import Requirement

from gateway.commands.claude import MANAGED, Source
from gateway.commands.claude import found as settings_of
from gateway.commands.doctor.machine import Listener, Machine, Reply
from gateway.commands.running import Unusable, address, url_of
from gateway.config import MIB, Config, ConfigError, Server, Tier, load
from gateway.figures import mapping
from gateway.llama import embedded, gguf
from gateway.llama.command import command, option
from gateway.llama.ram import of_command
from gateway.policy.calls import ROUTED
from gateway.policy.routes import MODEL_PREFIX

Json = Any

#: Seconds for one short answer of a model, behind none.
_ROUND: Final = 90.0

#: Words that no template has.
MARK: Final = "claudegw_doctor_looks"

_PART: Final = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@attrs.frozen
class Package:
    """A package that we need: what is there (None: nothing), and whether that will do."""

    name: str
    found: str | None
    wanted: str
    will_do: bool


@attrs.frozen
class ModelFile:
    """A model's file: its `path`, what is wrong with it ("" if nothing), and what it holds."""

    path: str
    wrong: str = ""
    model: gguf.Model | None = None


@attrs.frozen
class Folder:
    """A folder: whether it is there, may be written to, its mode, whether it is one, and ours."""

    path: Path
    exists: bool
    writable: bool
    mode: int
    is_folder: bool = True
    is_ours: bool = True

    @classmethod
    def of(cls, path: Path, user: int) -> Folder:
        try:
            state = path.stat()
        except OSError:
            return cls(path, exists=False, writable=False, mode=0)
        mode, is_ours = state.st_mode & 0o777, state.st_uid == user
        writable = path.is_dir() and os.access(path, os.W_OK | os.X_OK) and bool(mode & 0o200)
        return cls(path, True, writable, mode, path.is_dir(), is_ours)


@attrs.frozen
class TierFacts:
    """
    One tier.

    Attributes:
        config: what is wanted of it.
        listener: who listens at its port.
        props: what its server says of itself.
        system, tools: what its template makes of a system message, and of a tool.
        program: where the program of its command is; None where it is not found.
        model: its model's file; None where nothing says which.
        command: what its server is started with; () where nobody knows.
        added: flags that our kind of server would have and this one has not.
        free_port: one that could be its.
        status: what the gateway says of it.
        rounds: answers through the gateway: text, tool, schema, count.
    """

    name: str
    config: Tier
    listener: Listener | None
    props: Reply
    system: Reply
    tools: Reply
    program: str | None
    model: ModelFile | None
    command: tuple[str, ...]
    added: tuple[str, ...]
    free_port: int
    status: Mapping[str, Json]
    rounds: Mapping[str, Reply]

    @property
    def is_ours(self) -> bool:
        """Whether it is to be a llama-server, and not a server of another kind."""
        return self.config.kind == "llama-server"

    @property
    def is_llama(self) -> bool:
        """Whether what answers there says what a llama-server says."""
        return self.window > 0

    @property
    def is_loading(self) -> bool:
        return self.props.status == 503

    @property
    def window(self) -> int:
        """Tokens of a slot; 0 where nobody says it."""
        said = mapping(mapping(self.props.said).get("default_generation_settings"))
        return number(said.get("n_ctx"))

    @property
    def slots(self) -> int:
        return number(mapping(self.props.said).get("total_slots"))


@attrs.frozen
class Client:
    """Claude Code: its program (None: not found), its version, its settings, the last outrank."""

    program: str | None
    version: str
    sources: tuple[Source, ...]


@attrs.frozen
class Facts:
    """
    All of it.

    Attributes:
        version: of claudegw, as it is installed.
        path: of the configuration.
        config: None where it cannot be used; `mistakes` says why.
        mode: of the configuration's file.
        url: where a client finds the gateway; "" where it cannot, and `no_url` says why.
        listener: who listens there.
        elsewhere: the address to listen at, where it is none of this machine; else "".
        status: what the gateway says of itself.
        free_port: one that could be the gateway's.
        state: the state folder, and that of the snapshots in it.
        free: bytes on the disk of the state folder.
        unit, agent: the files that have systemd or launchd start us; "" and {} without one.
    """

    python: tuple[int, ...]
    version: str
    packages: tuple[Package, ...]
    path: Path
    config: Config | None
    mistakes: tuple[str, ...]
    mode: int
    url: str
    no_url: str
    listener: Listener | None
    elsewhere: str
    status: Reply
    free_port: int
    state: tuple[Folder, ...]
    free: int
    unit: str
    agent: Mapping[str, Json]
    tiers: tuple[TierFacts, ...]
    client: Client

    @property
    def is_up(self) -> bool:
        """Whether what listens at our port is a gateway that talks to us."""
        return self.status.status == 200 and "tiers" in mapping(self.status.said)


def gather(machine: Machine, path: Path) -> Facts:
    """What is known of the machine and of the configuration at `path`."""
    config, mistakes = _config(path)
    url, no_url, listener, status = "", "", None, Reply(0, why="not asked")
    state: tuple[Folder, ...] = ()
    tiers: list[TierFacts] = []
    if config is not None:
        try:
            url = url_of(config.gateway)
        except Unusable as error:
            no_url = str(error)
        else:
            parts = urlsplit(url)
            listener = machine.listener(parts.hostname or "", parts.port or 80)
            if listener is not None:
                status = machine.ask(url, "/status", key=config.gateway.token)
        root = config.gateway.state_dir
        state = tuple(Folder.of(path, machine.user) for path in (root, root / "slots"))
        known = mapping(mapping(status.said).get("tiers"))
        tiers = [
            _tier(machine, config, url, name, mapping(known.get(name))) for name in config.tier
        ]
    return Facts(
        python=tuple(sys.version_info[:3]),
        version=version("claudegw"),
        packages=tuple(_packages()),
        path=path,
        config=config,
        mistakes=mistakes,
        mode=path.stat().st_mode & 0o777 if path.exists() else 0,
        url=url,
        no_url=no_url,
        listener=listener,
        elsewhere="" if config is None else _elsewhere(machine, config.gateway.listen),
        status=status,
        free_port=machine.free_port(),
        state=state,
        free=machine.free(state[0].path if state else machine.folder),
        unit=_text(machine.unit),
        agent=_agent(machine.home),
        tiers=tuple(tiers),
        client=_client(machine),
    )


def _elsewhere(machine: Machine, listen: str) -> str:
    try:
        host, _ = address(listen)
    except Unusable:
        return ""
    return "" if machine.has_address(host) else host


def _config(path: Path) -> tuple[Config | None, tuple[str, ...]]:
    try:
        return load(path, ROUTED), ()
    except ConfigError as error:
        return None, tuple(error.mistakes)


def _packages() -> list[Package]:
    """What we need, as our own package says it."""
    found = []
    for line in requires("claudegw") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there: str | None = version(wanted.name)
        except PackageNotFoundError:
            there = None
        will_do = there is not None and wanted.specifier.contains(there, prereleases=True)
        found.append(Package(wanted.name, there, str(wanted.specifier), will_do))
    return found


# --- a tier ---------------------------------------------------------------------------------------


def _tier(
    machine: Machine, config: Config, gateway: str, name: str, status: Mapping[str, Json]
) -> TierFacts:
    tier = config.tier[name]
    parts = urlsplit(tier.url)
    is_unix, is_ours = tier.url.startswith("unix:"), tier.kind == "llama-server"
    where = parts.hostname or "", parts.port or 80
    listener = machine.listener(*where) if is_ours and not is_unix else None
    props = system = tools = Reply(0, why="nobody listens there")
    if (is_ours and is_unix) or listener is not None:
        props = machine.ask(tier.url, "/props", key=tier.key)
    if props.status == 200:
        system = machine.ask(tier.url, "/apply-template", _chat(), key=tier.key)
        tools = machine.ask(tier.url, "/apply-template", _chat(_TOOL), key=tier.key)
    words, program = _command(machine, config, tier, listener)
    return TierFacts(
        name=name,
        config=tier,
        listener=listener,
        props=props,
        system=system,
        tools=tools,
        program=program,
        model=_model(tier, words, mapping(props.said).get("model_path")),
        command=words,
        added=_missing(words, tier, config.gateway.state_dir),
        free_port=machine.free_port(),
        status=status,
        rounds=_rounds(machine, config, gateway, name)
        if _is_idle(status) and (props.status == 200 or not is_ours)
        else {},
    )


def _is_idle(status: Mapping[str, Json]) -> bool:
    busy = any(number(status.get(each)) for each in ("running", "settling", "waiting"))
    return bool(status) and not busy


def _command(
    machine: Machine, config: Config, tier: Tier, listener: Listener | None
) -> tuple[tuple[str, ...], str | None]:
    """What a tier's server is started with, and where its program is."""
    if tier.server is None:
        return (() if listener is None else listener.command), None
    words = command(tier, tier.server, config.gateway.state_dir)
    path = {**machine.environ, **tier.server.env}.get("PATH")
    return tuple(words), machine.which(words[0], path)


def _missing(words: Sequence[str], tier: Tier, state: Path) -> tuple[str, ...]:
    """The flags that a server of ours would get, and that these words lack."""
    if not words or (tier.server is not None and tier.server.manage_flags):
        return ()
    given = list(words)
    if "gateway.llama.embedded" in given[1:3]:
        given[0] = "python"
    ours = command(tier, Server(command=tuple(given)), state, of_command)
    return tuple(ours[len(given) :])


def _model(tier: Tier, words: Sequence[str], said: Json) -> ModelFile | None:
    """The file of a tier's model, if it lies on this machine."""
    wanted = option(words, "--model", "-m") if tier.server is not None else None
    if wanted is None:
        if not isinstance(said, str) or not Path(said).is_absolute() or not Path(said).exists():
            return None
        wanted = said
    try:
        path = embedded.model_file(wanted)
        absent = [part for part in parts_of(path) if not part.is_file()]
        if absent:
            return ModelFile(str(path), f"a part of it is missing: {absent[0].name}")
        for part in parts_of(path):
            gguf.check_whole(part)
        return ModelFile(str(path), model=gguf.read(path))
    except (OSError, ImportError, ValueError, gguf.NotGguf) as error:
        return ModelFile(wanted, getattr(error, "strerror", None) or str(error))


def parts_of(path: Path) -> list[Path]:
    """The files of a model that may be split into several."""
    split = _PART.search(path.name)
    if split is None:
        return [path]
    total = min(int(split[2]), 999)
    stem = path.name[: split.start()]
    return [path.with_name(f"{stem}-{at:05}-of-{split[2]}.gguf") for at in range(1, total + 1)]


# --- questions to a model -------------------------------------------------------------------------

_TOOL: Final = {
    "type": "function",
    "function": {
        "name": MARK,
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}},
    },
}


def _chat(*tools: Json) -> Json:
    messages = [
        {"role": "system", "content": "Answer." if tools else MARK},
        {"role": "user", "content": "Look."},
    ]
    return {"messages": messages, "tools": list(tools)} if tools else {"messages": messages}


def _rounds(machine: Machine, config: Config, url: str, name: str) -> dict[str, Reply]:
    """What the gateway answers for a tier: words, a tool call, a schema's JSON, a count."""

    def ask(body: Json, path: str = "/v1/messages") -> Reply:
        return machine.ask(url, path, body, key=config.gateway.token, patience=_ROUND)

    plain = {
        "model": MODEL_PREFIX + name,
        "max_tokens": 16,
        "messages": [{"role": "user", "content": "Say hello."}],
    }
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    tool = {
        "name": "look",
        "description": "Looks somewhere.",
        "input_schema": {
            "type": "object",
            "properties": {"deep": {"type": "boolean"}},
            "required": ["deep"],
        },
    }
    counted = {each: plain[each] for each in ("model", "messages")}
    found = {"text": ask(plain)}
    if found["text"].status != 200:
        return found
    return {
        **found,
        "count": ask(counted, "/v1/messages/count_tokens"),
        "tool": ask({**plain, "max_tokens": 256, "tools": [tool], "tool_choice": {"type": "any"}}),
        "schema": ask(
            {
                **plain,
                "max_tokens": 64,
                "output_config": {"format": {"type": "json_schema", "schema": schema}},
            }
        ),
    }


# --- the client, and who starts us ----------------------------------------------------------------


def _client(machine: Machine) -> Client:
    program = machine.which(machine.environ.get("CLAUDE") or "claude")
    managed = MANAGED.get(sys.platform)
    sources = [
        Source("the environment", {"env": machine.environ}),
        *settings_of(machine.home, machine.folder, machine.environ, managed),
    ]
    return Client(program, machine.version(program) if program else "", tuple(sources))


def _agent(home: Path) -> Mapping[str, Json]:
    import plistlib  # on a Mac alone

    from gateway.daemon.launchd import LABEL

    try:
        return mapping(plistlib.loads((home / f"Library/LaunchAgents/{LABEL}.plist").read_bytes()))
    except (OSError, ValueError, plistlib.InvalidFileException):
        return {}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")[:MIB]
    except OSError:
        return ""


# --- values, whatever they are --------------------------------------------------------------------


def number(value: Json) -> int:
    """`value` if it is a whole number; 0 else."""
    return value if type(value) is int else 0
