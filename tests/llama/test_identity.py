"""What a snapshot belongs to: what tells servers apart, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import MIB
from gateway.llama.identity import ModelFile, flags_identity, server_identity


def test_a_model_file_is_known_by_its_beginning(tmp_path: Path) -> None:
    """And by path, size and time of change."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"a" * 2 * MIB)
    other.write_bytes(b"a" * MIB + b"b" * MIB)
    found = ModelFile.of(one)
    assert (found.path, found.size) == (str(one), 2 * MIB)
    assert found == ModelFile.of(one)
    assert found.header == ModelFile.of(other).header
    other.write_bytes(b"b" * 2 * MIB)
    assert found.header != ModelFile.of(other).header
    with pytest.raises(OSError, match="nowhere"):
        ModelFile.of(tmp_path / "nowhere")


def test_a_program_is_known_by_its_bytes(tmp_path: Path) -> None:
    """With the libraries beside it; the wheel by its version."""
    binary = tmp_path / "llama-server"
    binary.write_bytes(b"#!/bin/sh\n")
    binary.chmod(0o700)
    command = [str(binary), "-m", "a.gguf"]
    seen = {server_identity(command)}
    (tmp_path / "libllama.so").write_bytes(b"1")
    seen.add(server_identity(command))
    (tmp_path / "libllama.so").write_bytes(b"22")
    seen.add(server_identity(command))
    binary.write_bytes(b"#!/bin/sh\n#")
    seen.add(server_identity(command))
    assert len(seen) == 4
    assert server_identity(["python", "-m", "gateway.llama.embedded"]).startswith("xllamacpp 2")
    with pytest.raises(OSError, match="no such program"):
        server_identity([str(tmp_path / "nowhere")])


def test_options_that_tell() -> None:
    """Those that say where a server listens and how fast it is do not; any other may."""
    plain = flags_identity(["llama-server", "-m", "a.gguf", "--port", "1", "--api-key", "secret"])
    embedded = ["/bin/python", "-m", "gateway.llama.embedded", "--port=2", "--metrics", "-t", "4"]
    assert flags_identity(embedded) == plain
    others = [
        flags_identity(["llama-server", "-ctk", "q8_0"]),
        flags_identity(["llama-server", "--lora", "a"]),
        flags_identity(["llama-server", "--lora", "b"]),
        flags_identity(["llama-server", "--metrics", "--swa-full"]),
        flags_identity(["llama-server"], {"LLAMA_ARG_CACHE_TYPE_K": "q8_0", "HOME": "/"}),
    ]
    assert len({plain, *others}) == 6
    assert flags_identity(["llama-server"], {"HOME": "/"}) == plain
    assert flags_identity(["llama-server"], {"LLAMA_API_KEY": "secret"}) == plain
