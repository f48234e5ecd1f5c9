"""Drafting from the sequence's own past."""

from __future__ import annotations

from axon_llm.engine.prompt_lookup import PromptLookup


def test_the_tokens_after_the_latest_earlier_occurrence_are_drafted() -> None:
    lookup = PromptLookup([1, 2, 3, 9, 9, 1, 2, 4, 5, 6, 1, 2])
    assert lookup.draft(3) == [4, 5, 6]


def test_a_longer_match_beats_a_later_shorter_one() -> None:
    lookup = PromptLookup([7, 1, 2, 3, 0, 8, 1, 2, 5, 0, 7, 1, 2])
    assert lookup.draft(1) == [3]


def test_nothing_is_drafted_from_a_single_repeated_token() -> None:
    assert PromptLookup([5, 6, 7, 8, 5]).draft(4) == []


def test_a_loop_is_drafted_to_go_on() -> None:
    assert PromptLookup([1, 2, 3, 1, 2, 3, 1, 2, 3]).draft(5) == [1, 2, 3, 1, 2]


def test_appending_one_by_one_equals_starting_with_everything() -> None:
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4]
    grown = PromptLookup()
    for token in tokens:
        grown.append(token)
    assert grown.draft(4) == PromptLookup(tokens).draft(4) == [1, 5, 9, 2]
