"""
The pictures of the page in README.rst: ``python -m bench.pictures`` writes them to docs/.

The scene is invented, the page is the real one, in a headless Chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.task import react
from twisted.internet.threads import deferToThread

from tests.e2e.chromium import chromium, serve, show
from tests.scene import Scene

#: Each picture: whether it is dark, and pixels wide and high.
PICTURES: Final = {
    "page-light": (False, 1200, 1045),
    "page-dark": (True, 1200, 1045),
    "page-small": (False, 360, 1045),
}


def take(url: str, folder: Path) -> None:
    """Take all pictures of the page at `url`."""
    with TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        browser.get(url)
        for name, (dark, width, height) in PICTURES.items():
            show(browser, dark=dark, width=width, height=height)
            picture = folder / f"{name}.png"
            picture.write_bytes(browser.get_screenshot_as_png())
            print(f"{picture}: {picture.stat().st_size // 1000} kB")


async def pictures(reactor: Any, folder: str = "docs") -> None:
    """Serve the scene and take its pictures."""
    door = serve(Scene(reactor), reactor)
    url = f"http://127.0.0.1:{door.getHost().port}/"
    await deferToThread(take, url, Path(folder))


def main(reactor: Any, *arguments: str) -> Deferred[None]:
    """As a command: into which folder, if not docs."""
    return Deferred.fromCoroutine(pictures(reactor, *arguments))


if __name__ == "__main__":
    react(main, sys.argv[1:])
