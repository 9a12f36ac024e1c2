"""
What a newcomer waits for: a fresh clone, a fresh HOME, ``make run``, the first answers.

``python -m bench.first_run`` clones this repository into a temporary folder and does there what
README says, twice: cold, and a second time.  With ``--claude PATH`` the real Claude Code asks too.
It needs the network that pip needs, and ports 9090 to 9092.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shlex import quote
from typing import Final
from urllib.request import Request, urlopen

ROOT: Final = Path(__file__).parents[1]
URL: Final = "http://127.0.0.1:9090"
HELLO: Final = {
    "model": "any",
    "max_tokens": 30,
    "messages": [{"role": "user", "content": "hello"}],
}
LAST_LINE: Final = "claudegw claude"


def main() -> int:
    """Both rounds; the exit status."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--claude", type=Path, help="a Claude Code to ask with")
    claude = options.parse_args().claude
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clone = folder / "claudegw"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        (folder / "home").mkdir()
        env = {"HOME": str(folder / "home"), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        for which in ("cold", "second"):
            print(f"{which}:")
            run(clone, env, claude)
    return 0


def run(clone: Path, env: dict[str, str], claude: Path | None) -> None:
    """``make run`` once, from the command to its end, with the seconds of each step."""
    began = time.monotonic()
    log = clone.parent / "make.log"
    with log.open("wb") as out:
        make = subprocess.Popen(
            ["make", "run"], cwd=clone, env=env, stdout=out, stderr=out, start_new_session=True
        )
    try:
        command = last_line(make, log)
        print(f"  make run is ready after          {time.monotonic() - began:6.1f} s")
        print(f"  its last line                    {command}")
        asked = time.monotonic()
        answer = urlopen(Request(f"{URL}/v1/messages", json.dumps(HELLO).encode()))
        size = len(json.loads(answer.read())["content"][0]["text"])
        took = time.monotonic() - asked
        print(f"  a first answer takes             {took:6.1f} s ({size} bytes)")
        if claude is not None:
            asked = time.monotonic()
            said = ask_claude(command, claude, env)
            print(f"  claude -p hello takes            {time.monotonic() - asked:6.1f} s ({said})")
    finally:
        os.killpg(make.pid, signal.SIGTERM)
        print(f"  make run ends with               {make.wait()}")


def last_line(make: subprocess.Popen[bytes], log: Path) -> str:
    """What `make run` says to type next, once it says so."""
    while True:
        lines = log.read_text().splitlines()
        if lines and LAST_LINE in lines[-1]:
            return lines[-1].strip()
        if make.poll() is not None:
            sys.exit("make run ended:\n" + "\n".join(lines[-20:]))
        time.sleep(0.2)


def ask_claude(command: str, claude: Path, env: dict[str, str]) -> str:
    """Type what `make run` said, with ``-p hello``; gives the exit status and the answer's size."""
    line = f"{command} --client {quote(str(claude.absolute()))} -p hello"
    done = subprocess.run(
        ["bash", "-c", line],
        env=env,
        cwd=env["HOME"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    return f"exit {done.returncode}, {len(done.stdout)} bytes"


if __name__ == "__main__":
    sys.exit(main())
