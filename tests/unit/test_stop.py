"""Text that is safe to show: stop strings over token borders, and whole characters only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_decoder

from axon_llm.engine.stop import StopFinder, TextStream

SMALL = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    finder = StopFinder(stops)
    text = "".join(finder.push(piece) for piece in pieces)
    return text + finder.flush(), finder.stopped


def by_definition(stops: list[str], text: str) -> tuple[str, bool]:
    """Read character by character until some stop string is complete; of several, remove the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(stops=STOPS, pieces=st.lists(SMALL, max_size=8))
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut_into_pieces(
    stops: list[str], pieces: list[str]
) -> None:
    assert run(stops, pieces) == by_definition(stops, "".join(pieces))


@given(stops=STOPS, pieces=st.lists(SMALL, max_size=8))
def test_nothing_shown_is_ever_taken_back(stops: list[str], pieces: list[str]) -> None:
    final, _ = by_definition(stops, "".join(pieces))
    finder, shown = StopFinder(stops), ""
    for piece in pieces:
        shown += finder.push(piece)
        assert final.startswith(shown)


@given(stops=STOPS, pieces=st.lists(SMALL, max_size=8))
def test_no_more_is_held_back_than_a_stop_string_could_begin_with(stops: list[str], pieces: list[str]) -> None:
    finder, shown, given_so_far = StopFinder(stops), "", ""
    for piece in pieces:
        shown += finder.push(piece)
        given_so_far += piece
        if finder.stopped:
            return
        held = given_so_far[len(shown) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_stop_string_over_three_tokens_is_found_and_not_shown() -> None:
    stream = TextStream(byte_decoder(), ["END"])
    shown = [stream.push(token) for token in b"ab END cd"]
    assert "".join(shown) == "ab "
    assert stream.stopped
    assert stream.finish() == ""


def test_text_that_only_looked_like_a_stop_string_comes_out_at_the_end() -> None:
    stream = TextStream(byte_decoder(), ["END"])
    assert "".join(stream.push(token) for token in b"ab EN") == "ab "
    assert stream.finish() == "EN"
    assert not stream.stopped


def test_a_character_over_several_tokens_comes_out_whole() -> None:
    stream = TextStream(byte_decoder())
    shown = [stream.push(token) for token in "né한🙂".encode()]
    assert [text for text in shown if text] == ["n", "é", "한", "🙂"]


def test_a_stop_string_may_be_part_of_characters_that_span_tokens() -> None:
    stream = TextStream(byte_decoder(), ["한🙂"])
    assert "".join(stream.push(token) for token in "a한🙂b".encode()) == "a"
    assert stream.stopped


def test_bytes_left_unfinished_at_the_end_become_replacement_characters() -> None:
    stream = TextStream(byte_decoder())
    assert "".join(stream.push(token) for token in "a🙂".encode()[:-1]) == "a"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
