"""What lies on the disk: the configuration, sidecars of snapshots, headers of models, logs."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import attrs
import orjson

from gateway import config
from gateway.config import ConfigError
from gateway.llama import gguf, loglines
from gateway.llama.gguf import NotGguf
from gateway.llama.loglines import LONGEST, Lines, Prefilling
from gateway.llama.snapshot import from_sidecar, to_sidecar
from gateway.policy.calls import KINDS
from tests.fuzz import Target
from tests.fuzz.changes import of_bytes, of_json
from tests.llama.test_gguf import PLAIN, header
from tests.llama.test_loglines import PREFILLING
from tests.llama.test_snapshot import snapshot

Json = Any

_ETC: Final = Path(__file__).parents[2] / "etc"


def _scratch() -> Path:
    """A file of this process, for what is read from one."""
    return Path(tempfile.gettempdir()) / f"claudegw-fuzz-{os.getpid()}"


# --- configuration --------------------------------------------------------------------------------


def toml_holds(data: bytes) -> None:
    """Any file is a configuration, or all its mistakes are told."""
    file = _scratch()
    file.write_bytes(data)
    try:
        found = config.load(file, KINDS)
    except ConfigError as error:
        _check_mistakes(error)
    else:
        _check_config(found)
        assert found == config.load(file, KINDS)
    finally:
        file.unlink()


def tables_hold(data: bytes) -> None:
    """As `toml_holds`, of what is TOML already: any tables of any values."""
    try:
        said = orjson.loads(data)
    except ValueError:
        return
    if not isinstance(said, dict):
        return
    try:
        found = config.parse(said, KINDS)
    except ConfigError as error:
        _check_mistakes(error)
    else:
        _check_config(found)


def _check_mistakes(error: ConfigError) -> None:
    assert error.mistakes
    assert all(line.strip() for line in error.mistakes)


def _check_config(found: config.Config) -> None:
    """What is taken can be worked with."""
    assert "main" in found.tier
    assert found.gateway.state_dir.is_absolute()
    assert "\0" not in str(found.gateway.state_dir)
    assert all(rule.tier in found.tier for rule in found.route)
    assert found.longest_grace >= 0
    assert all(isinstance(line, str) for line in config.missing_keys(found))
    for tier in found.tier.values():
        assert config.base_of(tier.url).startswith("http")
        if tier.kind == config.LLAMA_SERVER:
            assert config.upstream_endpoint(tier.url)
    if found.gateway.token is None:
        listen = found.gateway.listen
        assert config.is_loopback(listen) or config.is_handed_over(listen)


# --- snapshots ------------------------------------------------------------------------------------


def sidecars_hold(data: bytes) -> None:
    """A sidecar is none, or a snapshot that is written again as it was."""
    found = from_sidecar("a", data, 7.0)
    if found is None:
        return
    assert found.tokens >= found.prompt_tokens > 0
    assert from_sidecar("a", to_sidecar(found), 7.0) == found
    for exactly in (False, True):
        kept = found.serves(found.fingerprint, exactly=exactly)
        assert 0 <= kept <= found.prompt_tokens
        assert 0 <= found.serves(b"", exactly=exactly) <= kept


# --- models ---------------------------------------------------------------------------------------


def gguf_holds(data: bytes) -> None:
    """A header is of a model that costs something sensible, or is refused."""
    file = _scratch()
    file.write_bytes(data)
    try:
        found = gguf.read(file)
    except NotGguf:
        pass
    else:
        assert found.layers == len(found.windowed) > 0
        assert found.kind in ("plain", "sliding-window", "recurrent")
        for kind in gguf.CACHE_TYPES:
            assert found.bytes_per_token(kind, kind) >= 0
            assert found.state_bytes(10, kind, kind) <= found.state_bytes(20, kind, kind)
    with suppress(NotGguf):
        gguf.check_whole(file)
    file.unlink()


# --- logs -----------------------------------------------------------------------------------------


def loglines_hold(data: bytes) -> None:
    """However its bytes come, a log has the same lines, and each is understood or is not."""
    pieces = Lines()
    found = [line for at in range(len(data)) for line in pieces.feed(data[at : at + 1])]
    assert len(pieces._rest) <= LONGEST
    whole = Lines()
    assert whole.feed(data) == found
    assert whole.end() == pieces.end()
    for line in (*found, data.decode("utf-8", "replace")):
        said = loglines.read(line)
        if said is None:
            continue
        assert all(each is None or each >= 0 for each in attrs.astuple(said))
        if isinstance(said, Prefilling):
            assert said.fraction <= 1


_FULL: Final[Json] = {
    "gateway": {
        "listen": "tcp:9090:interface=127.0.0.1",
        "state_dir": "state",
        "token": "t",
        "hosts": ["a"],
        "url": "http://a:1",
        "body_limit": 4096,
        "grace": 1.5,
    },
    "tier": {
        "main": {
            "url": "http://127.0.0.1:8080",
            "slots": 2,
            "ageing": 3,
            "server": {"command": ["a", "b"], "env": {"a": "b"}, "manage_flags": False},
        },
        "far": {"kind": "openai", "url": "https://a/v1", "strict": True, "api_key_env": "A"},
        "near": {"kind": "anthropic", "url": "unix:/a.sock", "auth": "bearer", "model": "m"},
    },
    "route": [{"kind": "hook", "tier": "main"}, {"model": "*x*", "tier": "far"}],
}
_NAMES: Final[tuple[Json, ...]] = (
    *(field.name for kind in (config.Gateway, config.Tier) for field in attrs.fields(kind)),
    *("http://[::1", "http://a:99999", "http://a:b", "unix:/x", "unix:", "tcp:1:interface=::1"),
    *("systemd:a", "launchd:b", "~nobody/x", "\x00", "main", {"main": {}}, {"url": "http://a"}),
)

TOML: Final = Target(
    "toml",
    toml_holds,
    (
        *(file.read_bytes() for file in sorted(_ETC.glob("*.toml"))),
        b'[tier.main]\nurl = "http://a:1"\n',
    ),
    of_bytes((b"[tier.x]\n", b"[[route]]\n", b"url = ", b'"""', b"1979-05-27", b"inf", b"[a]")),
    kept=(
        b'[gateway]\nstate_dir = "~nobody of this name/a"\n[tier.main]\nurl = "http://a:1"\n',
        b'[gateway]\nstate_dir = "/a\\u0000"\n[tier.main]\nurl = "http://a:1"\n',
        b'[tier.main]\nkind = "openai"\nurl = "http://a:1"\nca_file = "/a\\u0000"\n',
    ),
    cases=300,
)
TABLES: Final = Target("tables", tables_hold, (orjson.dumps(_FULL),), of_json(_NAMES), cases=300)
SIDECARS: Final = Target(
    "sidecars",
    sidecars_hold,
    (to_sidecar(snapshot()),),
    of_json(("conversation", "prefix", "aaaa")),
)
_MODEL: Final = header(
    general__architecture="glm",
    general__alignment=32,
    tokenizer__chat_template="{{ x }}",
    tokenizer__ggml__tokens=["a", "b"],
    **{f"glm__{name}": said for name, said in PLAIN.items()},
    glm__attention__sliding_window=512,
    glm__attention__sliding_window_pattern=[True, False] * 15,
    glm__full_attention_interval=4,
)
GGUF: Final = Target("gguf", gguf_holds, (_MODEL, header(general__architecture="a")), of_bytes())
LOGLINES: Final = Target(
    "loglines",
    loglines_hold,
    (
        PREFILLING.encode() + b"\n",
        b"slot print_timing: id  0 | task 7 | prompt eval time = 10.5 ms / 30 tokens\r\n",
        b"srv stop: cancel task, id_task = 5\n",
        b"slot release: id 0 | task 5 | stop processing: n_tokens = 9, truncated = 0\n",
    ),
    of_bytes((b"slot x: id 0 | task ", b"n_tokens = ", b"progress = ", b"processing task")),
)
