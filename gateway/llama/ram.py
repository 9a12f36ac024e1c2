"""
How much RAM the conversations may have that wait beside a slot (``--cache-ram``).

llama-server drops a state that is larger than the whole budget without a word, and its default of
8 GiB is one full context of a large model.  So the budget is counted in contexts: four full ones
where the machine has them to spare, and one at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import psutil
from twisted.logger import Logger

from gateway.config import MIB
from gateway.llama import embedded, gguf
from gateway.llama.command import option
from gateway.llama.state_files import measured

#: Full contexts that are kept, and the part of what the model leaves of the machine that they may
#: take at most.
_CONTEXTS: Final = 4
_PART: Final = 4

log = Logger()


def budget(context: int, machine: int, model: int) -> int:
    """
    MiB for the conversations of a server.

    Args:
        context: bytes of the state of one full context.
        machine: bytes of RAM of the machine.
        model: bytes of the model's file.
    """
    most = max(0, machine - model) // _PART
    return -(-max(context, min(_CONTEXTS * context, most)) // MIB)


def of_command(command: Sequence[str], slots: int, folder: Path) -> int | None:
    """
    As `budget`, for the server of a command line; None where its model cannot be read.

    The model's header says what a token takes, and states of it that were saved in `folder` say it
    better.
    """
    try:
        path = embedded.model_file(option(command, "--model", "-m") or "")
        model, size = gguf.read(path), path.stat().st_size
        kinds = [option(command, *names) or "f16" for names in _CACHE_TYPES]
        tokens = int(option(command, "--ctx-size", "-c") or 0) // slots or model.n_ctx
        context = max(model.state_bytes(tokens, *kinds), int(tokens * measured(folder, path)))
    except (OSError, ImportError, ValueError, gguf.NotGguf) as error:
        log.debug("cannot size the cache in RAM: {error}", error=str(error))
        return None
    return budget(context, psutil.virtual_memory().total, size)


_CACHE_TYPES: Final = (("--cache-type-k", "-ctk"), ("--cache-type-v", "-ctv"))
