"""
What a second session in the same folder has to evaluate: the real client, a real model.

``python -m bench.second_session [VERSION ...]`` runs two sessions of each Claude Code (as
``bin/get-clients`` installs them) on SmolLM2 with a window of 32K tokens: a plain KV cache, as
large models have it, and a template in GLM's order.  A first prompt takes minutes here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from gateway.llama import embedded
from tests.e2e.clients import VERSIONS, Client
from tests.e2e.stack import GLM_ORDER, SMOLLM, Running, start_gateway, start_server
from tests.e2e.test_claude_code import ONE_SENTENCE, Log
from tests.e2e.test_second_session import two_sessions

WINDOW: Final = 32768

#: Seconds for each session.
PATIENCE: Final = 3600


def main() -> int:
    """A table, a row each version; the exit status."""
    print(
        f"{'client':<10} {'session':<8} {'prompt':>8} {'evaluated':>10} {'share':>8} {'seconds':>8}"
    )
    for version in sys.argv[1:] or VERSIONS:
        with tempfile.TemporaryDirectory() as name:
            measure(version, Path(name))
    return 0


def measure(version: str, folder: Path) -> None:
    """Both sessions of one client on a server of their own."""
    model = with_window(folder / "model.gguf")
    flags = ("--model", str(model), *GLM_ORDER, "--ctx-size", str(WINDOW), "--threads", "2")
    server = start_server(folder, "server", *flags, "--slot-prompt-similarity", "0")
    gateway: Running | None = None
    try:
        (folder / "gateway").mkdir()
        gateway = start_gateway(folder / "gateway", {"main": {"url": server.url, "slots": 1}})
        log = Log.of(gateway)
        client = Client.of(version, gateway, folder, ONE_SENTENCE)
        # A tiny model may need a second turn to end; the first one of each session counts.
        ended = [len(log.ended("turn")) for _ in two_sessions(client, PATIENCE)]
        turns = log.ended("turn")
    finally:
        if gateway is not None:
            gateway.stop()
        server.stop()
    for session, turn in (("first", turns[0]), ("second", turns[ended[0]])):
        prompt = turn["input"] + turn["cached"]
        row = f"{prompt:>8} {turn['input']:>10} {turn['input'] / prompt:>8.2%} {turn['took']:>8.1f}"
        print(f"{version:<10} {session:<8} {row}", flush=True)


def with_window(copy: Path) -> Path:
    """A copy of SmolLM2 that says it was trained with `WINDOW` tokens; a slot gets no more."""
    shutil.copyfile(embedded.model_file(SMOLLM[1]), copy)
    set_metadata = Path(sys.executable).with_name("gguf-set-metadata")
    command = [str(set_metadata), str(copy), "llama.context_length", str(WINDOW), "--force"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return copy


if __name__ == "__main__":
    sys.exit(main())
