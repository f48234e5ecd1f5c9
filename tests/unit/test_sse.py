import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axon_llm.serving import sse


def test_an_event_is_one_data_line_and_an_empty_one() -> None:
    assert sse.encode({"a": 1}) == b'data: {"a":1}\n\n'


def test_a_sequence_number_follows_the_data_as_the_events_id() -> None:
    assert sse.encode({"a": 1}, 7) == b'data: {"a":1}\nid: 7\n\n'


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_no_text_can_break_out_of_its_line(text: str) -> None:
    event = sse.encode({"text": text}).decode("ascii")
    assert len(event.splitlines()) == 2  # by any language's idea of a line
    assert json.loads(event.removeprefix("data: ")) == {"text": text}


@pytest.mark.parametrize("constant", [sse.DONE, sse.HEARTBEAT])
def test_what_is_no_json_ends_an_event_too(constant: bytes) -> None:
    assert constant.endswith(b"\n\n")
    assert b"\r" not in constant
