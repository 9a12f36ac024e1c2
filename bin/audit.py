"""
Asks whether what a user installs has a known vulnerability.

``make audit`` looks at the packages that claudegw needs, and its demo, in the versions that are
installed here; not at what tests and documentation need.  pip-audit asks the service, and is told
further arguments of ours.  One that is known is an error.  A service that cannot be asked, or that
does not know a package, is said in a line and is none: nobody's build should hang on it, and a
silence should not look like an answer.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution
from tempfile import NamedTemporaryFile
from typing import Any, Final

import orjson
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Json = Any

#: What a user installs.
_OURS: Final = "claudegw[demo]"

#: Seconds that the service gets for one answer, and for all of them.
_PATIENCE: Final = 15
_AT_MOST: Final = 300


def needed(wanted: str = _OURS) -> dict[str, str]:
    """Name and version of each package that `wanted` needs, itself aside."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    left = [Requirement(wanted)]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            there = distribution(name)
            found[name] = there.version
            left += [
                each for each in map(Requirement, there.requires or ()) if _is_for(each, extra)
            ]
    del found[canonicalize_name(Requirement(wanted).name)]
    return found


def _is_for(requirement: Requirement, extra: str) -> bool:
    """Whether it is needed here, for an extra or, with "", without."""
    marker = requirement.marker
    if marker is None:
        return not extra
    return marker.evaluate({"extra": extra}) and (not extra or not marker.evaluate({"extra": ""}))


def asked(packages: dict[str, str], arguments: Sequence[str]) -> tuple[Json, str]:
    """What pip-audit says of `packages`, None where that is nothing, and its last words."""
    with NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}=={version}\n" for name, version in packages.items()))
        file.flush()
        how = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
        command = [sys.executable, "-m", "pip_audit", *how, "--timeout", str(_PATIENCE)]
        command += ["--requirement", file.name, *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_AT_MOST
            )
        except subprocess.TimeoutExpired:
            return None, f"no answer in {_AT_MOST} seconds"
    try:
        said = orjson.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = None
    return said, done.stderr.strip().rpartition("\n")[2]


def report(said: Json, why: str, count: int) -> Iterator[tuple[str, bool]]:
    """Lines for people, each with whether it is an error."""
    if said is None:
        yield f"the service could not be asked, nothing was looked at: {why[:300]}", False
        return
    for each in said:
        for known in each.get("vulns", ()):
            mended = ", ".join(known["fix_versions"]) or "no version yet"
            yield f"{each['name']} {each['version']}: {known['id']}, mended in {mended}", True
    unknown = [each["name"] for each in said if "skip_reason" in each]
    if unknown:
        yield f"the service says nothing of {len(unknown)} of {count}: {', '.join(unknown)}", False
    yield f"{len(said) - len(unknown)} of {count} packages were looked at", False


def main(arguments: Sequence[str]) -> int:
    """Print what is known; 1 for a vulnerability."""
    packages = needed()
    lines = list(report(*asked(packages, arguments), len(packages)))
    for line, _ in lines:
        print(f"audit: {line}")
    return int(any(is_wrong for _, is_wrong in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
