"""
What the header of a GGUF file says of its model: what a token of it costs to keep.

A state of a slot is as large as its tokens are many, times what the model keeps of each; that
follows from a few numbers in the header (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
and from the types of the cache.  It is an estimate: a state that was saved tells better.

The ``gguf`` package would read it too, but needs numpy and builds every token of the vocabulary;
a server that stays up for months does not want either for a dozen numbers.  What is read here is
bounded, and takes a tenth of a second for a vocabulary of 260 000 tokens: read it in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO, Final, Literal

import attrs

Kind = Literal["plain", "sliding-window", "recurrent"]

#: Bounds of what is read: bytes of the header, entries, elements of arrays, layers, and bytes of a
#: text or elements of an array that are kept.
_HEADER: Final = 128 * 1024 * 1024
_ENTRIES: Final = 4096
_ELEMENTS: Final = 8 * 1024 * 1024
_LAYERS: Final = 4096
_KEPT_TEXT: Final = 4 * 1024 * 1024
_LARGEST: Final = 2**31

#: The scalar types by their numbers; 8 is a string, 9 an array.
_SCALARS: Final[Mapping[int, Struct]] = {
    number: Struct(f"<{code}")
    for number, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_STRING: Final = 8
_ARRAY: Final = 9
_U32: Final = Struct("<I")
_U64: Final = Struct("<Q")

#: Bytes of an element of the cache, by its type (``--cache-type-k``, ``--cache-type-v``).
CACHE_TYPES: Final[Mapping[str, float]] = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}

#: Bytes of a saved state that each token takes beside its keys and values: its own number, its
#: place and its sequence (measured: 23 056 B a token where keys and values have 23 040).
_BESIDE: Final = 16

#: Of so many layers one keeps all tokens, where the file does not say it (llama.cpp `src/models`).
_PERIODS: Final = {"gemma2": 2, "gpt-oss": 2, "cohere2": 4, "gemma3n": 5, "gemma3": 6}

#: Models whose window llama.cpp does not heed, though their files have one.
_NO_WINDOW: Final = frozenset({"phi3"})

#: What entries of models that keep a running state begin with, after the architecture.
_RUNNING: Final = ("ssm.", "wkv.", "shortconv.", "kda.", "linear_attention.")


class NotGguf(Exception):
    """The file has no header that could be understood."""


@attrs.frozen
class Model:
    """
    A model, as far as its cache goes.

    Attributes:
        n_ctx: tokens that it was trained with; 0 if it does not say.
        kv_heads: heads that are kept, for each layer.
        key_length: elements of a key of one head.
        value_length: elements of a value of one head; 0 where keys alone are kept.
        beside: further elements that each layer keeps of a token (an indexer's keys).
        window: tokens that a layer with a sliding window looks back; 0 if none has one.
        windowed: for each layer whether it has one.
        running: whether layers keep a running state, of which no beginning can be cut off.
    """

    n_ctx: int
    kv_heads: tuple[int, ...]
    key_length: int
    value_length: int
    beside: int
    window: int
    windowed: tuple[bool, ...]
    running: bool

    @property
    def layers(self) -> int:
        return len(self.kv_heads)

    @property
    def kind(self) -> Kind:
        """
        What a kept state is good for.

        That of a ``plain`` model serves every prompt that begins as it does; those of the others
        only a prompt that goes on exactly where it ends.
        """
        if self.running:
            return "recurrent"
        return "sliding-window" if self.window else "plain"

    def bytes_per_token(self, cache_k: str = "f16", cache_v: str = "f16") -> int:
        """
        Bytes that one more token takes, once every window is full.

        Raises:
            ValueError: there is no such type of cache.
        """
        growing = sum(
            heads
            for heads, has_window in zip(self.kv_heads, self.windowed, strict=True)
            if not has_window
        )
        return self._bytes(growing, self.layers - sum(self.windowed), cache_k, cache_v) + _BESIDE

    def state_bytes(self, tokens: int, cache_k: str = "f16", cache_v: str = "f16") -> int:
        """
        Bytes of a whole state of so many tokens, without checkpoints.

        Raises:
            ValueError: there is no such type of cache.
        """
        behind = sum(
            heads
            for heads, has_window in zip(self.kv_heads, self.windowed, strict=True)
            if has_window
        )
        windows = self._bytes(behind, sum(self.windowed), cache_k, cache_v)
        return tokens * self.bytes_per_token(cache_k, cache_v) + min(tokens, self.window) * windows

    def _bytes(self, heads: int, layers: int, cache_k: str, cache_v: str) -> int:
        """Bytes that these heads of so many layers keep of a token."""
        try:
            key, value = CACHE_TYPES[cache_k], CACHE_TYPES[cache_v]
        except KeyError as error:
            raise ValueError(f"no type of cache: {error.args[0]!r}") from None
        kept = heads * (self.key_length * key + self.value_length * value)
        return int(kept + layers * self.beside * key)


def read(path: Path) -> Model:
    """
    The model in the file at `path`.

    Raises:
        NotGguf: it is no GGUF file, it is cut off within its header, or it makes no sense.
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=1024 * 1024) as file:
        return _model(_Header(file).entries())


def check_whole(path: Path) -> None:
    """
    Look whether the file at `path` holds all that its header promises, but for the last tensor.

    Raises:
        NotGguf: as `read`, or it is cut off behind its header.
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=1024 * 1024) as file:
        needed = _Header(file).reach()
        size = file.seek(0, 2)
    if size <= needed:
        raise NotGguf(f"it is cut off: it has {size} bytes, and needs more than {needed}")


# --- the model of the entries ---------------------------------------------------------------------


def _model(entries: Mapping[str, Any]) -> Model:
    architecture = entries.get("general.architecture")
    if not isinstance(architecture, str):
        raise NotGguf("it does not say which architecture it has")
    about = _About(architecture, entries)
    # The last ones guess further tokens; their cache is not saved.
    layers = about.count("block_count") - about.count("nextn_predict_layers", 0)
    if not 0 < layers <= _LAYERS:
        raise NotGguf(f"it has {layers} layers")
    heads = about.each("attention.head_count", layers)
    kv_heads = about.each("attention.head_count_kv", layers, heads)
    key = about.count(
        "attention.key_length", about.count("embedding_length", 0) // (max(heads) or 1)
    )
    running = any(
        name.startswith(tuple(f"{architecture}.{own}" for own in _RUNNING)) for name in entries
    )
    every = about.count("full_attention_interval", 0)
    if every > 1:
        kv_heads = tuple(n if at % every == every - 1 else 0 for at, n in enumerate(kv_heads))
    keys_alone = about.count("attention.key_length_mla", 0) > 0
    window = 0 if architecture in _NO_WINDOW else about.count("attention.sliding_window", 0)
    return Model(
        n_ctx=about.count("context_length", 0),
        kv_heads=kv_heads,
        key_length=key,
        value_length=0 if keys_alone else about.count("attention.value_length", key),
        beside=about.count("attention.indexer.key_length", 0),
        window=window,
        windowed=_windowed(about, layers) if window else (False,) * layers,
        running=running,
    )


def _windowed(about: _About, layers: int) -> tuple[bool, ...]:
    """Which layers have a window; none, so that an estimate is too high, where nobody knows."""
    pattern = about.entry("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) < layers:
            raise NotGguf("its pattern of windows has too few layers")
        return tuple(bool(each) for each in pattern[:layers])
    period = about.count("attention.sliding_window_pattern", _PERIODS.get(about.architecture, 1))
    return tuple(period > 0 and at % period < period - 1 for at in range(layers))


@attrs.frozen
class _About:
    """The entries of one architecture."""

    architecture: str
    entries: Mapping[str, Any]

    def entry(self, name: str) -> Any:
        return self.entries.get(f"{self.architecture}.{name}")

    def count(self, name: str, otherwise: int | None = None) -> int:
        """A number that is no array, and makes sense."""
        found = self.entry(name)
        if found is None and otherwise is not None:
            return otherwise
        return self._sensible(name, found)

    def each(
        self, name: str, layers: int, otherwise: tuple[int, ...] | None = None
    ) -> tuple[int, ...]:
        """A number for each layer."""
        found = self.entry(name)
        if found is None:
            return (0,) * layers if otherwise is None else otherwise
        if not isinstance(found, list):
            return (self._sensible(name, found),) * layers
        if len(found) < layers:
            raise NotGguf(f"{name} has too few layers")
        return tuple(self._sensible(name, each) for each in found[:layers])

    @staticmethod
    def _sensible(name: str, value: Any) -> int:
        if type(value) is not int or not 0 <= value < _LARGEST:
            raise NotGguf(f"{name} is no number that makes sense")
        return value


# --- the entries ----------------------------------------------------------------------------------


@attrs.define
class _Header:
    """Reads a header, in order, and no further than its bounds."""

    _file: BinaryIO
    _room: int = _HEADER
    _elements: int = _ELEMENTS
    _tensors: int = 0

    def entries(self) -> dict[str, Any]:
        """All entries; long texts and arrays of texts are left out."""
        if self._take(4) != b"GGUF":
            raise NotGguf("it does not begin as a GGUF file does")
        version = self._number(_U32)
        if version not in (2, 3):
            raise NotGguf(f"it is of version {version}")
        self._tensors = self._number(_U64)
        count = self._number(_U64)
        if count > _ENTRIES:
            raise NotGguf(f"it has {count} entries")
        found = {}
        for _ in range(count):
            name = self._text()
            value = self._value(self._number(_U32))
            if name and value is not None:
                found[name] = value
        return found

    def reach(self) -> int:
        """Where in the file the last of its tensors begins; -1 without one."""
        alignment = self.entries().get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise NotGguf(f"its alignment is {alignment!r}")
        last = -1
        for _ in range(self._tensors):
            self._text()
            self._skip(self._number(_U32) * _U64.size)
            self._number(_U32)
            last = max(last, self._number(_U64))
        if last < 0:
            return last
        return -(-self._file.tell() // alignment) * alignment + last

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array(self._number(_U32), self._number(_U64))
        return self._number(self._scalar(kind))

    def _array(self, kind: int, count: int) -> list[Any] | None:
        self._elements -= count
        if self._elements < 0:
            raise NotGguf("it has too many elements in its arrays")
        if kind == _STRING:
            for _ in range(count):
                self._skip(self._number(_U64))
            return None
        scalar = self._scalar(kind)
        if count > _LAYERS:
            self._skip(count * scalar.size)
            return None
        return [self._number(scalar) for _ in range(count)]

    def _scalar(self, kind: int) -> Struct:
        if kind not in _SCALARS:
            raise NotGguf(f"it has a value of type {kind}")
        return _SCALARS[kind]

    def _number(self, how: Struct) -> Any:
        return how.unpack(self._take(how.size))[0]

    def _text(self) -> str | None:
        size = self._number(_U64)
        if size > _KEPT_TEXT:
            self._skip(size)
            return None
        return self._take(size).decode("utf-8", "replace")

    def _skip(self, size: int) -> None:
        self._pay(size)
        # To read a few bytes is faster than to seek over them, and sees the end of the file.
        if size <= 4096:
            if len(self._file.read(size)) < size:
                raise NotGguf("it ends within its header")
        else:
            self._file.seek(size, 1)

    def _take(self, size: int) -> bytes:
        self._pay(size)
        taken = self._file.read(size)
        if len(taken) < size:
            raise NotGguf("it ends within its header")
        return taken

    def _pay(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise NotGguf(f"its header has more than {_HEADER} bytes")
