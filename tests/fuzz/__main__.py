"""
``python -m tests.fuzz [TARGET ...] [--seconds N] [--cases N]``: as many cases as one likes.

Each target runs in a process of its own, under atheris (https://github.com/google/atheris), which
keeps the cases that reach what no other did in ``build/fuzz/TARGET``.  A case that breaks a promise
stays beside them as ``crash-...``; it goes into ``kept`` of its target once it is understood.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--cases", type=int, default=-1, help="of each target at most")
    given = parser.parse_args()
    unknown = ", ".join(name for name in given.targets if name not in TARGETS)
    if unknown:
        parser.error(f"no target {unknown}; there are {', '.join(TARGETS)}")
    bounds = [f"-max_total_time={given.seconds}", f"-runs={given.cases}"]
    total = broken = 0
    for name in given.targets or TARGETS:
        command = [sys.executable, "-m", "tests.fuzz.guided", name, *bounds]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"number_of_executed_units: +(\d+)", ended.stderr)
        cases = int(found[1]) if found else 0
        total += cases
        verdict = "held" if ended.returncode == 0 else "BROKEN"
        print(f"{name:10} {cases:9} cases  {verdict}", flush=True)
        if ended.returncode != 0:
            broken += 1
            print(ended.stdout[-3000:], ended.stderr[-4000:], sep="\n", flush=True)
    print(f"{'all':10} {total:9} cases")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
