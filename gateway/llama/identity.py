"""
What a saved slot belongs to: it is given to no other server.

A state says nothing of the model that wrote it, and one of another model of the same shape is
restored without a word.  So the model's file, the program, the context, the types of the cache, the
template and every option that may matter are told apart here (docs/prompt-cache.md, "Snapshots").
Files are read: do it in a thread.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path
from typing import Final

import attrs
from twisted.logger import Logger

from gateway.config import MIB
from gateway.llama import gguf
from gateway.llama.command import KEY, option
from gateway.upstream import Props

#: MiB that a llama-server has for conversations in RAM where its command does not say.
_RAM: Final = 8192

#: Bytes of a program that are read at a time.
_CHUNK: Final = 4 * 1024 * 1024

#: Bytes at the beginning of a model that tell it from others: its header, or the most of it.
_BEGINNING: Final = 1024 * 1024

#: Options that change nothing in what a state says: those with a value, and those without.  Any
#: other option may, and a snapshot taken with it serves only a server that has it too.
_HARMLESS: Final = frozenset(
    (
        *("--host", "--port", "--api-key", "--api-key-file", "--hf-token", "-hft"),
        *("--alias", "-a", "--log-file", "--slot-save-path", "--sse-ping-interval"),
        *("--cache-ram", "-cram", "--slot-prompt-similarity", "-sps", "--timeout", "-to"),
        *("--threads", "-t", "--threads-batch", "-tb", "--threads-http"),
        *("--batch-size", "-b", "--ubatch-size", "-ub"),
        *("--temp", "--top-p", "--top-k", "--min-p", "--repeat-penalty", "--seed", "-s"),
        *("--n-predict", "-n", "--reverse-prompt", "-r", "--reasoning-format"),
        # Said by other parts of an identity.
        *("--model", "-m", "--ctx-size", "-c", "--parallel", "-np"),
        *("--chat-template", "--chat-template-file"),
    )
)
_HARMLESS_ALONE: Final = frozenset(
    ("--metrics", "--no-ui", "--jinja", "--log-jsonl", "--verbose", "-v", "--mlock", "--no-mmap")
)


log = Logger()


@attrs.frozen
class ModelFile:
    """A model's file, as far as it can be known without reading hundreds of gigabytes."""

    path: str
    size: int
    mtime_ns: int
    header: str

    @classmethod
    def of(cls, path: Path) -> ModelFile:
        """The file at `path`, of which the first MiB is read; raises OSError."""
        with path.open("rb") as file:
            beginning = file.read(_BEGINNING)
            found = os.fstat(file.fileno())
        digest = blake2b(beginning, digest_size=16).hexdigest()
        return cls(str(path.resolve()), found.st_size, found.st_mtime_ns, digest)


@attrs.frozen
class Identity:
    """
    What a snapshot belongs to; it fits a server that has the very same.

    Attributes:
        model: the model's file.
        server: the program (`server_identity`).
        n_ctx: tokens of a slot.
        cache_types: of keys and of values.
        template: a digest of the chat template.
        flags: a digest of the options that may change what a state says (`flags_identity`).
    """

    model: ModelFile
    server: str
    n_ctx: int
    cache_types: tuple[str, str] = ("f16", "f16")
    template: str = ""
    flags: str = ""


def server_identity(command: Sequence[str]) -> str:
    """
    The program of a server's command, which is read; raises OSError where there is none.

    It is the version of the wheel, or a digest of the binary and of the libraries beside it.
    """
    if "gateway.llama.embedded" in command[:3]:
        try:
            return f"xllamacpp {version('xllamacpp')}"
        except PackageNotFoundError as error:
            raise FileNotFoundError(str(error)) from None
    found = shutil.which(command[0])
    if found is None:
        raise FileNotFoundError(f"no such program: {command[0]}")
    binary = Path(found).resolve()
    digest = blake2b(digest_size=16)
    with binary.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    beside = (binary.parent, binary.parent.parent / "lib")
    for library in sorted(each for folder in beside for each in folder.glob("lib[lg][lg][am]*")):
        state = library.stat()
        digest.update(f"{library.name} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()


def flags_identity(command: Sequence[str], env: Mapping[str, str] = {}) -> str:
    """
    A digest of those words of a server's command that may change what a state of it says.

    Args:
        command: the whole command.
        env: its whole environment, where llama-server looks for options too.
    """
    begin = 3 if "gateway.llama.embedded" in command[:3] else 1
    found = []
    words = iter(command[begin:])
    for word in words:
        name, _, value = word.partition("=")
        if name in _HARMLESS and not value:
            next(words, None)
        elif name not in _HARMLESS | _HARMLESS_ALONE:
            found.append(word)
    told = {name: env[name] for name in env if name.startswith("LLAMA_") and name != KEY}
    found += sorted(f"{name}={value}" for name, value in told.items())
    return blake2b("\0".join(found).encode(), digest_size=16).hexdigest()


@attrs.frozen
class Kept:
    """
    A server whose slot is kept.

    Attributes:
        identity: what its snapshots belong to.
        model: what they are good for follows from it; None where its header says nothing.
        ram: bytes that it has for conversations beside the slot.
    """

    identity: Identity
    model: gguf.Model | None
    ram: float = inf

    @property
    def kind(self) -> gguf.Kind | None:
        return None if self.model is None else self.model.kind

    @property
    def exactly(self) -> bool:
        """Whether a state serves only prompts that go on where it ends."""
        return self.kind not in ("plain", None)


def server_of(props: Props, command: tuple[str, ...], env: Mapping[str, str]) -> Kept:
    """
    Who a server is that says this of itself.

    Args:
        props: what it says.
        command: what it was started with.
        env: its environment.

    Raises:
        OSError: its model or its program cannot be read.
    """
    path = Path(props.model_path)
    cache_types = (
        option(command, "--cache-type-k", "-ctk") or "f16",
        option(command, "--cache-type-v", "-ctv") or "f16",
    )
    identity = Identity(
        ModelFile.of(path),
        f"{server_identity(command)} {props.build}",  # a wrapper is not the program itself
        props.n_ctx,
        cache_types,
        props.template_digest,
        flags_identity(command, env),
    )
    try:
        model = gguf.read(path)
    except gguf.NotGguf as error:
        log.debug("{path}: {error}", path=os.fspath(path), error=error)
        model = None
    try:
        ram = int(option(command, "--cache-ram", "-cram") or _RAM)
    except ValueError:
        ram = _RAM
    return Kept(identity, model, inf if ram < 0 else ram * MIB)
