"""
A machine in memory that the doctor is shown, and one who follows its remedies.

Its servers are what the configuration's commands make of them, so that a change of the
configuration changes what they say; files and folders are real ones.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import attrs

from gateway.commands.doctor.checks import findings
from gateway.commands.doctor.facts import gather
from gateway.commands.doctor.finding import Finding
from gateway.commands.doctor.machine import Listener, Machine, Reply
from gateway.llama.command import option
from tests.llama.test_gguf import PLAIN, header, text

Json = Any

ROOT: Final = Path(__file__).parents[3]

GATEWAY: Final = 9090
VERSION: Final = version("claudegw")
MAIN: Final = 8080
FREE: Final = 40_000


def gguf_file(path: Path, size: int = 100, **entries: Any) -> None:
    """A model's file with one tensor of `size` bytes."""
    own = {
        f"glm.{name}": said
        for name, said in {**PLAIN, "context_length": 131_072, **entries}.items()
    }
    tensor = text("weights") + (1).to_bytes(4, "little") + (25).to_bytes(8, "little")
    raw = header(general__architecture="glm", **own) + tensor + bytes(4 + 8)
    path.write_bytes(raw + bytes(-len(raw) % 32) + bytes(size))


@attrs.define(slots=False)
class World(Machine):
    """
    The machine.

    Attributes:
        at: the folder of all its files.
        config: the tables of the configuration; each change is written at the next look.
        running: whether the gateway was started.
        others: who else listens at ports.
        programs: what is on the PATH.
        server: whether a server runs that claudegw does not start.
        flags: of that one.
        tools, system: whether the model's own template takes them.
        miscounts: tokens by which counts are wrong.
        token: what the running gateway wants to see.
        key: what the main server wants to see.
        says: what servers and models say instead, by path.
        tier: what the gateway says of its main tier.
        went: the tier that answers a call.
        gives: arguments of the tool that the model calls.
        release: the version of the running gateway.
        addresses: of this machine; None for any.
        room: bytes free on the disk.
    """

    at: Path = attrs.field(kw_only=True)
    config: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    running: bool = True
    others: dict[int, Listener] = attrs.field(factory=dict)
    programs: set[str] = attrs.field(factory=lambda: {"llama-server", "claude"})
    server: bool = False
    flags: list[str] = attrs.field(factory=list)
    tools: bool = True
    system: bool = True
    miscounts: int = 0
    token: str | None = None
    key: str | None = None
    says: dict[str, Reply] = attrs.field(factory=dict)
    tier: dict[str, Json] = attrs.field(factory=dict)
    went: str = "main"
    gives: Json = attrs.field(factory=lambda: {"deep": True})
    release: str = VERSION
    addresses: set[str] | None = None
    room: int = 10**12
    client: str = "2.1.330 (Claude Code)"

    @classmethod
    def built(cls, at: Path) -> World:
        """One on which all is well."""
        gguf_file(at / "model.gguf")
        (at / "state/slots").mkdir(mode=0o700, parents=True)
        (at / "state").chmod(0o700)
        (at / "home/.claude").mkdir(parents=True)
        env = {
            "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{GATEWAY}",
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "65536",
        }
        (at / "home/.claude/settings.json").write_text(json.dumps({"env": env}))
        command = ["llama-server", "--model", str(at / "model.gguf"), "--ctx-size", "65536"]
        config: dict[str, dict[str, Any]] = {
            "gateway": {
                "listen": f"tcp:{GATEWAY}:interface=127.0.0.1",
                "state_dir": str(at / "state"),
            },
            "tier.main": {"url": f"http://127.0.0.1:{MAIN}"},
            "tier.main.server": {"command": command},
        }
        return cls(
            environ={"PATH": "/nowhere"},
            home=at / "home",
            folder=at,
            unit=at / "claudegw.service",
            at=at,
            config=config,
        )

    @property
    def path(self) -> Path:
        return self.at / "gw.toml"

    def at_home(self, shown: str) -> Path:
        """The file that is shown by this name."""
        return self.home / shown[2:] if shown.startswith("~/") else Path(shown)

    def write(self) -> None:
        """The configuration as it is now."""
        mode = self.path.stat().st_mode if self.path.exists() else 0o600
        lines = []
        for table, keys in self.config.items():
            lines += [f"[{table}]", *(f"{key} = {json.dumps(each)}" for key, each in keys.items())]
        self.path.write_text("\n".join(lines))
        self.path.chmod(mode)

    def unsupervised(self, *flags: str) -> None:
        """Somebody else starts the main server, with these flags."""
        del self.config["tier.main.server"]
        self.server = True
        self.flags = [*flags, "--slot-prompt-similarity", "0", "--sse-ping-interval", "5"]

    # --- what the doctor asks ---------------------------------------------------------------------

    def listener(self, host: str, port: int) -> Listener | None:
        if port in self.others:
            return self.others[port]
        if port == self._port("gateway", "listen") and self.running and self.has_address(host):
            return Listener("twistd", 7, ("twistd",))
        if port == self._port("tier.main", "url") and self._server is not None:
            return Listener("llama-server", 8, tuple(self._server))
        return None

    def has_address(self, host: str) -> bool:
        return self.addresses is None or host in self.addresses

    def free_port(self) -> int:
        return FREE

    def which(self, program: str, path: str | None = None) -> str | None:
        return f"/bin/{program}" if program in self.programs else None

    def version(self, program: str) -> str:
        return self.client

    def free(self, folder: Path) -> int:
        return self.room

    def ask(
        self,
        url: str,
        path: str,
        body: Json = None,
        *,
        key: str | None = None,
        patience: float = 10.0,
    ) -> Reply:
        port = int(url.rpartition(":")[2])
        if port in self.others:
            return Reply(404, {"detail": "Not Found"})
        if path in self.says:
            return self.says[path]
        if port == self._port("gateway", "listen"):
            if key != self.token:
                return Reply(401, {"error": {"message": "Wrong token."}})
            return self._gateway(path, body)
        if key != self.key:
            return Reply(401, {"error": {"message": "Invalid API Key"}})
        return self._llama(path, body)

    def _port(self, table: str, key: str) -> int:
        found = re.search(r":(\d+)(?::interface.*)?$", self.config[table][key])
        assert found is not None
        return int(found[1])

    @property
    def _server(self) -> list[str] | None:
        """The words that the main server runs with, if it runs."""
        if "tier.main.server" not in self.config:
            return ["llama-server", *self.flags] if self.server else None
        words = self.config["tier.main.server"]["command"]
        model = Path(option(words, "--model") or "")
        there = self.running and words[0] in self.programs and model.exists()
        return words if there else None

    def _llama(self, path: str, body: Json) -> Reply:
        words = self._server
        assert words is not None
        slots = int(option(words, "--parallel") or 1)
        if path == "/props":
            window = int(option(words, "--ctx-size") or 4096) // slots
            said = {
                "default_generation_settings": {"n_ctx": window},
                "total_slots": slots,
                "build_info": "b11434",
            }
            return Reply(200, said)
        assert path == "/apply-template"
        other = option(words, "--chat-template-file") is not None
        if not (self.system or other) and body["messages"][0]["role"] == "system":
            return Reply(500, {"error": {"message": "System role not supported"}})
        shown = body if self.tools or other else body["messages"]
        return Reply(200, {"prompt": json.dumps(shown)})

    def _gateway(self, path: str, body: Json) -> Reply:
        if path == "/status":
            return Reply(
                200,
                {
                    "version": self.release,
                    "tiers": {"main": {"running": 0, "cache": {}, **self.tier}},
                },
            )
        if path == "/v1/messages/count_tokens":
            return Reply(200, {"input_tokens": 12 + self.miscounts})
        if path != "/v1/messages":
            return Reply(404, {"error": {"message": f"There is no {path} here."}})
        content: Json = {"type": "text", "text": '{"ok": true}'}
        if "tools" in body:
            content = {"type": "tool_use", "name": "look", "input": self.gives}
        usage = {"input_tokens": 10, "cache_read_input_tokens": 2, "output_tokens": 3}
        said = {"content": [content], "usage": usage}
        return Reply(200, said, headers={"x-claudegw-tier": self.went})


# --- one who follows ------------------------------------------------------------------------------


def look(world: World) -> list[Finding]:
    """What the doctor finds now."""
    if world.config:
        world.write()
    return findings(gather(world, world.path))


def follow(remedy: str, world: World) -> None:
    """Do what a remedy says."""
    quoted = re.search(r"`(.+?)`", remedy)
    assert quoted is not None, remedy
    if found := re.search(r"[Ss]et `(\w+) = (.+?)` in \[([\w.]+)\]", remedy):
        world.config[found[3]][found[1]] = json.loads(found[2])
    elif found := re.search(r"Put `(.+?)` into command in \[([\w.]+)\]", remedy):
        world.config[found[2]]["command"] = _with(world.config[found[2]]["command"], found[1])
    elif found := re.search(r"Restart the server with `(.+?)`", remedy):
        world.flags = _with(world.flags, found[1])
    elif found := re.search(r"Set `(\w+)` to `(.+?)` under env in (\S+)", remedy):
        _change(world.at_home(found[3]), lambda said: said["env"].update({found[1]: found[2]}))
    elif found := re.search(r"Remove `(\w+)` from (\S+)", remedy):
        _change(world.at_home(found[2]), lambda said: _remove(said, found[1]))
    else:
        _run(shlex.split(quoted[1]), world)


def _with(words: list[str], flags: str) -> list[str]:
    flag, given = flags.split(" ")
    if flag in words:
        at = words.index(flag)
        words = words[:at] + words[at + 2 :]
    return [*words, flag, given]


def _change(path: Path, change: Any) -> None:
    said = json.loads(path.read_bytes())
    change(said)
    path.write_text(json.dumps(said))


def _remove(said: dict[str, Any], name: str) -> None:
    said.pop(name, None)
    said.get("env", {}).pop(name, None)


def _run(words: list[str], world: World) -> None:
    """A command; what would start or install something does it in the world alone."""
    match words:
        case ["twistd", *_]:
            assert words == ["twistd", "-n", "claudegw", "--config", str(world.path)]
            world.running, world.release = True, VERSION
        case ["llama-server", "--model", "FILE", "--port", port, *flags]:
            assert port == str(MAIN)
            world.server, world.flags = True, [*world.flags, *flags]
        case ["npm", "install", "-g", "@anthropic-ai/claude-code"]:
            world.programs.add("claude")
        case ["claude", "update"]:
            world.client = "2.1.331 (Claude Code)"
        case ["chmod" | "cp" | "mv", *_]:
            subprocess.run(words, check=True, cwd=ROOT)
        case _:
            raise AssertionError(words)


def of(found: list[Finding], check: str) -> list[Finding]:
    """What was found by one check that is not as it should be."""
    return [each for each in found if each.check == check and each.status != "ok"]
