"""
Sessions of the real Claude Code on a gateway with scripted servers, step by step, recorded.

``python -m tests.e2e.sessions newest 2.1.36`` records all that there are and writes the fixtures in
tests/recordings.
"""

from __future__ import annotations

import ssl
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from threading import Thread
from typing import Any, Final

import attrs
import orjson
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests import redacted
from tests.e2e.clients import READY, VERSIONS, Client, Session, eventually
from tests.e2e.recorder import Heard, Recorder
from tests.e2e.scripted_llama import Block, ScriptedLlama, Text, Thinking, ToolUse
from tests.e2e.stack import Running, start_gateway

Json = Any

#: Seconds without a new call after which a step is over.
QUIET: Final = 2.0

#: Seconds that a step may take on a machine that has other work too, and a disk that is slow.
PATIENCE: Final = 400.0

#: Seconds without any call after a prompt was typed, after which Enter is pressed once more.
UNHEARD: Final = 30.0

#: Begins what the newest client says to its model when an agent is done.
_NOTICE: Final = b"[SYSTEM NOTIFICATION"

ALLOWED: Final = ["Agent", "Bash", "Edit", "Read", "Task", "ToolSearch", "WebFetch", "WebSearch"]


# --- the model ------------------------------------------------------------------------------------


@attrs.frozen
class Author:
    """
    The script of both models: what the user's words ask for is done, one tool at a time.

    Attributes:
        folder: the project.
        page: the URL of a page.
    """

    folder: Path
    page: str

    def __call__(self, body: Json) -> Sequence[Block]:
        words = last_words(body)
        system = orjson.dumps(body.get("system", "")).decode()
        for mark, text in _SIDE_CALLS.items():
            if mark in words or mark in system:
                return [Text(text)]
        if has_results(body):
            return [Thinking("That is what I wanted."), Text("It is done.")]
        names = {tool["name"] for tool in body.get("tools", ())}
        for phrase, tools in self.tools(names).items():
            if any(line.startswith(phrase) for line in words.splitlines()):
                return [Thinking("A tool will do it."), Text("I do it."), *tools]
        return [Thinking("That needs no tool."), Text("There are seven gates.")]

    def tools(self, names: set[str]) -> dict[str, list[Block]]:
        """The tools that each phrase of the user asks for, among those of these names."""
        agent = "Agent" if "Agent" in names else "Task"
        search = {"pattern": "*.txt"} if "Glob" in names else {"command": "ls", "description": "Ls"}

        def file(name: str) -> str:
            return str(self.folder / name)

        def errand(kind: str) -> list[Block]:
            prompt = {"description": "Count the gates", "prompt": "An errand: count the gates."}
            return [ToolUse(agent, {**prompt, "subagent_type": kind})]

        def command(text: str) -> Block:
            return ToolUse("Bash", {"command": text, "description": "See what is there"})

        edit = {"file_path": file("gates.txt"), "old_string": "north", "new_string": "south"}
        return {
            "An errand": [ToolUse("Glob" if "Glob" in names else "Bash", search)],
            "Please run a command": [command("echo one gate")],
            "Please run two": [
                command("cat gates.txt"),
                command("echo two gates && cat gates.txt"),
            ],
            "Please look at the history": [command("git --no-pager log -1 && cat gates.txt")],
            "Please remove the old": [
                command("rm -rf ./old-gates && curl -s http://127.0.0.1:9/gates")
            ],
            "Please read the file": [ToolUse("Read", {"file_path": file("gates.txt")})],
            "Please edit the file": [ToolUse("Edit", edit)],
            "Please read what is not there": [ToolUse("Read", {"file_path": file("missing.txt")})],
            "Please look at the picture": [ToolUse("Read", {"file_path": file("gate.png")})],
            "Please look at the document": [ToolUse("Read", {"file_path": file("gate.pdf")})],
            "Please send an agent": errand("general-purpose"),
            "Please explore": errand("Explore"),
            "Please fetch the page": [
                ToolUse("WebFetch", {"url": self.page, "prompt": "How many gates?"})
            ],
            "Please search the web": [ToolUse("WebSearch", {"query": "gates of old cities"})],
            "Please load a tool": [
                ToolUse("ToolSearch", {"query": "select:WebFetch", "max_results": 5})
            ],
            "Please find the counter": [
                ToolUse("ToolSearch", {"query": "select:mcp__walls__count", "max_results": 5})
            ],
            "Please count the walls": [ToolUse("mcp__walls__count", {})],
            "Please answer in a form": [ToolUse("StructuredOutput", {"gates": 7})],
        }


_SUMMARY: Final = "<analysis>They counted.</analysis>\n<summary>There are seven gates.</summary>"

#: What is said to a side call, by words in it.
_SIDE_CALLS: Final = {
    "You are a security monitor": "<block>no",
    "CRITICAL: Respond with TEXT ONLY": _SUMMARY,
    "Your task is to create": _SUMMARY,
    "The user stepped away": "You counted gates.",
    "[SUGGESTION MODE": "count the towers",
    "Web page content:": "The page tells of seven gates.",
    "Extract any file paths": "<filepaths>\n</filepaths>",
    "<policy_spec>": "none",
    "You are an expert at analyzing": "gates.txt",
    "You run a web search": "Nothing was found.",
    "Perform a web search": "Nothing was found.",
}


def last_words(body: Json) -> str:
    """What the user's last message says, beside tool results."""
    content = body["messages"][-1]["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    return "\n".join(text for text in texts if not text.startswith("<system-reminder>"))


def has_results(body: Json) -> bool:
    content = body["messages"][-1]["content"]
    return any(block["type"] == "tool_result" for block in content if isinstance(block, dict))


# --- a page on the web ----------------------------------------------------------------------------

_PAGE: Final = b"<html><body><h1>Gates</h1>%b</body></html>" % (b"<p>One more gate.</p>" * 7)


@contextmanager
def page(folder: Path) -> Iterator[tuple[str, Path]]:
    """A page on this machine, and the certificate of its server: the client takes no plain HTTP."""

    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(_PAGE)))
            self.end_headers()
            self.wfile.write(_PAGE)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # its name there
            pass

    certificate, key = _certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Door) as server:
        server.daemon_threads = True
        server.socket = context.wrap_socket(server.socket, server_side=True)
        listening = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        listening.start()
        try:
            yield f"https://127.0.0.1:{server.server_address[1]}/gates", certificate
        finally:
            server.shutdown()
            listening.join()


def _certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    certificate, secret = folder / "page.pem", folder / "page.key"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate, secret


# --- a project ------------------------------------------------------------------------------------


def furnish(folder: Path) -> None:
    """A project that is a git repository, with something of every sort."""
    (folder / "gates.txt").write_text("the north gate\nthe east gate\n")
    (folder / "CLAUDE.md").write_text("Gates are counted by hand.\n")
    (folder / "gate.png").write_bytes(_png())
    (folder / "gate.pdf").write_bytes(_pdf())
    author = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.com")
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "Count"]):
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)


def _png() -> bytes:
    """A grey square of eight pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x80" * 8) * 8)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _pdf() -> bytes:
    """A page with two words on it."""
    text = b"BT /F1 18 Tf 20 100 Td (Seven gates) Tj ET"
    page_of = b"/Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 4 0 R"
    parts = [
        b"1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj",
        b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj",
        b"3 0 obj<<%b/Resources<</Font<</F1 5 0 R>>>>>>endobj" % page_of,
        b"4 0 obj<</Length %d>>stream\n%b\nendstream endobj" % (len(text), text),
        b"5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj",
        b"trailer<</Root 1 0 R>>",
    ]
    return b"\n".join([b"%PDF-1.1", *parts, b"%%EOF\n"])


# --- a session ------------------------------------------------------------------------------------


@attrs.frozen
class Step:
    """
    Something that the user does.

    Attributes:
        prompt: what is typed.
        kinds: those that come of it, for each client.
        confirmed: whether the client asks once more, and is told to go on.
        meanwhile: what is typed while the model works.
        noticed: whether it is over only when the model has been told that an agent is done.
        keys: what is pressed instead of typing; each changes the screen.
    """

    prompt: str
    kinds: Mapping[str, frozenset[str]]
    confirmed: bool = False
    meanwhile: str = ""
    noticed: bool = False
    keys: Sequence[str] = ()


def step(prompt: str, both: str, newest: str = "", old: str = "", **more: Any) -> Step:
    """A step of which the kinds in `both` come with both clients, others with one of them."""
    kinds = {
        "newest": frozenset(f"{both} {newest}".split()),
        "2.1.36": frozenset(f"{both} {old}".split()),
    }
    return Step(prompt, kinds, **more)


def turn(prompt: str, more: str = "", newest: str = "", **also: Any) -> Step:
    """A step that is a turn: the older client makes a title and a suggestion of each."""
    old = "title suggestion"
    return step(prompt, f"turn {more}", newest, f"{old} {also.pop('old', '')}", **also)


@attrs.frozen
class Plan:
    """
    A session.

    Attributes:
        name: of the session.
        steps: what is done in it.
        env: what to change in the ``env`` of the printed settings.
        changes: what to put in place of other settings.
        options: of the command.
        ready: what its screen shows when it waits.
        clients: those that know all of it.
        again: whether it is in the folder of the session before it.
    """

    name: str
    steps: Sequence[Step]
    env: Mapping[str, str] = attrs.field(factory=dict)
    changes: Mapping[str, Json] = attrs.field(factory=dict)
    options: Sequence[str] = ()
    ready: str = READY
    clients: Sequence[str] = VERSIONS
    again: bool = False

    @property
    def is_printed(self) -> bool:
        """Whether it is a run of ``claude -p`` and no interactive session."""
        return "-p" in self.options


def _asks(prompt: str, matcher: Mapping[str, str] | None = None) -> list[Json]:
    """A hook that asks a model."""
    return [{**(matcher or {}), "hooks": [{"type": "prompt", "prompt": prompt}]}]


_HOOKS: Final = {
    "UserPromptSubmit": _asks("Is this about gates? $ARGUMENTS"),
    "Stop": _asks("Are all gates counted?"),
}

_MORE_HOOKS: Final = _HOOKS | {
    "PreToolUse": _asks("Is this harmless? $ARGUMENTS", {"matcher": "Bash"}),
}

_ALLOWED: Final = {"defaultMode": "default", "disableAutoMode": "disable", "allow": ALLOWED}

#: The one that every test run goes through: all that a user does in a day.
SESSION: Final = Plan(
    "a day",
    (
        turn("Hello, how many gates are there?", "title hook", old="other"),
        turn("Please run a command", "hook", old="other"),
        turn("Please edit the file", "hook"),
        turn("Please send an agent", "hook subagent", noticed=True),
        turn("Please explore the walls", "hook subagent", noticed=True),
        turn("Please fetch the page", "hook fetch"),
        step("/context", "count"),
        step("/recap", "", "recap", "title"),
        step("/compact", "compaction"),
        turn("And how many are there now?", "hook"),
        step("/model claudegw-small", "probe", confirmed=True),
    ),
    changes={"hooks": _HOOKS},
)

_ATTRIBUTED: Final = {"CLAUDE_CODE_ATTRIBUTION_HEADER": "1"}

PLANS: Final = (
    SESSION,
    Plan(
        "the same folder",
        (turn("Tell me of the eastern gates", "title", old="other"), turn("Please read the file")),
        again=True,
    ),
    Plan(
        "attribution",
        (
            turn("Please run a command", "title hook", old="other"),
            turn("Please send an agent", "hook subagent", noticed=True),
            turn("Please fetch the page", "hook fetch"),
            step("/compact", "compaction"),
        ),
        env=_ATTRIBUTED,
        changes={"hooks": _MORE_HOOKS},
    ),
    Plan(
        "late tools",
        (
            turn("Please load a tool", "title"),
            turn("Please fetch the page", "fetch"),
            turn("Please run two", ""),
        ),
        env={"ENABLE_TOOL_SEARCH": "true"},
        clients=("newest",),
    ),
    Plan(
        "media",
        (
            turn("Please look at the picture", "title", old="other"),
            turn("Please look at the document"),
            turn("Please read what is not there"),
            turn("Please run two", old="other", meanwhile="And mind the towers"),
            turn("Please search the web", "other"),
        ),
    ),
    Plan(
        "settings",
        (
            turn("Please run a command", "title"),
            step("/effort low", "", confirmed=True),
            turn("Please read the file"),
            step("(thinking off)", "", keys=("M-t", "Down", "Enter", "Enter")),
            turn("And how many are left?"),
            step("/model claude-opus-5-5", "probe", confirmed=True),
            turn("How many are there?"),
        ),
        clients=("newest",),
    ),
    Plan(
        "asked first",
        (turn("Please look at the history", "title", old="other", confirmed=True),),
        changes={"permissions": {**_ALLOWED, "allow": ["Read"]}},
        clients=("2.1.36",),
    ),
    Plan(
        "auto mode",
        (turn("Please remove the old", "title classifier"),),
        changes={"permissions": {"defaultMode": "auto", "allow": ["Read"]}},
        options=("--permission-mode", "auto"),
        ready="auto mode on",
        clients=("newest",),
    ),
    Plan(
        "a form",
        (step("Please answer in a form", "turn"),),
        options=(
            "-p",
            "--json-schema",
            '{"type":"object","properties":{"gates":{"type":"integer"}},"required":["gates"]}',
        ),
        clients=("newest",),
    ),
)


# --- its recording --------------------------------------------------------------------------------


@attrs.define(eq=False)
class Stage:
    """
    A recorder before a gateway with two scripted servers.

    Attributes:
        gateway: the gateway.
        recorder: what the clients talk to.
        version: of the client.
        url: of the page.
        certificate: of the page's server.
    """

    gateway: Running
    recorder: Recorder
    version: str
    url: str
    certificate: Path
    _author: Author | None = None

    def script(self, body: Json) -> Sequence[Block]:
        """What both models say."""
        assert self._author is not None
        return self._author(body)

    def client(self, plan: Plan, place: Path) -> Client:
        """A new client in a furnished project, with the settings of `plan`."""
        place.mkdir()
        env = {"ANTHROPIC_BASE_URL": self.recorder.url, **plan.env}
        changes = {"permissions": _ALLOWED, **plan.changes}
        client = Client.of(self.version, self.gateway, place, env, changes, self.certificate)
        furnish(client.folder)
        self.at_work_in(client)
        return client

    def at_work_in(self, client: Client) -> None:
        """What both models do from now on is done in the folder of `client`."""
        self._author = Author(client.folder, self.url)

    def play(self, plan: Plan, client: Client) -> Iterator[tuple[Step, Sequence[Heard]]]:
        """Each step of `plan`, once it is over, with the calls that came of it."""
        if plan.is_printed:
            yield from self._play_printed(plan, client)
            return
        # What comes before the first step belongs to it.
        before = len(self.recorder.heard)
        with client.session(*plan.options, ready=plan.ready) as session:
            for each in plan.steps:
                self._do(each, session, before)
                after = len(self.recorder.heard)
                yield each, self.recorder.heard[before:after]
                before = after

    def _play_printed(self, plan: Plan, client: Client) -> Iterator[tuple[Step, Sequence[Heard]]]:
        for each in plan.steps:
            before = len(self.recorder.heard)
            said = client.say(each.prompt, *plan.options[1:], seconds=PATIENCE)
            assert said.status == 0, said
            yield each, self.recorder.heard[before:]

    def _do(self, each: Step, session: Session, before: int) -> None:
        if each.keys:
            self._press(each.keys, session)
            return
        known = len(self.recorder.heard)
        session.type(each.prompt)
        # On a busy machine the client may take the key for a part of what was typed.
        if not eventually(lambda: len(self.recorder.heard) > known, UNHEARD):
            session.tmux("send-keys", "Enter")
        if each.meanwhile:
            assert eventually(lambda: len(self.recorder.heard) > before, PATIENCE)
            session.type(each.meanwhile)
        if each.confirmed:
            self._confirm(session)
        # What does not come is the business of who looks at what came.
        eventually(lambda: self._is_over(each, before, session), PATIENCE)

    def _press(self, keys: Sequence[str], session: Session) -> None:
        for key in keys:
            before = session.screen
            session.tmux("send-keys", key)
            session.wait_for(before.__ne__)
            time.sleep(QUIET)

    def _confirm(self, session: Session) -> None:
        """Say yes, should the client ask."""

        def asks() -> bool:
            return "1. Yes" in session.screen

        while eventually(asks, 10):
            session.tmux("send-keys", "Enter")
            assert eventually(lambda: not asks(), 30), session.screen

    def _is_over(self, each: Step, before: int, session: Session) -> bool:
        """Whether all that was wanted came, and nothing else comes any more."""
        heard = self.recorder.heard[before:]
        if not each.kinds[self.version] <= {call.answer.get("x-claudegw-call") for call in heard}:
            return False
        if each.noticed and self.version == "newest":
            earlier = self.recorder.heard[:before]
            if _notices(heard) <= _notices(earlier):
                return False
        time.sleep(QUIET)
        busy = self.gateway.ask("/status")[1]["calls"] or "esc to interrupt" in session.screen
        return not busy and len(self.recorder.heard) == before + len(heard)


def _notices(calls: Sequence[Heard]) -> int:
    """How many notices of agents stand in a conversation: each call has those before it, too."""
    return max((orjson.dumps(call.body).count(_NOTICE) for call in calls), default=0)


@contextmanager
def stage(version: str, place: Path) -> Iterator[Stage]:
    """All that a recording needs, in the empty folder `place`."""
    made: Stage | None = None

    def script(body: Json) -> Sequence[Block]:
        assert made is not None
        return made.script(body)

    with (
        ScriptedLlama(script, n_ctx=131_072, prefill=0.2).serving() as main,
        ScriptedLlama(script, n_ctx=8192).serving() as small,
        page(place) as (url, certificate),
    ):
        tiers = {"main": {"url": main.url, "slots": 1}, "small": {"url": small.url, "slots": 1}}
        (place / "gateway").mkdir()
        gateway = start_gateway(place / "gateway", tiers)
        try:
            with Recorder(gateway.port).listening() as recorder:
                made = Stage(gateway, recorder, version, url, certificate)
                yield made
        finally:
            gateway.stop()


def call_of(each: Step, heard: Heard) -> redacted.Call:
    """A call as a fixture has it; the gateway says what it is."""
    kind = heard.answer.get("x-claudegw-call", "")
    return redacted.Call(each.prompt, kind, heard.path, heard.headers, heard.body)


def record(
    version: str, place: Path, plans: Sequence[Plan] = PLANS
) -> dict[str, list[redacted.Call]]:
    """All sessions of one client."""
    sessions: dict[str, list[redacted.Call]] = {}
    with stage(version, place) as set_up:
        client: Client | None = None
        for number, plan in enumerate(plans):
            if version not in plan.clients:
                continue
            if client is None or not plan.again:
                client = set_up.client(plan, place / f"session-{number}")
            calls = sessions[plan.name] = []
            for each, heard in set_up.play(plan, client):
                came = [call_of(each, one) for one in heard if one.is_message or one.is_count]
                missing = each.kinds[version] - {call.kind for call in came}
                assert not missing, f"{plan.name}, {each.prompt!r}: no {sorted(missing)}"
                calls += came
    return sessions


def main(versions: Sequence[str]) -> None:
    """Write the fixtures of these clients."""
    for version in versions:
        with tempfile.TemporaryDirectory(prefix="claudegw-") as place:
            sessions = record(version, Path(place))
        (agent, *_) = {call.headers["user-agent"] for calls in sessions.values() for call in calls}
        number = agent.removeprefix("claude-cli/").partition(" ")[0]
        made = redacted.fixture(number, sessions)
        path = redacted.FOLDER / f"claude-code-{number}.json"
        redacted.FOLDER.mkdir(exist_ok=True)
        path.write_text(redacted.written(made))


if __name__ == "__main__":
    main(sys.argv[1:])
