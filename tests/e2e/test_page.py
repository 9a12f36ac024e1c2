"""The page in a real browser, in front of an invented gateway."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.wait import WebDriverWait
from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from tests.e2e.chromium import AXE, chromium, serve, show
from tests.scene import Scene, call

pytestmark = pytest.mark.browser

#: Seconds for what must come at once, on a busy machine.
_PATIENCE: Final = 20


async def look(
    folder: Path,
    what: Callable[[WebDriver, str], None],
    scene: Scene | None = None,
    *,
    script: bool = True,
    token: str | None = None,
) -> Scene:
    """Let `what` look at the page of `scene`, whose address it is given, and return the scene."""
    scene = scene or Scene(reactor)
    door = serve(scene, reactor, token)
    url = f"http://127.0.0.1:{door.getHost().port}/"

    def visit() -> None:
        with chromium(folder, script=script) as browser:
            what(browser, url)

    try:
        await deferToThread(visit)
    finally:
        await door.stopListening()
    return scene


def words(browser: WebDriver, of: str = "body") -> str:
    return browser.find_element(By.CSS_SELECTOR, of).text


def until(browser: WebDriver, seen: Callable[[WebDriver], Any]) -> None:
    """Wait for it; what was found may belong to a page that another one replaces meanwhile."""
    WebDriverWait(browser, _PATIENCE, 0.02, [StaleElementReferenceException]).until(seen)


def mistakes(browser: WebDriver) -> list[Any]:
    """What its console says, but for what it says of Chromium's own pages."""
    said = cast(Any, browser).get_log("browser")
    return [each for each in said if not each["message"].startswith("chrome://")]


async def test_it_is_live_and_its_console_is_silent(tmp_path: Path) -> None:
    """What changes at the gateway changes on the page; nothing that it loads is refused to it."""
    scene = Scene(reactor)

    def visit(browser: WebDriver, url: str) -> None:
        browser.get(url)
        until(browser, lambda browser: words(browser, "#live") == "Live")
        assert "49 %" in words(browser, "#running")
        scene.said["calls"][0]["progress"]["fraction"] = 0.77
        until(browser, lambda browser: "77 %" in words(browser, "#running"))
        bar = browser.find_element(By.CSS_SELECTOR, "progress")
        assert bar.get_attribute("value") == "0.77"
        scene.said["calls"] = []
        until(browser, lambda browser: "No call is under way" in words(browser, "#running"))
        assert mistakes(browser) == []

    await look(tmp_path, visit, scene)


async def test_what_is_used_stays_as_it_is(tmp_path: Path) -> None:
    """A button keeps its focus, and what was opened stays open, while other things change."""
    scene = Scene(reactor)

    def visit(browser: WebDriver, url: str) -> None:
        browser.get(url)
        until(browser, lambda browser: words(browser, "#live") == "Live")
        browser.find_element(By.CSS_SELECTOR, "#tier-main .restart summary").click()
        button = browser.find_element(By.CSS_SELECTOR, "#run-req_" + f"{1:032x} button")
        browser.execute_script("arguments[0].focus()", button)
        before = call(99, outcome="running", took=9.0)
        scene.said["calls"] = [before, *scene.said["calls"]]
        scene.said["tiers"]["main"]["waiting"] = 17
        until(browser, lambda browser: "17" in words(browser, "#tier-main"))
        until(browser, lambda b: len(b.find_elements(By.CSS_SELECTOR, "#running tbody tr")) == 2)
        assert browser.switch_to.active_element == button
        assert "Restart it now" in words(browser, "#tier-main")

    await look(tmp_path, visit, scene)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
async def test_it_has_no_barriers(tmp_path: Path, width: int, dark: bool) -> None:
    """axe-core finds none, with everything opened, and nothing is wider than the screen."""

    def visit(browser: WebDriver, url: str) -> None:
        show(browser, dark=dark, width=width)
        browser.get(url)
        until(browser, lambda browser: words(browser, "#live") == "Live")
        browser.execute_script(
            "for (const each of document.querySelectorAll('details')) each.open = true"
        )
        browser.execute_script(AXE.read_text())
        found = browser.execute_async_script("axe.run().then(arguments[0])")
        assert len(found["passes"]) > 20  # it has looked
        assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script("return innerWidth") == width

    await look(tmp_path, visit)


async def test_it_works_without_a_script(tmp_path: Path) -> None:
    """All is there at once, and the buttons work."""

    def visit(browser: WebDriver, url: str) -> None:
        browser.get(url)
        said = words(browser)
        assert "49 %, 2:53 min left" in said
        assert "Look again" in said
        browser.find_element(By.CSS_SELECTOR, "#running button").click()
        until(browser, lambda browser: "No call is under way" in words(browser))
        assert browser.current_url == url

    scene = await look(tmp_path, visit, script=False)
    assert scene.ended == [f"req_{1:032x}"]


async def test_the_token_is_a_password(tmp_path: Path) -> None:
    """A browser that was told it once shows it for the stream and the buttons too."""

    def visit(browser: WebDriver, url: str) -> None:
        browser.get(url.replace("//", "//me:sesame@"))
        browser.get(url)
        until(browser, lambda browser: words(browser, "#live") == "Live")
        browser.find_element(By.CSS_SELECTOR, "#running button").click()
        until(browser, lambda browser: "No call is under way" in words(browser))

    scene = await look(tmp_path, visit, token="sesame")
    assert scene.ended == [f"req_{1:032x}"]


async def test_another_page_on_this_machine_cannot_press_a_button(tmp_path: Path) -> None:
    """Neither with a form nor with a script, from another port of the same host."""
    scene = Scene(reactor)
    attacked = serve(scene, reactor)
    target = f"http://127.0.0.1:{attacked.getHost().port}/page/calls/req_{1:032x}/cancel"

    def visit(browser: WebDriver, url: str) -> None:
        browser.get(url + "healthz")
        browser.execute_script(
            "const form = document.createElement('form'); form.method = 'post';"
            "form.action = arguments[0]; document.body.append(form); form.submit()",
            target,
        )
        until(browser, lambda browser: "permission_error" in browser.page_source)
        browser.get(url + "healthz")
        tried = browser.execute_async_script(
            "fetch(arguments[0], {method: 'POST', mode: 'no-cors'}).then(() => arguments[1](1))",
            target,
        )
        assert tried == 1

    try:
        await look(tmp_path, visit)
    finally:
        await attacked.stopListening()
    assert scene.ended == []
