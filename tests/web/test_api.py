"""The Messages API over HTTP, on a gateway in memory."""

from __future__ import annotations

from tests.house import HELLO, Household, turn


def test_a_turn_is_answered_as_one_message() -> None:
    """Without `stream` the answer is one JSON message with the client's own model name."""
    house = Household.built()
    browser = house.ask(turn())
    house.main.held[0].answer()
    house.settle()
    assert browser.status == 200
    assert browser.headers["x-claudegw-tier"] == "main"
    assert browser.headers["x-claudegw-call"] == "turn"
    assert browser.headers["request-id"].startswith("req_")
    assert browser.json | {"id": ""} == {
        "id": "",
        "type": "message",
        "role": "assistant",
        "model": "my-model",
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": 1,
        },
    }
    assert browser.json["id"].startswith("msg_")


def test_a_turn_is_streamed() -> None:
    """With `stream` the events come as they are generated."""
    house = Household.built()
    browser = house.ask(turn(stream=True))
    (held,) = house.main.held
    held.begin()
    house.settle()
    assert browser.status == 200
    assert browser.headers["content-type"].startswith("text/event-stream")
    assert browser.events == []
    held.send(*HELLO[:3])
    house.settle()
    kinds = [event["type"] for event in browser.events]
    assert kinds == ["message_start", "content_block_start", "content_block_delta"]
    held.send(*HELLO[3:])
    held.finish()
    house.settle()
    assert [event["type"] for event in browser.events[3:]] == [
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert browser.ended
