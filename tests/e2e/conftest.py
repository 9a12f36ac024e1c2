"""What the end-to-end tests share: two real servers, started once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.stack import GEMMA, SMOLLM, Running, gateway_of_kind, start_server

HAIKU = '\n\n[[route]]\nmodel = "*haiku*"\ntier = "small"\n'


@pytest.fixture(scope="session")
def main_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Gemma 3 270M with the demo's template: one slot of 32K."""
    flags = (*GEMMA, "--ctx-size", "32768", "--batch-size", "256", "--alias", "gemma")
    server = start_server(
        tmp_path_factory.mktemp("main"), "main", *flags, "--slot-prompt-similarity", "0"
    )
    yield server
    server.stop()


@pytest.fixture(scope="session")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """SmolLM2 135M with its own template: two slots of 4K."""
    flags = (*SMOLLM, "--ctx-size", "8192", "--parallel", "2", "--alias", "smollm2")
    server = start_server(tmp_path_factory.mktemp("small"), "small", *flags)
    yield server
    server.stop()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module that names ``GATEWAYS`` has its tests run on a gateway of each, but for some."""
    kinds = getattr(metafunc.module, "GATEWAYS", None)
    marks = metafunc.definition.iter_markers("parametrize")
    says_itself = any("kind" in mark.args[0] for mark in marks)
    if kinds is not None and "kind" in metafunc.fixturenames and not says_itself:
        metafunc.parametrize("kind", kinds, indirect=True, scope="module")


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    """What the tiers of the gateway are; a parameter of its own makes it another kind."""
    return str(getattr(request, "param", "llama-server"))


@pytest.fixture(scope="module")
def gateway(
    kind: str,
    main_server: Running,
    small_server: Running,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """A gateway in front of both servers."""
    folder: Path = tmp_path_factory.mktemp("gateway")
    tiers = {
        "main": {"url": main_server.url, "slots": 1},
        "small": {"url": small_server.url, "slots": 2},
    }
    with gateway_of_kind(kind, folder, tiers, HAIKU) as running:
        yield running
