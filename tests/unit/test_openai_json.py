import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axon_llm.serving.http_errors import ApiError
from axon_llm.serving.http_json import MAX_DEPTH, parse_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), VALUES, max_size=5))
def test_every_plain_object_is_read_as_it_was_written(value: dict[str, object]) -> None:
    for ascii_only in (True, False):
        assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_a_400(body: bytes) -> None:
    refused: ApiError | None = None
    try:
        assert isinstance(parse_object(body), dict)
    except ApiError as error:
        refused = error
    assert refused is None or (refused.status, refused.code) == (400, "invalid_json")


def nested(depth: int, text: str = "") -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + json.dumps(text).encode() + b"]" * (depth - 1) + b"}"


def test_depth_is_limited_exactly() -> None:
    parse_object(nested(MAX_DEPTH))
    with pytest.raises(ApiError, match="nested"):
        parse_object(nested(MAX_DEPTH + 1))


def test_brackets_in_strings_are_no_depth() -> None:
    text = '[{"' * 1000 + "\\"
    assert parse_object(json.dumps({"a": text}).encode()) == {"a": text}


@pytest.mark.parametrize("body", [b'{"a": "\\ud83d\\ude00"}', b'{"a": "\\u0000"}', b' {"a": 1} '])
def test_whole_surrogate_pairs_and_control_characters_are_text(body: bytes) -> None:
    assert set(parse_object(body)) == {"a"}


def test_a_refusal_does_not_repeat_what_was_sent() -> None:
    for body in (b'{"secret', b'{"secret": NaN}', b'{"secret": 1, "secret": 2}', b'["secret"]', b'{"secret": 1e999}'):
        with pytest.raises(ApiError) as caught:
            parse_object(body)
        assert "secret" not in caught.value.message
