"""`gw.toml`: a whole configuration, or every mistake in it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from gateway.config import (
    Config,
    ConfigError,
    Gateway,
    RouteRule,
    base_of,
    is_loopback,
    load,
    missing_keys,
    parse,
    upstream_endpoint,
)

KINDS = ("turn", "title")
MAIN = '[tier.main]\nurl = "http://127.0.0.1:8080"\n'
KINDS_OF_TIERS = '"llama-server", "anthropic", "openai"'
AN_URL = 'expected "http://host:port" or "unix:/path/to.sock"'
SECRET = "a secret that nobody may see"


def read(text: str) -> Config:
    return parse(tomllib.loads(text), KINDS)


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value) == "\n".join(caught.value.mistakes)
    return caught.value.mistakes


def test_the_least_that_works() -> None:
    """One tier with a URL is enough; everything else has its default."""
    config = read(MAIN)
    main = config.tier["main"]
    assert (main.url, main.kind, main.slots, main.server) == (
        "http://127.0.0.1:8080",
        "llama-server",
        1,
        None,
    )
    assert (main.answer_tokens, main.schema_tokens, main.max_waiting) == (1024, 512, 64)
    gateway = config.gateway
    assert gateway.listen == "tcp:9090:interface=127.0.0.1"
    assert gateway.body_limit == 32 * 1024 * 1024
    assert (gateway.token, gateway.hosts, gateway.grace) == (None, (), 30)
    assert (gateway.max_connections, gateway.idle_timeout) == (2000, 60)
    assert (gateway.head_timeout, gateway.body_timeout) == (20, 120)
    assert gateway.unread_timeout == 600
    assert config.route == ()


def test_every_key_is_read() -> None:
    """What stands in the file is what the house gets."""
    config = read(
        f"""
        [gateway]
        listen = "tcp:9091"
        url = "http://studio.local"
        state_dir = "/var/lib/gw"
        token = "{SECRET}"
        hosts = ["studio.local", "10.0.0.7"]
        body_limit = 4096
        max_connections = 50
        idle_timeout = 5
        head_timeout = 2.5
        body_timeout = 9
        unread_timeout = 90
        grace = 1
        [tier.main]
        url = "unix:/run/llama.sock"
        kind = "llama-server"
        slots = 3
        api_key = "{SECRET}"
        max_waiting = 5
        answer_tokens = 100
        schema_tokens = 200
        [tier.main.server]
        command = ["llama-server", "--model", "m.gguf"]
        env = {{ A = "{SECRET}" }}
        manage_flags = false
        max_restarts = 0
        restart_window = 60
        stop_grace = 2.5
        [[route]]
        model = "*haiku*"
        kind = "title"
        tier = "main"
        """
    )
    gateway, main = config.gateway, config.tier["main"]
    assert (gateway.listen, gateway.url) == ("tcp:9091", "http://studio.local")
    assert gateway.state_dir == Path("/var/lib/gw")
    assert gateway.token == SECRET
    assert gateway.hosts == ("studio.local", "10.0.0.7")
    assert (gateway.body_limit, gateway.grace) == (4096, 1.0)
    assert (gateway.max_connections, gateway.idle_timeout) == (50, 5.0)
    assert (gateway.head_timeout, gateway.body_timeout) == (2.5, 9.0)
    assert gateway.unread_timeout == 90.0
    assert (main.url, main.slots, main.api_key) == ("unix:/run/llama.sock", 3, SECRET)
    assert (main.max_waiting, main.answer_tokens, main.schema_tokens) == (5, 100, 200)
    assert main.server is not None
    assert main.server.command == ("llama-server", "--model", "m.gguf")
    assert main.server.env == {"A": SECRET}
    assert not main.server.manage_flags
    server = main.server
    assert (server.max_restarts, server.restart_window, server.stop_grace) == (0, 60.0, 2.5)
    assert config.route == (RouteRule("main", "*haiku*", "title"),)
    assert SECRET not in repr(config)


def test_the_home_directory_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """``~`` is the user's own directory, and a relative path is made absolute."""
    monkeypatch.setenv("HOME", "/home/somebody")
    read_dir = read(f'{MAIN}[gateway]\nstate_dir = "~/gw"').gateway.state_dir
    assert read_dir == Path("/home/somebody/gw")
    assert read(f'{MAIN}[gateway]\nstate_dir = "gw"').gateway.state_dir.is_absolute()


def test_every_mistake_is_said_at_once_with_its_key() -> None:
    """Nobody has to start the gateway five times to learn of five mistakes."""
    found = mistakes(
        """
        nonsense = 1
        [gateway]
        listen = 9090
        state_dir = 5
        body_limit = 1.5
        grace = true
        colour = "red"
        [tier.main]
        kind = "vllm"
        slots = 0
        [tier.main.server]
        command = []
        [tier.small]
        url = "ftp://example.org"
        max_waiting = "many"
        [[route]]
        model = 5
        [[route]]
        kind = "housework"
        tier = "main"
        """
    )
    assert sorted(found) == sorted(
        [
            "unknown key: nonsense",
            "gateway.listen: expected a string, got an integer",
            "gateway.state_dir: expected a path, got an integer",
            "gateway.body_limit: expected an integer, got a number",
            "gateway.grace: expected a number, got true or false",
            "gateway: unknown key: colour",
            "tier.main.url: required",
            f"tier.main.kind: expected one of {KINDS_OF_TIERS}, got 'vllm'",
            "tier.main.slots: expected between 1 and 256, got 0",
            "tier.main.server.command: expected a program and its arguments, got ()",
            f"tier.small.url: {AN_URL}, got 'ftp://example.org'",
            "tier.small.max_waiting: expected an integer, got a string",
            f'route[1].kind: expected one of {", ".join(KINDS)}, got "housework"',
            "route[0].tier: required",
            "route[0].model: expected a string, got an integer",
        ]
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tier = 5", "tier: expected a table"),
        ('tier = "main"', "tier: expected a table"),
        (f"gateway = 5\n{MAIN}", "gateway: expected a table"),
        (f"route = 5\n{MAIN}", "route: expected a"),
        (f'route = ["main"]\n{MAIN}', "route[0]: expected a table"),
        (f"{MAIN}server = 5", "tier.main.server: expected a table"),
        (f"{MAIN}slots = true", "tier.main.slots: expected an integer, got true or false"),
        (f"{MAIN}slots = 257", "tier.main.slots: expected between 1 and 256, got 257"),
        (f"{MAIN}max_waiting = 0", "tier.main.max_waiting: expected between 1 and 100000"),
        (f"{MAIN}answer_tokens = 15", "tier.main.answer_tokens: expected at least 16, got 15"),
        (f"{MAIN}schema_tokens = 63", "tier.main.schema_tokens: expected at least 64, got 63"),
        (f'{MAIN}api_key = ""', "tier.main.api_key: expected something"),
        (f'{MAIN}Slots = 1\nurls = ""', "tier.main: unknown key: Slots, urls"),
        (f"{MAIN}[gateway]\nbody_limit = 1023", "gateway.body_limit: expected at least 1024"),
        (f"{MAIN}[gateway]\nmax_connections = 7", "gateway.max_connections: expected between 8"),
        (f"{MAIN}[gateway]\ngrace = -1", "gateway.grace: expected between 0 and 3600"),
        (f"{MAIN}[gateway]\ngrace = nan", "gateway.grace: expected between 0 and 3600"),
        (f'{MAIN}[gateway]\ntoken = ""', "gateway.token: expected something"),
        (f'{MAIN}[gateway]\nlisten = "9090"', 'gateway.listen: expected "tcp:..."'),
        (f'{MAIN}[gateway]\nlisten = "tcp6:9090"', 'gateway.listen: expected "tcp:..."'),
        (f'{MAIN}[gateway]\nurl = "localhost"', 'gateway.url: expected "http://host:port"'),
        (f'{MAIN}[gateway]\nurl = "unix:/a.sock"', 'gateway.url: expected "http://host:port"'),
        (f'{MAIN}[gateway]\nhosts = "studio.local"', "gateway.hosts: expected a list"),
        (f"{MAIN}[gateway]\nhosts = [1]", "gateway.hosts[0]: expected a string, got an integer"),
        (
            f'{MAIN}[tier.main.server]\ncommand = "llama-server --model m"',
            "tier.main.server.command: expected a list",
        ),
        (
            f'{MAIN}[tier.main.server]\ncommand = ["a", 5]',
            "tier.main.server.command[1]: expected a string, got an integer",
        ),
        (
            f'{MAIN}[tier.main.server]\ncommand = ["a"]\nenv = {{ A = 5 }}',
            "tier.main.server.env.A: expected a string, got an integer",
        ),
        (
            f'{MAIN}[tier.main.server]\ncommand = ["a"]\nmanage_flags = "no"',
            "tier.main.server.manage_flags: expected true or false, got a string",
        ),
        (
            f'{MAIN}[tier.main.server]\ncommand = ["a"]\nmax_restarts = -1',
            "tier.main.server.max_restarts: expected between 0 and 1000, got -1",
        ),
        (
            f'{MAIN}[tier.main.server]\ncommand = ["a"]\nrestart_window = 0',
            "tier.main.server.restart_window: expected between 1 and 86400, got 0",
        ),
        (
            f'{MAIN}[tier.main.server]\ncommand = ["a"]\nstop_grace = 3601',
            "tier.main.server.stop_grace: expected between 0 and 3600, got 3601",
        ),
        (f'{MAIN}[[route]]\ntier = "main"\nmodel = ""', "route[0].model: expected something"),
    ],
)
def test_one_mistake(text: str, said: str) -> None:
    """Each value is checked for its kind and its range, and the line begins with its key."""
    (found,) = mistakes(text)
    assert found.startswith(said)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8080",
        "https://127.0.0.1:8080",
        "ftp://127.0.0.1",
        "http://",
        "http://:8080",
        "http://h:port",
        "http://h:65536",
        "http://h/v1",
        "http://h?a=b",
        "unix:relative.sock",
        "unix:",
    ],
)
def test_a_url_that_is_none(url: str) -> None:
    """What cannot be called is refused at the start, and not at the first call."""
    (found,) = mistakes(f'[tier.main]\nurl = "{url}"')
    assert found.startswith(f"tier.main.url: {AN_URL}")


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://127.0.0.1:8080", "tcp:host=127.0.0.1:port=8080:timeout=5"),
        ("http://studio.local", "tcp:host=studio.local:port=80:timeout=5"),
        ("http://studio.local:81/", "tcp:host=studio.local:port=81:timeout=5"),
        ("http://[::1]:8080", r"tcp:host=\:\:1:port=8080:timeout=5"),
        ("unix:/run/a b.sock", "unix:path=/run/a b.sock:timeout=5"),
        ("unix:/run/a:b=c.sock", r"unix:path=/run/a\:b\=c.sock:timeout=5"),
    ],
)
def test_a_url_as_an_endpoint(url: str, endpoint: str) -> None:
    """Each URL that is taken is an endpoint string in which nothing can be misread."""
    assert upstream_endpoint(url) == endpoint
    assert read(f'[tier.main]\nurl = "{url}"').tier["main"].url == url


@pytest.mark.parametrize(
    ("listen", "only_here"),
    [
        ("tcp:9090:interface=127.0.0.1", True),
        ("tcp:9090:interface=127.8.9.1", True),
        ("tcp:9090:interface=localhost", True),
        (r"tcp:9090:interface=\:\:1", True),
        ("tcp:interface=127.0.0.1:port=9090", True),
        ("unix:/run/gw.sock:mode=600", True),
        ("tcp:9090", False),
        ("tcp:9090:interface=", False),
        ("tcp:9090:interface=0.0.0.0", False),
        (r"tcp:9090:interface=\:\:", False),
        ("tcp:9090:interface=10.0.0.7", False),
        ("tcp:9090:interface=127.0.0.1.example.org", False),
        ("tcp:9090:interface=localhost.example.org", False),
        ("tcp:9090:interface=127.0.0.1:interface=0.0.0.0", False),
    ],
)
def test_only_loopback_needs_no_token(listen: str, only_here: bool) -> None:
    """An endpoint that others can reach is refused without a token, and taken with one."""
    assert is_loopback(listen) == only_here
    text = f"{MAIN}[gateway]\nlisten = '{listen}'\n"
    assert read(f'{text}token = "{SECRET}"').gateway.listen == listen
    if only_here:
        assert read(text).gateway.token is None
    else:
        (found,) = mistakes(text)
        assert found.startswith("gateway.token: expected a token")


@pytest.mark.parametrize("listen", ["systemd:domain=INET:index=0", "launchd:gateway"])
def test_a_socket_that_is_handed_over_is_looked_at_later(listen: str) -> None:
    """Only the socket knows who can reach it, so that the file alone shows no mistake."""
    assert not is_loopback(listen)
    assert read(f"{MAIN}[gateway]\nlisten = '{listen}'").gateway.token is None


def test_contradictions_are_all_said_at_once() -> None:
    """What no single value shows is found as well: names that lead nowhere, rules for all."""
    found = mistakes(
        """
        [gateway]
        listen = "tcp:9090"
        [tier.small]
        url = "http://127.0.0.1:8081"
        [[route]]
        model = "*"
        tier = "big"
        [[route]]
        kind = "poem"
        tier = "small"
        [[route]]
        tier = "small"
        """
    )
    assert [line.partition(": ")[0] for line in found] == [
        "tier.main",
        "route[0].tier",
        "route[1].kind",
        "route[2]",
        "gateway.token",
    ]
    assert "small" in found[1]
    assert "turn, title" in found[2]


def test_contradictions_are_said_beside_wrong_values() -> None:
    """A wrong value does not hide that a route leads nowhere, or that there is no main tier."""
    found = mistakes(
        """
        [gateway]
        grace = "long"
        [tier.small]
        url = "http://127.0.0.1:8081"
        [[route]]
        model = "*"
        tier = "big"
        """
    )
    assert {line.partition(": ")[0] for line in found} == {
        "gateway.grace",
        "tier.main",
        "route[0].tier",
    }


@pytest.mark.parametrize(
    "text",
    [
        f'[gateway]\ntoken = ["{SECRET}"]\n{MAIN}',
        f'[gateway]\ntoken = {{ a = "{SECRET}" }}\n{MAIN}',
        f'[gateway]\ntoken = "{SECRET}"\nlisten = "x"\n{MAIN}',
        f'{MAIN}api_key = ["{SECRET}"]',
        f'{MAIN}api_key = "{SECRET}"\nslots = 0',
        f'{MAIN}[tier.main.server]\ncommand = ["a"]\nenv = "{SECRET}"',
        f'{MAIN}[tier.main.server]\ncommand = ["a"]\nenv = {{ KEY = ["{SECRET}"] }}',
        f'{MAIN}[tier.main.server]\ncommand = 5\nenv = {{ KEY = "{SECRET}" }}',
        f'{MAIN}[tier.main.server]\ncommand = "llama-server --api-key {SECRET}"',
        f'[tier.main]\nurl = "ftp://user:{SECRET}@example.org"',
    ],
)
def test_no_message_shows_a_secret(text: str) -> None:
    """What is said of a mistake is its key and its kind, never a key or a password."""
    for line in mistakes(text):
        assert SECRET not in line


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A missing file is a mistake with its path, not a traceback."""
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        load(tmp_path / "nowhere.toml", KINDS)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    """Neither is a directory in the file's place."""
    with pytest.raises(ConfigError, match="directory"):
        load(tmp_path, KINDS)


@pytest.mark.parametrize(
    "content", [b"[gateway", b"a = 1\na = 2", b"listen: tcp", b"\xff\xfe", b"a = '\x00'"]
)
def test_a_file_that_is_no_toml(tmp_path: Path, content: bytes) -> None:
    """What cannot be read is said in one line with the path."""
    path = tmp_path / "gw.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path, KINDS)
    (line,) = caught.value.mistakes
    assert line.startswith(f"{path}: ")
    assert "\n" not in line


def test_a_file_is_loaded(tmp_path: Path) -> None:
    """The file at a path gives the same as its text."""
    path = tmp_path / "gw.toml"
    path.write_text(MAIN)
    assert load(path, KINDS) == read(MAIN)


# --- servers of other kinds -----------------------------------------------------------------------


def of_kind(kind: str, more: str = "", url: str = "https://models.example/prefix") -> str:
    return f'[tier.main]\nkind = "{kind}"\nurl = "{url}"\n{more}'


@pytest.mark.parametrize("kind", ["anthropic", "openai"])
@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://models.example", "https://models.example"),
        ("https://models.example:8443/a/b/", "https://models.example:8443/a/b"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("unix:/run/a.sock", "http://localhost"),
    ],
)
def test_where_a_server_of_another_kind_may_be(kind: str, url: str, base: str) -> None:
    """Anywhere; a path may stand before what the API has, and its ``/v1`` may be said or not."""
    assert base_of(read(of_kind(kind, url=url)).tier["main"].url) == base


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (of_kind("llama-server"), 'tier.main.url: expected "http://host:port" or'),
        (of_kind("openai", url="https://me:secret@models.example"), "tier.main.url: expected"),
        (of_kind("openai", url="https://models.example/?a=b"), "tier.main.url: expected"),
        (of_kind("openai", url="https://models.example:99999"), "tier.main.url: expected"),
        (of_kind("openai", url="https:///a"), "tier.main.url: expected"),
        (
            of_kind("openai", '[tier.main.server]\ncommand = ["mlx_lm.server"]'),
            "tier.main.server: expected no command",
        ),
        (of_kind("openai", 'auth = "bearer"'), "tier.main.auth: expected only where kind is anth"),
        (of_kind("anthropic", "strict = true"), "tier.main.strict: expected only where kind is op"),
        (of_kind("anthropic", 'auth = "basic"'), 'tier.main.auth: expected "x-api-key" or'),
        (of_kind("anthropic", "window = 255"), "tier.main.window: expected at least 256"),
        (of_kind("anthropic", 'model = ""'), "tier.main.model: expected something"),
        (f'{MAIN}model = "a"', "tier.main.model: expected only where kind is anthropic or openai"),
        (f"{MAIN}window = 4096", "tier.main.window: expected only where kind is anthropic or op"),
        (of_kind("openai", 'ca_file = "/nowhere.pem"'), "tier.main.ca_file: expected a file with"),
        (of_kind("openai", 'ca_file = "setup.cfg"'), "tier.main.ca_file: expected a file with"),
        (
            of_kind("openai", 'api_key = "a"\napi_key_env = "B"'),
            "tier.main.api_key_env: expected api_key or api_key_env, not both",
        ),
    ],
)
def test_what_a_kind_does_not_go_with(text: str, said: str) -> None:
    """Each with its key; a secret in it is not repeated."""
    (found,) = mistakes(text)
    assert found.startswith(said)
    assert "secret" not in found


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "the environment variable THEIR_KEY, which is not set"),
        (" ", "the environment variable THEIR_KEY, which is not set"),
        ("sk-\n-abc", "a key of one line of ASCII in the environment variable THEIR_KEY"),
        ("sk-é", "a key of one line of ASCII in the environment variable THEIR_KEY"),
        ("sk-abc\n", None),
    ],
)
def test_a_key_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, value: str | None, said: str | None
) -> None:
    """The gateway does not start without it; who only reads the configuration does."""
    monkeypatch.delenv("THEIR_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("THEIR_KEY", value)
    config = read(of_kind("anthropic", 'api_key_env = "THEIR_KEY"'))
    found = missing_keys(config)
    if said is None:
        assert found == []
        assert config.tier["main"].key == "sk-abc"
        return
    (mistake,) = found
    assert mistake.startswith("tier.main.api_key_env: expected ")
    assert mistake.endswith(said)


@pytest.mark.parametrize(
    ("listen", "endpoint"),
    [
        ("tcp:9090:interface=127.0.0.1", "tcp:9090:interface=127.0.0.1:backlog=1024"),
        ("tcp:9090:127.0.0.1:5", "tcp:9090:127.0.0.1:5"),
        ("systemd:domain=UNIX:index=0", "systemd:domain=UNIX:index=0"),
        ("unix:/run/gw.sock", "unix:/run/gw.sock:mode=600:backlog=1024"),
        ("unix:address=/run/gw.sock:backlog=9", "unix:address=/run/gw.sock:backlog=9:mode=600"),
        (r"unix:/run/a\:mode\=666", r"unix:/run/a\:mode\=666:mode=600:backlog=1024"),
        ("unix:/run/gw.sock:mode=660", "unix:/run/gw.sock:mode=660:backlog=1024"),
        ("unix:/run/gw.sock:660", "unix:/run/gw.sock:660:backlog=1024"),
    ],
)
def test_a_socket_is_its_owners_and_many_may_knock(listen: str, endpoint: str) -> None:
    """Unless it says otherwise; Twisted would let in everybody, and fifty at the same time."""
    assert Gateway(listen=listen).endpoint == endpoint


@pytest.mark.parametrize(
    "name", ["", "../main", "a/b", ".hidden", "-n", "a\nb", "a\x1b[2J", "gro\xdf", "x" * 65, "a\\b"]
)
def test_a_tier_has_a_name_that_a_file_can_have(name: str) -> None:
    """It stands in the names of files, in a header, in a label and in addresses of the page."""
    tiers = {"main": {"url": "http://h:1"}, name: {"url": "http://h:2"}}
    with pytest.raises(ConfigError, match="expected a name of letters") as caught:
        parse({"tier": tiers}, KINDS)
    assert caught.value.mistakes[0].isprintable()


def test_a_name_may_have_blanks_and_dots() -> None:
    """Models are called so."""
    assert parse({"tier": {"main": {"url": "http://h:1"}, "GLM 5.1_b": {"url": "http://h:2"}}}, ())
