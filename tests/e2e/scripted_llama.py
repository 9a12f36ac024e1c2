"""
A llama-server whose model is a script.

It speaks as build 11434 of llama.cpp's server does, with what is wrong in it: the status of a
stream goes out when the slot starts on the prompt, comments keep it alive, ``message_start`` comes
with the first token, blocks are closed only at the very end, a ``tool_use`` starts without its
input, ids are of its own kind, and the connection is closed after each stream.  A chat call is read
as the Messages call that it is, so that scripts know one API alone.
"""

from __future__ import annotations

import secrets
import string
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any, ClassVar, Final

import attrs
import orjson

from gateway.wire import openai
from tests.schemas import Plain, Speaker

Json = Any

#: Characters of a prompt or an answer that pass for one token.
CHARACTERS: Final = 4

_LETTERS: Final = string.ascii_letters + string.digits


@attrs.frozen
class Text:
    """Words of the model."""

    text: str


@attrs.frozen
class Thinking:
    """Thoughts of the model."""

    text: str


@attrs.frozen
class ToolUse:
    """A tool that the model calls."""

    name: str
    input: Json


Block = Text | Thinking | ToolUse

#: What the model answers to a body of ``/v1/messages``, or to a chat call as such a body.
Script = Callable[[Json], Sequence[Block]]


def random_id() -> str:
    """As llama-server makes them."""
    return "".join(secrets.choice(_LETTERS) for _ in range(32))


@attrs.define(eq=False)
class ScriptedLlama:
    """
    One server of one slot, while `serving` is entered.

    Attributes:
        script: decides what is answered.
        n_ctx: tokens that the slot holds.
        prefill: seconds that every prompt takes.
        pace: seconds that every token takes.
        port: where it listens; 0 is a free one.
        asked: every body of ``/v1/messages``, ``/completion`` and chat calls, in the order in which
            the slot took them.
        most_at_once: completions that were ever open at once, those that wait for the slot too.
    """

    script: Script
    n_ctx: int = 65536
    prefill: float = 0.0
    pace: float = 0.0
    port: int = 0
    asked: list[Json] = attrs.field(factory=list, init=False)
    most_at_once: int = attrs.field(default=0, init=False)
    processing: bool = attrs.field(default=False, init=False)
    _open: int = attrs.field(default=0, init=False)
    _count: Lock = attrs.field(factory=Lock, init=False)
    _slot: Lock = attrs.field(factory=Lock, init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def serving(self) -> Iterator[ScriptedLlama]:
        """Listen on its port of 127.0.0.1."""

        class Ours(_Door):
            llama = self

        with _Server(("127.0.0.1", self.port), Ours) as server:
            self.port = int(server.server_address[1])
            listening = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            listening.start()
            try:
                yield self
            finally:
                server.shutdown()
                listening.join()

    def completion(self, body: Json) -> Json:
        """The answer to ``/completion``: what the grammar lets through that comes with it."""
        text = Speaker(body["grammar"], Plain(), 0.02).say()
        size = tokens(body["prompt"])
        return {
            "content": text,
            "stop_type": "eos",
            "tokens_evaluated": size,
            "tokens_predicted": tokens(text),
            "timings": {"cache_n": 0, "prompt_n": size},
        }

    @contextmanager
    def slot(self, body: Json) -> Iterator[None]:
        """The one slot; who comes while it works waits without a byte."""
        with self._count:
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
        try:
            with self._slot:
                self.processing = True
                self.asked.append(body)
                try:
                    yield
                finally:
                    self.processing = False
        finally:
            with self._count:
                self._open -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of a test's business."""


class _Door(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    llama: ClassVar[ScriptedLlama]

    def do_GET(self) -> None:
        llama = self.llama
        match self.path.partition("?")[0]:
            case "/health" | "/v1/health":
                self._json({"status": "ok"})
            case "/props":
                self._json(
                    {
                        "default_generation_settings": {"n_ctx": llama.n_ctx},
                        "total_slots": 1,
                        "model_alias": "scripted",
                        "model_path": "/models/scripted.gguf",
                        "build_info": "b11434-0000000",
                        "modalities": {"vision": False, "audio": False},
                        "is_sleeping": False,
                    }
                )
            case "/v1/models":
                meta = {"n_ctx": llama.n_ctx}
                self._json({"data": [{"id": "scripted", "object": "model", "meta": meta}]})
            case "/slots":
                slot = {"id": 0, "n_ctx": llama.n_ctx, "is_processing": llama.processing}
                self._json([slot])
            case _:
                self._refuse(404, "not_found_error", "File Not Found")

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        body = orjson.loads(raw)
        match self.path.partition("?")[0]:
            case "/apply-template":
                self._json({"prompt": rendered(body)})
            case "/tokenize":
                self._json({"tokens": list(range(tokens(body["content"])))})
            case "/completion":
                with self.llama.slot(body):
                    completion = self.llama.completion(body)
                self._json(completion)
            case "/v1/messages/count_tokens":
                self._json({"input_tokens": tokens(rendered(body))})
            case "/v1/messages":
                self._answer(body, events)
            case "/v1/chat/completions/input_tokens":
                self._json({"input_tokens": tokens(rendered(_read(raw)))})
            case "/v1/chat/completions":
                self._answer(_read(raw), chunks)
            case _:
                self._refuse(404, "not_found_error", "File Not Found")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # its name there
        """Nothing: pytest shows what a test says."""

    # --- plain answers ----------------------------------------------------------------------------

    def _json(self, value: Json, status: int = 200) -> None:
        raw = orjson.dumps(value)
        self.send_response(status)
        self.send_header("content-type", "application/json; charset=utf-8")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
        self.close_connection = self.close_connection or status >= 400

    def _refuse(self, status: int, kind: str, message: str) -> None:
        self._json({"error": {"code": status, "message": message, "type": kind}}, status)

    # --- a stream ---------------------------------------------------------------------------------

    def _answer(self, body: Json, told: Callable[[Sequence[Block], int], Iterator[bytes]]) -> None:
        size = tokens(rendered(body))
        fits = size < self.llama.n_ctx
        with self.llama.slot(body):
            if fits:
                self._stream(body, told, size)
        # Who hears of the end may call at once, and must find the slot idle.
        if fits:
            self._chunk(b"")
        else:
            message = f"request ({size} tokens) exceeds the available context size"
            self._refuse(400, "exceed_context_size_error", message)

    def _stream(
        self, body: Json, told: Callable[[Sequence[Block], int], Iterator[bytes]], size: int
    ) -> None:
        """All but its end."""
        assert body.get("stream"), "the gateway always streams"
        self.close_connection = True
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("x-accel-buffering", "no")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._chunk(b":\n\n")
        time.sleep(self.llama.prefill)
        for event in told(self.llama.script(body), size):
            self._chunk(event)
            time.sleep(self.llama.pace)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))


# --- the model ------------------------------------------------------------------------------------


def rendered(body: Json) -> str:
    """The prompt, in a template that renders tools, then the system text, then the turns."""
    tools, system = body.get("tools", []), body.get("system", "")
    return orjson.dumps([tools, system, body["messages"]]).decode()


def tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS)


def _read(raw: bytes) -> Json:
    """A chat call as a Messages call."""
    return openai.read_chat(raw, created=0)[0].body


def events(blocks: Sequence[Block], prompt: int) -> Iterator[bytes]:
    """The events of one answer to a prompt of so many tokens."""
    for event in _events(blocks, prompt):
        yield b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))


def chunks(blocks: Sequence[Block], prompt: int) -> Iterator[bytes]:
    """The same answer as chunks of a chat."""
    for chunk in _chunks(blocks, prompt):
        yield b"data: %b\n\n" % orjson.dumps({"object": "chat.completion.chunk", **chunk})
    yield b"data: [DONE]\n\n"


def _chunks(blocks: Sequence[Block], prompt: int) -> Iterator[Json]:
    said: list[Json] = [{"role": "assistant", "content": None}]
    calls = generated = 0
    for block in blocks:
        opened, deltas = _said(block)
        if isinstance(block, ToolUse):
            function = {"name": block.name, "arguments": ""}
            call = {"index": calls, "id": opened["id"], "type": "function", "function": function}
            said.append({"tool_calls": [call]})
            calls += 1
        generated += len(deltas)
        for delta in deltas:
            match delta:
                case {"text": text}:
                    said.append({"content": text})
                case {"thinking": text}:
                    said.append({"reasoning_content": text})
                case {"partial_json": text}:
                    part = {"index": calls - 1, "function": {"arguments": text}}
                    said.append({"tool_calls": [part]})
    for delta in said:
        yield {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    why = "tool_calls" if calls else "stop"
    yield {"choices": [{"index": 0, "delta": {}, "finish_reason": why}]}
    yield {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": generated}}


def _events(blocks: Sequence[Block], prompt: int) -> Iterator[Json]:
    message: Json = {
        "id": f"chatcmpl-{random_id()}",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": "scripted",
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"cache_read_input_tokens": 0, "input_tokens": prompt, "output_tokens": 0},
    }
    yield {"type": "message_start", "message": message}
    generated = 0
    for index, block in enumerate(blocks):
        opened, deltas = _said(block)
        yield {"type": "content_block_start", "index": index, "content_block": opened}
        for delta in deltas:
            generated += 1
            yield {"type": "content_block_delta", "index": index, "delta": delta}
    for index, block in enumerate(blocks):
        if isinstance(block, Thinking):
            signed = {"type": "signature_delta", "signature": ""}
            yield {"type": "content_block_delta", "index": index, "delta": signed}
        yield {"type": "content_block_stop", "index": index}
    calls = any(isinstance(block, ToolUse) for block in blocks)
    why = {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}
    yield {"type": "message_delta", "delta": why, "usage": {"output_tokens": generated}}
    yield {"type": "message_stop"}


def _said(block: Block) -> tuple[Json, list[Json]]:
    """How a block is opened, and its deltas, a token each."""
    match block:
        case Text(text):
            said = [{"type": "text_delta", "text": part} for part in _parts(text)]
            return {"type": "text", "text": ""}, said
        case Thinking(text):
            thought = [{"type": "thinking_delta", "thinking": part} for part in _parts(text)]
            return {"type": "thinking", "thinking": ""}, thought
        case ToolUse(name, given):
            written = orjson.dumps(given).decode()
            typed = [{"type": "input_json_delta", "partial_json": part} for part in _parts(written)]
            return {"type": "tool_use", "id": random_id(), "name": name}, typed


def _parts(text: str) -> list[str]:
    return [text[at : at + CHARACTERS] for at in range(0, len(text), CHARACTERS)]
