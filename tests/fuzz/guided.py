"""
``python -m tests.fuzz.guided TARGET [OPTION ...]``: one target under atheris, until it is broken.

The options are libFuzzer's (https://llvm.org/docs/LibFuzzer.html#options).  This process imports
nothing of the gateway before atheris looks on.
"""

from __future__ import annotations

import sys
from hashlib import sha1
from pathlib import Path
from random import Random
from typing import Final

import atheris

with atheris.instrument_imports(include=["gateway"]):
    from tests.fuzz.targets import TARGETS

FOLDER: Final = Path("build/fuzz")

#: Seconds that one case may take, MiB that a target may, and bytes of a case.
_BOUNDS: Final = ("-timeout=20", "-rss_limit_mb=2048", "-max_len=4096")

#: One change of so many is one of bytes that atheris makes by itself.
_ITS_OWN: Final = 3


def main(name: str, *options: str) -> None:
    target = TARGETS[name]
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    for seed in (*target.seeds, *target.kept):
        (folder / sha1(seed).hexdigest()).write_bytes(seed)

    def change(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        if random.randrange(_ITS_OWN) == 0:
            mutated: bytes = atheris.Mutate(data, most)
            return mutated
        changed = target.change(data, random)
        return changed if len(changed) <= most else data

    ours = [str(folder), f"-artifact_prefix={folder}/", *_BOUNDS, "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *ours, *options], target.holds, custom_mutator=change)
    atheris.Fuzz()  # it ends the process


main(*sys.argv[1:])
