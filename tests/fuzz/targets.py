"""All targets, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.fuzz import Target, files, http, requests, streams

TARGETS: Final[Mapping[str, Target]] = {
    target.name: target
    for target in (
        *(streams.SSE, streams.ANSWERS, streams.CHUNKED, streams.BARE),
        *(requests.MESSAGES, requests.OPENAI, requests.SCHEMAS),
        *(files.TOML, files.TABLES, files.SIDECARS, files.GGUF, files.LOGLINES),
        http.HTTP,
    )
}
