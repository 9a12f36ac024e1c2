"""
What stands between the client and the upstream in `bench.overhead`.

Each is one process (nginx: and its worker) with one thread for the work, on 127.0.0.1, with a
configuration of its own in a temporary folder, made to pass a stream on as it comes.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import attrs
import orjson

from bench.client import MODEL
from bench.processes import family
from tests.e2e.stack import ROOT, Running, free_port, start, start_gateway

PEERS: Final = ROOT / ".cache/peers"

#: Debian has servers where not everybody's PATH goes.
SEARCHED: Final = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"

#: The tiers of the gateway, each with as many slots as one may have, and one with a single slot;
#: a call goes to that which its model names.
TIERS: Final = (MODEL, "second", "third", "fourth")
SLOTS: Final = 256
SINGLE: Final = "single"


@attrs.frozen
class Contestant:
    """
    One way to the upstream.

    Attributes:
        name: as the table has it.
        port: where it listens.
        running: its process; None for no way at all.
    """

    name: str
    port: int
    running: Running | None = None

    @property
    def pids(self) -> tuple[int, ...]:
        """Its processes."""
        return family(self.running.process.pid) if self.running else ()

    def stop(self) -> None:
        """End it."""
        if self.running is not None:
            self.running.stop()


@attrs.frozen
class Kind:
    """
    A contestant that may be started.

    Attributes:
        name: as the table has it.
        program: what must be there; None where nothing must.
        version: arguments that make it say its version.
        started: starts it, in an empty folder, in front of the upstream on that port.
    """

    name: str
    program: str | None
    version: tuple[str, ...]
    started: Callable[[Path, int], Contestant]

    def installed(self) -> str | None:
        """Its version; None if it is not here."""
        if self.program is None:
            return ""
        if shutil.which(self.program, path=SEARCHED) is None:
            return None
        said = _run(self.program, *self.version)
        found = re.search(r"\d+\.\d+[\w.~+-]*", said)
        return found[0] if found else "?"


def _run(program: str, *arguments: str) -> str:
    path = shutil.which(program, path=SEARCHED)
    assert path is not None
    done = subprocess.run(
        [path, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    return done.stdout + done.stderr


def _started(
    name: str,
    folder: Path,
    port: int,
    *command: str,
    health: str = "/health",
    env: Mapping[str, str] | None = None,
) -> Contestant:
    path = shutil.which(command[0], path=SEARCHED)
    assert path is not None
    log = folder / f"{name}.log"
    running = start([path, *command[1:]], port, log, env={**os.environ, **(env or {})})
    try:
        running.wait(health, 120)
    except BaseException:
        running.stop()
        raise
    return Contestant(name, port, running)


# --- the gateway ----------------------------------------------------------------------------------


def claudegw(folder: Path, upstream: int) -> Contestant:
    """The gateway, with slots for a thousand calls at once, and a tier with a single one."""
    url = f"http://127.0.0.1:{upstream}"
    tiers = {name: {"url": url, "slots": SLOTS} for name in TIERS} | {
        SINGLE: {"url": url, "slots": 1}
    }
    routes = "".join(f'\n\n[[route]]\nmodel = "{name}"\ntier = "{name}"' for name in tiers)
    gateway = start_gateway(folder, tiers, routes)
    return Contestant("claudegw", gateway.port, gateway)


# --- proxies of every kind ------------------------------------------------------------------------

_NGINX: Final = """
{user}
daemon off;
worker_processes 1;
worker_rlimit_nofile {files};
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections {files}; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 32m;
    client_body_buffer_size 256k;
    upstream llama {{ server 127.0.0.1:{upstream}; keepalive 64; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://llama;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_read_timeout 1h;
            proxy_send_timeout 1h;
        }}
    }}
}}
"""

_HAPROXY: Final = """
global
    maxconn 4000
    nbthread 1
defaults
    mode http
    option http-no-delay
    option abortonclose
    timeout connect 10s
    timeout client 1h
    timeout server 1h
frontend in
    bind 127.0.0.1:{port} backlog 4096
    default_backend llama
backend llama
    server llama 127.0.0.1:{upstream}
"""

#: Connections that they are made for: two a stream.
FILES: Final = 4096


def nginx(folder: Path, upstream: int) -> Contestant:
    """Unbuffered, as its manual says."""
    port, config = free_port(), folder / "nginx.conf"
    # Started by root it would give its worker away to somebody who cannot see the folder.
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
    config.write_text(
        _NGINX.format(user=user, folder=folder, files=FILES, port=port, upstream=upstream)
    )
    log = str(folder / "nginx.error.log")
    return _started("nginx", folder, port, "nginx", "-p", str(folder), "-e", log, "-c", str(config))


def haproxy(folder: Path, upstream: int) -> Contestant:
    """It passes on what comes, and hangs up when its client does."""
    port, config = free_port(), folder / "haproxy.cfg"
    config.write_text(_HAPROXY.format(port=port, upstream=upstream))
    return _started("haproxy", folder, port, "haproxy", "-db", "-f", str(config))


# --- peers ----------------------------------------------------------------------------------------


def litellm(folder: Path, upstream: int) -> Contestant:
    """LiteLLM's proxy, in front of a server of the Messages API."""
    port, config = free_port(), folder / "litellm.yaml"
    model = {
        "model_name": "*",
        "litellm_params": {
            "model": "anthropic/fast",
            "api_base": f"http://127.0.0.1:{upstream}",
            "api_key": "none",
        },
    }
    config.write_bytes(orjson.dumps({"model_list": [model]}))  # JSON is YAML
    arguments = ("--config", str(config), "--host", "127.0.0.1", "--port", str(port))
    env = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        # Nobody but this machine can call it, and all that it can reach is the fake server.
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    program = str(PEERS / "litellm/bin/litellm")
    health = "/health/liveliness"
    return _started(
        "litellm", folder, port, program, *arguments, "--telemetry", "False", health=health, env=env
    )


def claude_code_router(folder: Path, upstream: int) -> Contestant:
    """claude-code-router, in front of a server of the Messages API."""
    port, home = free_port(), folder / ".claude-code-router"
    home.mkdir()
    provider = {
        "name": "fast",
        "api_base_url": f"http://127.0.0.1:{upstream}/v1/messages",
        "api_key": "none",
        "models": [*TIERS],
        "transformer": {"use": ["Anthropic"]},
    }
    config = {
        "PORT": port,
        "LOG": False,
        "Providers": [provider],
        "Router": {"default": f"fast,{MODEL}"},
    }
    (home / "config.json").write_bytes(orjson.dumps(config))
    program = str(PEERS / "claude-code-router/node_modules/.bin/ccr")
    env = {"HOME": str(folder)}
    return _started("claude-code-router", folder, port, program, "start", env=env)


KINDS: Final = (
    Kind("nginx", "nginx", ("-v",), nginx),
    Kind("haproxy", "haproxy", ("-v",), haproxy),
    Kind("claudegw", None, (), claudegw),
)
PEER_KINDS: Final = (
    Kind("litellm", str(PEERS / "litellm/bin/litellm"), ("--version",), litellm),
    Kind(
        "claude-code-router",
        str(PEERS / "claude-code-router/node_modules/.bin/ccr"),
        ("version",),
        claude_code_router,
    ),
)
