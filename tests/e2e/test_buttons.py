"""What the buttons of the page do to a real gateway with a real server of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.callers import ANSWERED
from tests.e2e.clients import eventually
from tests.e2e.stack import SMOLLM, free_port, start_gateway
from tests.e2e.test_restart import PATIENCE, Stand

pytestmark = pytest.mark.server

LONG = "The north gate of the old city is made of oak and iron. " * 60


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    """With the flags that the gateway adds, so that the slot can be saved."""
    port = free_port()
    words = ["python", "-m", "gateway.llama.embedded", *SMOLLM, "--ctx-size", "4096"]
    server = {"command": [*words, "--port", str(port)]}
    main = {"url": f"http://127.0.0.1:{port}", "server": server}
    stand = Stand(tmp_path, start_gateway(tmp_path, {"main": main}), port)
    yield stand
    stand.gateway.stop()


def press(stand: Stand, button: str) -> str:
    """What a browser that posts this from the page is told: "" if all is well."""
    origin = {"origin": stand.gateway.url, "host": stand.gateway.url.removeprefix("http://")}
    status, page = stand.gateway.ask_raw(f"/page/{button}", {}, origin)
    assert (status == 303) == (not page)
    return page.decode().partition('class="notice">')[2].partition("<")[0]


def calls(stand: Stand, outcome: str) -> list[Any]:
    status = stand.gateway.ask("/status")[1]
    return [call for call in [*status["calls"], *status["last"]] if call["outcome"] == outcome]


def test_a_slot_is_saved_by_hand(stand: Stand, tmp_path: Path) -> None:
    """Long before it would have been; a restart by hand then gives it back."""
    pid = stand.until_ready()
    caller = stand.ask(LONG + "What is it made of?")
    assert caller.over().saw == [ANSWERED]
    assert press(stand, "tiers/main/save") == ""
    assert stand.main["cache"]["snapshots"] == 1
    assert list((tmp_path / "slots").rglob("*"))
    assert "saved already" in press(stand, "tiers/main/save")
    assert press(stand, "tiers/main/restart") == ""
    assert eventually(lambda: stand.main["process"]["pid"] not in (None, pid), PATIENCE)
    assert eventually(lambda: stand.main["cache"]["restores_total"] == 1, PATIENCE)


def test_a_restart_by_hand_loses_no_call(stand: Stand) -> None:
    """The one that is in prefill is sent again to the new server."""
    stand.until_ready()
    caller = stand.ask(LONG + "Whose is it?")
    assert eventually(lambda: calls(stand, "running") != [], PATIENCE, 0.01)
    assert press(stand, "tiers/main/restart") == ""
    assert caller.over().saw == [ANSWERED]
    assert [call["resent"] for call in calls(stand, "answered")] == [1]


def test_a_call_is_ended_by_hand(stand: Stand) -> None:
    """Its client does not get it by asking again, and the slot is free for the next one."""
    stand.until_ready()
    caller = stand.a_long_answer()
    (call,) = calls(stand, "running")
    assert press(stand, f"calls/{call['id']}/cancel") == ""
    assert caller.over().saw == ["invalid_request_error", "400"]
    stand.until(running=0, settling=0)
    assert [each["id"] for each in calls(stand, "ended by hand")] == [call["id"]]
    assert caller.is_lost
    assert stand.ask("Hello.").over().saw == [ANSWERED]
