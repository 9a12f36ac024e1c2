"""Fixtures of real sessions: nothing of the client's prose, and all of its shape."""

from __future__ import annotations

from typing import Any, Final

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.calls import KINDS, understand
from gateway.wire.request import parse
from tests import redacted
from tests.redacted import MARKS, PLACEHOLDER, Call, Recording, Redactor, filled, filler, recordings

Json = Any

CLIENTS: Final = ("2.1.330", "2.1.36")

FIXTURES: Final = sorted(redacted.FOLDER.glob("*.json"))

#: Lines as they occur: prose, marks within it, indents, bare rules, other alphabets.
lines = st.lists(
    st.one_of(
        st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=30),
        st.sampled_from([*MARKS, "<system-reminder>", "  - ", "Hi", "{12:1a2b3c}"]),
    ),
    max_size=4,
).map("".join)
texts = st.lists(lines, max_size=6).map("\n".join)

keys = st.sampled_from(["type", "text", "content", "name", "id", "input", "enum", "data", "a key"])
values: st.SearchStrategy[Json] = st.recursive(
    st.one_of(texts, st.integers(), st.booleans(), st.none()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


def there_and_back(text: str) -> str:
    filled_in = filled(Redactor().text(text))
    assert isinstance(filled_in, str)
    return filled_in


def shape(value: Json) -> Json:
    """What stays of a value: types, keys, numbers, and the lengths of its texts."""
    match value:
        case dict():
            return sorted(((len(key), shape(each)) for key, each in value.items()), key=repr)
        case list():
            return [shape(each) for each in value]
        case str():
            return [len(line) for line in value.split("\n")]
    return value


# --- the redactor ---------------------------------------------------------------------------------


@given(values)
def test_the_shape_stays(value: Json) -> None:
    """There and back, a value has its types, its numbers, and the length of each line."""
    assert shape(filled(Redactor().value(value))) == shape(value)


@given(lines, lines)
def test_equal_lines_stay_equal(one: str, other: str) -> None:
    """Two lines are equal after it if and only if they were before it."""
    assert (Redactor().text(one) == Redactor().text(other)) == (one == other)


@given(*[st.text("ab", min_size=12, max_size=12)] * 2)
def test_different_words_stay_different(one: str, other: str) -> None:
    """Words of the same length are others again if they were others."""
    assert (there_and_back(one) == there_and_back(other)) == (one == other)


@given(texts, texts)
def test_a_common_beginning_stays_common(beginning: str, end: str) -> None:
    """A text that begins with the lines of another does so afterwards, and ends differently."""
    before, after = there_and_back(beginning), there_and_back(f"{beginning}\n{end}")
    assert after.startswith(f"{before}\n")
    assert after[len(before) + 1 :] == there_and_back(end)


@given(st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=40))
def test_no_word_stays(word: str) -> None:
    """Whatever is no mark becomes made-up words."""
    redactions = Redactor().text(f"{word} and so on")
    assert PLACEHOLDER.fullmatch(redactions)


@given(st.integers(1, 300), st.text("0123456789abcdef", min_size=6, max_size=6))
def test_made_up_words(length: int, seed: str) -> None:
    """They are as long as what they stand for, begin and end with a letter, and are no words."""
    said = filler(length, seed)
    assert len(said) == length
    assert said == said.strip()
    assert filler(length, seed, "").isalpha()
    assert all(is_made_up(word) for word in said.split(" "))


def is_made_up(word: str) -> bool:
    """Whether it is of our syllables; the last one may be cut."""
    pairs = [word[at : at + 2] for at in range(0, len(word) - 1, 2)]
    if pairs and pairs[-1] not in redacted.SYLLABLES and len(word) % 2 == 0:
        pairs.pop()  # a blank at the very end became an "a"
    return all(pair in redacted.SYLLABLES for pair in pairs)


def test_marks_stay() -> None:
    """The words by which a call is known are the only ones that stay."""
    said = "Here, <system-reminder>You are evaluating a hook in secret.</system-reminder>"
    kept = PLACEHOLDER.sub("~", Redactor().text(said))
    assert kept == "~, <system-reminder>You are evaluating a hook ~.</system-reminder>"
    named = {"<system-reminder>", "You are evaluating a hook", "</system-reminder>"}
    assert redacted.marks([{"text": said}]) == named


@given(texts)
def test_marks_are_found_again(text: str) -> None:
    """A text has the same marks before, redacted, and after."""
    redactions = Redactor().text(text)
    assert redacted.marks(redactions) == redacted.marks(text)
    assert redacted.marks(filled(redactions)) == redacted.marks(text)


@pytest.mark.parametrize(
    "block",
    [
        "x-anthropic-billing-header: cc_version=2.1.330.1fc; cc_entrypoint=cli;",
        "x-anthropic-billing-header: cc_version=2.1.3.e21; cc_entrypoint=cli; cc_is_subagent=true;",
    ],
)
def test_the_billing_block_stays(block: str) -> None:
    """Its numbers are part of what a prompt begins with."""
    assert Redactor().text(block) == block


def test_ids_are_others_and_the_same_again() -> None:
    """Who a session belongs to is gone; that two calls are of one session is not."""
    session = "0f88ae0f-313c-4b79-9b29-381e339cc76d"
    redactor = Redactor()
    headers = redactor.headers({"x-claude-code-session-id": session, "host": "127.0.0.1"})
    assert headers.keys() == {"x-claude-code-session-id"}
    (other,) = headers.values()
    assert len(other) == len(session)
    assert other != session
    user = redactor.value({"user_id": f"user_{'5' * 64}_account__session_{session}"})
    assert user["user_id"].endswith(f"_session_{other}")
    assert "5" * 8 not in user["user_id"]
    used = redactor.value([{"id": "toolu_abcDEF123"}, {"tool_use_id": "toolu_abcDEF123"}])
    assert used[0]["id"] == used[1]["tool_use_id"] == "toolu_000000003"


@given(st.dictionaries(st.text(max_size=5) | keys, values, max_size=3))
def test_nothing_is_left(value: Json) -> None:
    """In no place of a value is there anything but placeholders, marks and names."""
    assert list(redacted.prose({"tools": {"t1": Redactor().value(value)}})) == []


# --- the fixture ----------------------------------------------------------------------------------


def test_a_fixture_and_back() -> None:
    """What occurs twice stands in a fixture once, and comes back twice."""
    message = {"role": "user", "content": "How many gates?"}
    body = {"system": [{"type": "text", "text": "Count."}], "messages": [message], "tools": []}
    headers = {"user-agent": "claude-cli/9"}
    calls = [Call("Hello", "turn", "/v1/messages", headers, body)] * 2
    made = redacted.fixture("9", {"one": calls})
    assert {len(made[table]) for table in ("headers", "fields", "systems", "messages")} == {1}
    back = redacted.expanded(orjson.loads(redacted.written(made)))
    assert back.client == "9"
    assert back.session("one").calls == back.calls
    for call in back.calls:
        assert (call.step, call.kind, call.path, call.headers) == (
            "Hello",
            "turn",
            "/v1/messages",
            headers,
        )
        assert shape(call.body) == shape(body)
        assert call.body["messages"][0]["content"] != "How many gates?"


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_nothing_of_the_prose_is_left(path: Any) -> None:
    """In what is committed there are placeholders, marks of a few words, and single names."""
    assert list(redacted.prose(orjson.loads(path.read_bytes()))) == []
    assert max(len(mark.split()) for mark in MARKS) <= 8


@pytest.mark.parametrize("key", ["text", "content", "type", "description", "enum", "id", "x-app"])
def test_prose_would_be_found(key: str) -> None:
    """A sentence in any place of a fixture is found."""
    found = list(redacted.prose({"tools": {"t1": {key: ["Ask the guard first."]}}}))
    assert found == ["Ask the guard first."]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_it_is_for_people_to_read(path: Any) -> None:
    """A fixture is small, and written as `written` writes it."""
    text = path.read_text()
    assert len(text) < 400_000
    assert redacted.written(orjson.loads(text)) == text


def test_who_was_recorded() -> None:
    """There is a recording of the newest client, and one of February 2026."""
    assert {each.client for each in recordings()} == set(CLIENTS)


all_recordings = pytest.mark.parametrize("recording", recordings(), ids=lambda each: each.client)


@all_recordings
def test_what_was_recorded(recording: Recording) -> None:
    """Each call is of a known kind, from that client, and a request that we take."""
    for call in recording.calls:
        assert call.kind in KINDS
        assert call.headers["user-agent"].startswith(f"claude-cli/{recording.client} ")
        parse(orjson.dumps(call.body), counting=call.kind == "count")


@all_recordings
def test_the_marks_are_enough(recording: Recording) -> None:
    """Without the prose each call is known for what it is."""
    for call in recording.calls:
        if call.kind != "count":
            request = parse(orjson.dumps(call.body))
            assert understand(request, call.headers).kind == call.kind, call.step
