"""
``gw.toml`` as frozen values.

`load` gives a whole `Config` or every mistake of the file at once, each with its key and what was
expected there.  Each key that is not required has its default here, and stands explained in
``etc/gw.toml``.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import ssl
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs
from cattrs import Converter, transform_error
from cattrs.errors import ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, override

MIB: Final = 1024 * 1024

#: Where the gateway of a user keeps what outlives it.
STATE_DIR: Final = Path("~/.local/share/claudegw")


class ConfigError(Exception):
    """
    The configuration cannot be used.

    Attributes:
        mistakes: one line each, with the key it is about.
    """

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


class Mistake(ValueError):
    """One value is wrong; the message says what was expected."""


# --- endpoints --------------------------------------------------------------------------------


def is_loopback(listen: str) -> bool:
    """Whether a server endpoint can only be reached from this machine."""
    if listen.startswith("unix:"):
        return True
    address = ""
    for part in _parts(listen)[1:]:
        if part.startswith("interface="):  # of several, Twisted takes the last
            address = part.removeprefix("interface=").replace("\\", "")
    return address == "localhost" or is_loopback_address(address)


def _parts(endpoint: str) -> list[str]:
    """What stands between the colons of an endpoint string."""
    return re.split(r"(?<!\\):", endpoint)


def is_loopback_address(text: str) -> bool:
    """Whether `text` is an address that only this machine can reach."""
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False


def is_listenable(listen: str) -> bool:
    """Whether this is an endpoint string of a kind that a gateway can listen on."""
    return listen.startswith(("tcp:", "unix:")) or is_handed_over(listen)


def is_handed_over(listen: str) -> bool:
    """Whether somebody else opens the socket: then only the socket says where it listens."""
    return listen.startswith(("systemd:", "launchd:"))


def is_upstream(url: str) -> bool:
    """Whether `upstream_endpoint` takes this."""
    try:
        upstream_endpoint(url)
    except ValueError:
        return False
    return True


def upstream_endpoint(url: str) -> str:
    """
    The Twisted client endpoint string for a tier's `url`.

    Raises:
        ValueError: it is neither ``http://host:port`` nor ``unix:/path``.
    """
    if url.startswith("unix:/"):
        return f"unix:path={_quoted(url.removeprefix('unix:'))}:timeout=5"
    parts = urlsplit(url)
    if (
        parts.scheme != "http"
        or not parts.hostname
        or "@" in parts.netloc
        or parts.path.strip("/")
        or parts.query
    ):
        raise ValueError(url)
    return f"tcp:host={_quoted(parts.hostname)}:port={parts.port or 80}:timeout=5"


def is_remote(url: str) -> bool:
    """Whether `base_of` takes this."""
    try:
        base_of(url)
    except ValueError:
        return False
    return True


def base_of(url: str) -> str:
    """
    What stands before ``/v1/...`` in the URLs of a server at `url`.

    Raises:
        ValueError: it is neither ``http(s)://host[:port][/path]`` nor ``unix:/path``.
    """
    if is_upstream(url):
        return "http://localhost" if url.startswith("unix:") else url.rstrip("/")
    parts = urlsplit(url)
    wrong = not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment
    if parts.scheme not in ("http", "https") or wrong or parts.port == 0:
        raise ValueError(url)
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace(":", "\\:").replace("=", "\\=")


# --- what a value must be -----------------------------------------------------------------------

LLAMA_SERVER: Final = "llama-server"
_KINDS: Final = (LLAMA_SERVER, "anthropic", "openai")

#: The name of a tier: of files, of a label, in a header and in the page's addresses.
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,63}")

#: Keys of a tier that only some kinds have.
_KIND_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "ca_file": ("anthropic", "openai"),
    "model": ("anthropic", "openai"),
    "window": ("anthropic", "openai"),
    "auth": ("anthropic",),
    "strict": ("openai",),
}

#: Where a field's metadata keeps the check of its value.
_CHECK: Final = "gateway.config.check"
#: Beside it: what the check expects, in words.
EXPECTED: Final = "gateway.config.expected"


def _between(least: float, most: float = math.inf) -> Mapping[str, Any]:
    limit = f"at least {least}" if most == math.inf else f"between {least} and {most}"

    def check(value: float) -> None:
        if not least <= value <= most:
            raise Mistake(f"expected {limit}, got {value}")

    return {_CHECK: check, EXPECTED: limit}


def _between_if_any(least: float) -> Mapping[str, Any]:
    number = _between(least)
    check = number[_CHECK]
    return {**number, _CHECK: lambda value: None if value is None else check(value)}


def _must(expected: str, holds: Callable[[Any], object]) -> Mapping[str, Any]:
    def check(value: Any) -> None:
        if not holds(value):
            shown = "one with a name in it" if "@" in str(value) else repr(value)
            raise Mistake(f"expected {expected}, got {shown}")

    return {_CHECK: check, EXPECTED: expected}


_filled = _must("something", lambda value: value is None or value)


# --- the file ---------------------------------------------------------------------------------


@attrs.frozen
class Gateway:
    """
    The door of the house.

    Attributes:
        listen: where clients come in, as Twisted writes an endpoint: ``tcp:PORT``, ``unix:PATH``,
            ``systemd:...`` or ``launchd:NAME``.
        url: where clients on this machine find us; None where `listen` says it.
        state_dir: what outlives the process; made with mode 0700.
        token: what clients must show; needed to listen on other addresses than loopback.
        hosts: names under which clients may address us, beside the loopback ones.
        body_limit: bytes that a request's body may have.
        max_connections: connections that clients may have at once.
        idle_timeout: seconds that a connection may stay without a request.
        head_timeout: seconds that the headers of a request may take to come.
        body_timeout: seconds that its body may take to come.
        unread_timeout: seconds that an answer under way may wait for a client that does not read.
        grace: seconds that answers under way get to end when the service stops.
        start_after: seconds after which a waiting stream is begun before the model begins it.
        snapshot_budget: MiB that saved slots may have on the disk; 0 saves none.
        ledger_days: days for which calls that are over stay on the disk; 0 writes none down.
        ledger_rows: how many of them stay at most; 0 writes none down.
        capture: MiB that the bodies of calls may have on the disk, to find a mistake; 0 keeps none.
    """

    listen: str = attrs.field(
        default="tcp:9090:interface=127.0.0.1",
        metadata=_must('"tcp:...", "unix:...", "systemd:..." or "launchd:..."', is_listenable),
    )
    url: str | None = attrs.field(
        default=None,
        metadata=_must(
            '"http://host:port"',
            lambda url: url is None or (url.startswith("http:") and is_upstream(url)),
        ),
    )
    state_dir: Path = STATE_DIR
    token: str | None = attrs.field(default=None, metadata=_filled, repr=False)
    hosts: tuple[str, ...] = ()
    body_limit: int = attrs.field(default=32 * MIB, metadata=_between(1024))
    max_connections: int = attrs.field(default=2000, metadata=_between(8, 100_000))
    idle_timeout: float = attrs.field(default=60.0, metadata=_between(1, 86_400))
    head_timeout: float = attrs.field(default=20.0, metadata=_between(1, 3600))
    body_timeout: float = attrs.field(default=120.0, metadata=_between(1, 86_400))
    unread_timeout: float = attrs.field(default=600.0, metadata=_between(1, 86_400))
    grace: float = attrs.field(default=30.0, metadata=_between(0, 3600))
    start_after: float = attrs.field(default=500.0, metadata=_between(1, 590))
    snapshot_budget: int = attrs.field(default=32 * 1024, metadata=_between(0))
    ledger_days: int = attrs.field(default=30, metadata=_between(0, 36_500))
    ledger_rows: int = attrs.field(default=100_000, metadata=_between(0, 100_000_000))
    capture: int = attrs.field(default=0, metadata=_between(0, 1024 * 1024))

    @property
    def endpoint(self) -> str:
        """
        `listen`, with what it does not say itself.

        A socket in the file system is its owner's, and many may knock at the same time: one more
        would try again only after a second.
        """
        kind, *parts = _parts(self.listen)
        if is_handed_over(self.listen):
            return self.listen
        named = {name[1] for part in parts if (name := re.match(r"(\w+)=", part))}
        unnamed = len(parts) - len(named)  # in Twisted's order: place, mode or interface, backlog
        more = ""
        if kind == "unix" and unnamed < 2 and "mode" not in named:
            more = ":mode=600"
        if unnamed < 3 and "backlog" not in named:
            more += ":backlog=1024"
        return self.listen + more


@attrs.frozen
class Server:
    """
    A llama-server that we start ourselves.

    Attributes:
        command: the program and its arguments; no shell reads them.
        env: added to the gateway's own environment.
        manage_flags: whether a llama-server gets the flags that its tier needs.
        max_restarts: how often it is started again within the window; one end more, and it stays
            down until somebody asks for it.
        restart_window: seconds of the window.
        stop_grace: seconds that it gets to end by itself before it is killed.
    """

    command: tuple[str, ...] = attrs.field(
        metadata=_must("a program and its arguments", lambda command: len(command) > 0)
    )
    env: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    manage_flags: bool = True
    max_restarts: int = attrs.field(default=5, metadata=_between(0, 1000))
    restart_window: float = attrs.field(default=600.0, metadata=_between(1, 86400))
    stop_grace: float = attrs.field(default=10.0, metadata=_between(0, 3600))


@attrs.frozen
class Tier:
    """
    One model that calls are sent to.

    Attributes:
        url: where its server listens: ``http://host:port`` or ``unix:/path``; of other kinds than
            a llama-server also ``https``, and with a path.
        kind: what speaks there: a llama-server, or any server of the Messages API (``anthropic``)
            or of the chat-completions API (``openai``).
        slots: how many calls it gets at once.
        api_key: what the server wants to see, if anything.
        api_key_env: the environment variable that holds it instead.
        auth: how it is shown where the kind is ``anthropic``: ``x-api-key`` or ``bearer``.
        ca_file: certificates, in PEM, that vouch for an ``https`` server; None: the system's.
        model: the server's name for its model; None: the client's own goes there.
        window: tokens that its context has; None: as ``/v1/models`` says, else 200 000.
        strict: whether an ``openai`` server refuses what OpenAI's own does not know.
        max_waiting: calls that may wait in its line.
        ageing: seconds after which a waiting call goes before all others.
        startup_patience: seconds for which calls wait for a server that loads or comes back.
        resends: how often a call is sent again whose server went away before it was answered.
        stall: seconds without any progress after which a server of ours is started anew.
        answer_tokens: longest free-text answer to a housekeeping call, in tokens.
        schema_tokens: longest answer under a schema, in tokens.
        cache_ram: MiB for conversations that wait in a server's RAM; None: as its model needs.
        snapshot_idle: seconds without a call after which a slot is saved.
        snapshot_min_tokens: tokens that must be new, for a slot to be saved.
        server: how to start it; None if somebody else does.
    """

    url: str = attrs.field(metadata=_must('"http://host:port" or "unix:/path/to.sock"', is_remote))
    kind: str = attrs.field(
        default=LLAMA_SERVER,
        metadata=_must("one of " + ", ".join(f'"{kind}"' for kind in _KINDS), _KINDS.__contains__),
    )
    slots: int = attrs.field(default=1, metadata=_between(1, 256))
    api_key: str | None = attrs.field(default=None, metadata=_filled, repr=False)
    api_key_env: str | None = attrs.field(default=None, metadata=_filled)
    auth: str | None = attrs.field(
        default=None,
        metadata=_must('"x-api-key" or "bearer"', {None, "x-api-key", "bearer"}.__contains__),
    )
    ca_file: Path | None = None
    model: str | None = attrs.field(default=None, metadata=_filled)
    window: int | None = attrs.field(default=None, metadata=_between_if_any(256))
    strict: bool = False
    max_waiting: int = attrs.field(default=64, metadata=_between(1, 100_000))
    ageing: float = attrs.field(default=120.0, metadata=_between(0))
    startup_patience: float = attrs.field(default=900.0, metadata=_between(0))
    resends: int = attrs.field(default=2, metadata=_between(0, 100))
    stall: float = attrs.field(default=180.0, metadata=_between(1))
    cache_ram: int | None = attrs.field(default=None, metadata=_between_if_any(0))
    snapshot_idle: float = attrs.field(default=20.0, metadata=_between(0))
    snapshot_min_tokens: int = attrs.field(default=2048, metadata=_between(1))
    answer_tokens: int = attrs.field(default=1024, metadata=_between(16))
    schema_tokens: int = attrs.field(default=512, metadata=_between(64))
    server: Server | None = None

    @property
    def key(self) -> str | None:
        """What the server wants to see, wherever that is kept."""
        if self.api_key_env is None:
            return self.api_key
        return os.environ.get(self.api_key_env, "").strip() or None

    @property
    def shows_bearer(self) -> bool:
        """Whether the key goes as ``Authorization: Bearer``, and not as ``x-api-key``."""
        return self.kind != "anthropic" or self.auth == "bearer"


@attrs.frozen
class RouteRule:
    """
    Sends the calls that match it to a tier.

    Attributes:
        tier: the name of the tier.
        model: a glob on the client's name for the model, upper and lower case alike.
        kind: a kind of call.
    """

    tier: str
    model: str | None = attrs.field(default=None, metadata=_filled)
    kind: str | None = attrs.field(default=None, metadata=_filled)


@attrs.frozen
class Config:
    """The whole file."""

    gateway: Gateway = attrs.field(factory=Gateway)
    tier: Mapping[str, Tier] = attrs.field(factory=dict)
    route: tuple[RouteRule, ...] = ()

    @property
    def longest_grace(self) -> float:
        """Seconds that answers under way, and then the servers, get to end."""
        servers = [tier.server for tier in self.tier.values() if tier.server is not None]
        return self.gateway.grace + max((server.stop_grace for server in servers), default=0.0)


def load(path: Path, kinds: tuple[str, ...]) -> Config:
    """
    The configuration in the file at `path`.

    Args:
        path: a TOML file.
        kinds: the kinds of call that a route may name.

    Raises:
        ConfigError: with every mistake in it.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: {_reason(error)}"]) from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path}: not valid TOML: {error}"]) from None
    return parse(raw, kinds)


def parse(raw: Mapping[str, Any], kinds: tuple[str, ...]) -> Config:
    """The configuration in `raw`, as `load`; raises ConfigError."""
    try:
        config = _converter().structure(raw, Config)
    except Exception as error:  # noqa: BLE001  # cattrs gathers in an ExceptionGroup whatever the hooks raised
        lines = transform_error(error, format_exception=_format)
        raise ConfigError([*map(_readable, lines), *_lost(raw, kinds)]) from None
    mistakes = list(_contradictions(config, kinds))
    if mistakes:
        raise ConfigError(mistakes)
    state_dir = config.gateway.state_dir.expanduser().absolute()
    return attrs.evolve(config, gateway=attrs.evolve(config.gateway, state_dir=state_dir))


def _lost(raw: Mapping[str, Any], kinds: tuple[str, ...]) -> Iterator[str]:
    """Names that lead nowhere, in a file that has other mistakes."""
    tiers, rules = raw.get("tier", {}), raw.get("route", [])
    if not isinstance(tiers, dict) or not isinstance(rules, list):
        return
    if "main" not in tiers:
        yield _NO_MAIN
    for number, rule in enumerate(rules):
        found = rule if isinstance(rule, dict) else {}
        yield from _leads_nowhere(number, found.get("tier"), found.get("kind"), tiers, kinds)


_NO_MAIN = "tier.main: expected a table [tier.main]; every gateway has a main tier"


def _leads_nowhere(
    number: int, tier: object, kind: object, tiers: Mapping[str, Any], kinds: tuple[str, ...]
) -> Iterator[str]:
    """What a route names that there is not; what is no name at all has been told."""
    if isinstance(tier, str) and tier not in tiers:
        known = ", ".join(tiers) or "none"
        yield f'route[{number}].tier: there is no tier "{tier}" (there is: {known})'
    if isinstance(kind, str) and kind not in kinds:
        yield f'route[{number}].kind: expected one of {", ".join(kinds)}, got "{kind}"'


def _contradictions(config: Config, kinds: tuple[str, ...]) -> Iterator[str]:
    """What no single value shows."""
    if "main" not in config.tier:
        yield _NO_MAIN
    for number, rule in enumerate(config.route):
        yield from _leads_nowhere(number, rule.tier, rule.kind, config.tier, kinds)
        if rule.model is None and rule.kind is None:
            yield f"route[{number}]: expected a model or a kind; without both it matches every call"
    for name, tier in config.tier.items():
        if not _NAME.fullmatch(name):
            yield f"tier.{name!r}: expected a name of letters and digits, and blanks and ._- within"
        yield from _of_kind(f"tier.{name}", tier)
    listen = config.gateway.listen
    known = is_loopback(listen) or is_handed_over(listen)  # the latter: daemon/sockets.py looks
    if not known and config.gateway.token is None:
        yield (
            f'gateway.token: expected a token, since gateway.listen is not on loopback: "{listen}"'
        )


def _of_kind(where: str, tier: Tier) -> Iterator[str]:
    """What one tier's kind does not go with."""
    if tier.kind == LLAMA_SERVER and not is_upstream(tier.url):
        yield (
            f'{where}.url: expected "http://host:port" or "unix:/path/to.sock"; https and a path'
            ' are for the kinds "anthropic" and "openai"'
        )
    if tier.kind != LLAMA_SERVER and tier.server is not None:
        yield (
            f"{where}.server: expected no command; claudegw starts llama-servers only, so start"
            f" this one yourself, or call it one where it is (a server of kind {LLAMA_SERVER!r})"
        )
    for key, kinds in _KIND_KEYS.items():
        if getattr(tier, key) not in (None, False) and tier.kind not in kinds:
            yield f"{where}.{key}: expected only where kind is {' or '.join(kinds)}"
    if tier.ca_file is not None and not _holds_certificates(tier.ca_file.expanduser()):
        yield f"{where}.ca_file: expected a file with certificates, got {str(tier.ca_file)!r}"
    if tier.api_key is not None and tier.api_key_env is not None:
        yield f"{where}.api_key_env: expected api_key or api_key_env, not both"


def _holds_certificates(path: Path) -> bool:
    try:
        return bool(ssl.create_default_context(cafile=path).get_ca_certs())
    except (OSError, ssl.SSLError):
        return False


def missing_keys(config: Config) -> list[str]:
    """Mistakes in the environment: a key that a tier is to have is not there, or none can be."""
    mistakes = []
    for name, tier in config.tier.items():
        if tier.api_key_env is None:
            continue
        where = f"tier.{name}.api_key_env"
        if tier.key is None:
            mistakes.append(
                f"{where}: expected a key in the environment variable {tier.api_key_env}, which is"
                " not set"
            )
        elif not (tier.key.isascii() and tier.key.isprintable()):
            mistakes.append(
                f"{where}: expected a key of one line of ASCII in the environment variable"
                f" {tier.api_key_env}"
            )
    return mistakes


# --- cattrs -----------------------------------------------------------------------------------


def _converter() -> Converter:
    """One that forbids unknown keys and turns nothing into something else."""
    converter = Converter()
    for kind, name in ((str, "a string"), (int, "an integer"), (bool, "true or false")):
        converter.register_structure_hook(kind, _exactly(kind, name))
    converter.register_structure_hook(float, _a_number)
    converter.register_structure_hook(Path, _a_path)
    strings = converter.get_structure_hook(tuple[str, ...])

    def listed(value: Any, kind: Any) -> Any:
        if not isinstance(value, list):
            raise Mistake(f"expected a list of strings, got {_a(value)}")
        return strings(value, kind)

    converter.register_structure_hook_func(lambda kind: kind == tuple[str, ...], listed)
    converter.register_structure_hook_factory(attrs.has, lambda kind: _checked(converter, kind))
    return converter


def _checked(converter: Converter, kind: type[Any]) -> Callable[[Any, Any], Any]:
    """The structure hook of an attrs class: each field is converted, then checked."""

    def hook(check: Callable[[Any], None]) -> Callable[[Any, Any], Any]:
        def structure(value: Any, expected: Any) -> Any:
            found = converter.structure(value, expected)
            check(found)
            return found

        return structure

    overrides: dict[str, Any] = {
        field.name: override(struct_hook=hook(field.metadata[_CHECK]))
        for field in attrs.fields(kind)
        if _CHECK in field.metadata
    }
    return make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True, **overrides)


def _exactly(kind: type, name: str) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise Mistake(f"expected {name}, got {_a(value)}")
        return value

    return structure


def _a_path(value: Any, _: Any) -> Path:
    path = Path(_exactly(str, "a path")(value, str))
    try:
        path.expanduser()
        is_possible = "\0" not in value
    except RuntimeError:  # nobody here has this home
        is_possible = False
    if not is_possible:
        raise Mistake(f"expected a path that there can be, got {value!r}")
    return path


def _a_number(value: Any, _: Any) -> float:
    if type(value) not in (int, float):
        raise Mistake(f"expected a number, got {_a(value)}")
    return float(value)


def _a(value: Any) -> str:
    """The kind of `value`; the value itself may be a secret."""
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(type(value), "a list" if isinstance(value, list) else "a table")


def _format(error: BaseException, _: type | None) -> str:
    match error:
        case Mistake():
            return str(error)
        case KeyError():
            return "required"
        case ForbiddenExtraKeysError():
            return f"unknown key: {', '.join(sorted(error.extra_fields))}"
        case _:
            return "expected a table or a list here"


def _readable(line: str) -> str:
    """``unknown key: x @ $.tier.main`` as ``tier.main: unknown key: x``."""
    said, _, where = line.rpartition(" @ ")
    key = where.removeprefix("$").removeprefix(".").replace("['", ".").replace("']", "")
    return f"{key}: {said}" if key else said


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
