"""A headless Chromium in front of the real page of an invented gateway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.remote.webdriver import WebDriver

from gateway.dispatch import Dispatch
from gateway.web.access import Access
from gateway.web.api import Api
from gateway.web.connections import site

#: What looks for barriers (bin/get-clients).
AXE: Final = Path(__file__).parents[2] / ".cache/clients/axe/node_modules/axe-core/axe.min.js"

#: It asks nobody outside, and writes nothing outside its own folder.
_QUIET: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
    "--hide-scrollbars",
)


@contextmanager
def chromium(folder: Path, *, script: bool = True) -> Iterator[WebDriver]:
    """
    A browser with a new profile in `folder`, with scripts or without.

    It blocks: use it in a thread where the page comes from this process.
    """
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*_QUIET, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if not script:
        no_script = {"profile.managed_default_content_settings.javascript": 2}
        options.add_experimental_option("prefs", no_script)
    browser = Chrome(options, ChromeService("/usr/bin/chromedriver"))
    browser.set_script_timeout(120)  # the search for barriers is long, on a busy machine
    try:
        yield browser
    finally:
        browser.quit()


def show(browser: WebDriver, *, dark: bool = False, width: int = 1280, height: int = 900) -> None:
    """Be a screen of so many pixels, in light or dark."""
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    command = cast(Any, browser).execute_cdp_cmd
    command("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    command("Emulation.setEmulatedMedia", {"features": [scheme]})


def serve(scene: Any, reactor: Any, token: str | None = None) -> Any:
    """The page of `scene` on a port of its own: `getHost().port` of what is returned."""
    api = Api(cast(Dispatch, scene), "0.1.0")
    door = site(api.app.resource(), Access(token, (), 1024 * 1024), reactor)
    return reactor.listenTCP(0, door, interface="127.0.0.1")
