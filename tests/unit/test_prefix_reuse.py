"""What slots remember, who may have it, and what is forgotten first."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from axon_llm.engine.slots import MIN_MOVED, SlotTable, common_prefix


class Ledger:
    """Stands for the cache: each slot is a list that says, per position, which tokens its keys were computed from."""

    def __init__(self, count: int) -> None:
        self.rows: list[list[tuple[int, ...] | None]] = [[] for _ in range(count)]
        self.moved = 0

    def copy(self, source: int, target: int, length: int) -> None:
        self.rows[target][:length] = self.rows[source][:length]
        self.moved += length

    def swap(self, one: int, other: int, length: int) -> None:
        a, b = self.rows[one], self.rows[other]
        a[:length], b[:length] = b[:length], a[:length]
        self.moved += 2 * length

    def erase(self, slot: int) -> None:
        self.rows[slot] = []

    def write(self, slot: int, position: int, tokens: list[int]) -> None:
        row = self.rows[slot]
        row.extend([None] * (position + 1 - len(row)))
        row[position] = tuple(tokens[: position + 1])

    def holds(self, slot: int, tokens: list[int]) -> bool:
        return all(self.rows[slot][i] == tuple(tokens[: i + 1]) for i in range(len(tokens)))


def table(count: int = 3) -> tuple[SlotTable, Ledger]:
    ledger = Ledger(count)
    return SlotTable(count, ledger), ledger


def run(slots: SlotTable, ledger: Ledger, tokens: list[int]) -> tuple[int, int]:
    """Let a sequence live and end; return its slot and how much it reused."""
    taken = slots.take(tokens)
    assert taken is not None
    slot, reused = taken
    assert ledger.holds(slot.index, tokens[:reused])
    for position in range(reused, len(tokens)):
        ledger.write(slot.index, position, tokens)
    slot.tokens = list(tokens)
    slots.release(slot)
    return slot.index, reused


A, B, C, D = (list(range(100 * n, 100 * n + 60)) for n in range(4))


def test_the_next_turn_of_a_conversation_reuses_all_of_the_last() -> None:
    slots, ledger = table()
    assert run(slots, ledger, A) == (0, 0)
    assert run(slots, ledger, [*A, 1, 2, 3]) == (0, 60)


def test_the_last_token_is_always_left_to_compute() -> None:
    slots, ledger = table()
    run(slots, ledger, A)
    assert run(slots, ledger, A) == (0, 59)


def test_conversations_taking_turns_all_keep_their_memory_and_all_run_in_the_lowest_slot() -> None:
    slots, ledger = table(3)
    for tokens in (A, B, C):
        assert run(slots, ledger, tokens) == (0, 0)
    for turn in range(1, 4):
        for tokens in (A, B, C):
            assert run(slots, ledger, tokens + [turn] * turn) == (0, 60)


def test_what_was_used_longest_ago_is_forgotten_first() -> None:
    slots, ledger = table(3)
    for tokens in (A, B, C, A, D):  # B is the oldest when D comes
        run(slots, ledger, tokens)
    assert run(slots, ledger, [*B, 9])[1] == 0
    slots, ledger = table(3)
    for tokens in (A, B, C, A, D):
        run(slots, ledger, tokens)
    for tokens in (A, C, D):
        assert run(slots, ledger, [*tokens, 9])[1] == 60


def test_a_shared_beginning_is_copied_from_a_slot_that_is_busy() -> None:
    slots, ledger = table(2)
    first = slots.take(A)
    assert first is not None
    for position in range(40):  # in the middle of its prefill
        ledger.write(0, position, A)
    first[0].tokens = A[:40]
    second = slots.take([*A[:50], 7, 8])
    assert second is not None
    assert (second[0].index, second[1]) == (1, 40)
    assert ledger.holds(1, A[:40])
    assert first[0].tokens == A[:40]


def test_a_beginning_too_short_to_be_worth_moving_is_computed_again() -> None:
    slots, _ = table(2)
    busy = slots.take(A)
    assert busy is not None
    busy[0].tokens = list(A)
    taken = slots.take([*A[: MIN_MOVED - 1], 1, 2])
    assert taken is not None
    assert taken[1] == 0


def test_nothing_is_moved_while_one_conversation_goes_on() -> None:
    slots, ledger = table(4)
    tokens = list(A)
    for turn in range(5):
        run(slots, ledger, tokens)
        tokens += [turn] * 20
    assert ledger.moved == 0


def test_a_conversation_whose_end_changes_forgets_that_end_and_no_other_conversation() -> None:
    slots, ledger = table(3)
    for tokens in (A, B, C):
        run(slots, ledger, tokens)
    for number in range(4):  # another answer to the same question, or thoughts that a template drops
        assert run(slots, ledger, [*C[:40], *range(900 + 50 * number, 930 + 50 * number)])[1] == 40
    for tokens in (A, B):
        assert run(slots, ledger, [*tokens, 9])[1] == 60


def test_the_rest_of_a_conversation_is_kept_when_another_begins_like_it_or_a_slot_is_empty() -> None:
    for others in ([B, C], []):
        slots, ledger = table(3)
        for tokens in [*others, A]:
            run(slots, ledger, tokens)
        begun_alike = 20 if others else 40
        assert run(slots, ledger, [*A[:begun_alike], *range(900, 960)])[1] == begun_alike
        assert run(slots, ledger, [*A, 9])[1] == 60


def test_memory_is_reused_only_within_its_scope_and_moves_with_it() -> None:
    slots, ledger = table(3)
    for scope in ("a", "b"):
        taken = slots.take(A, scope)
        assert taken is not None
        assert taken[1] == 0  # the second time, the tokens are there, but they are another's
        for position in range(len(A)):
            ledger.write(taken[0].index, position, A)
        taken[0].tokens = list(A)
        slots.release(taken[0])
    for scope, reused in (("c", 0), ("a", 59), ("b", 59), ("a", 59)):
        taken = slots.take(A, scope)
        assert taken is not None
        assert taken[1] == reused
        assert ledger.holds(taken[0].index, A[:reused])
        slots.release(taken[0])


def test_no_slot_is_given_while_all_are_busy() -> None:
    slots, _ = table(2)
    assert slots.take(A)
    assert slots.take(B)
    assert slots.take(C) is None
    assert slots.busy == 2


def test_a_parked_slot_writes_behind_its_tokens_or_repeats_its_own() -> None:
    slots, _ = table(1)
    slot = slots.slots[0]
    slot.tokens = [7, 8, 9]
    assert slots.parked(slot, 10) == (0, 3)
    assert slots.parked(slot, 3) == (9, 2)
    assert slots.parked(slot, 2) == (8, 1)


def test_every_slot_holds_what_it_says_through_a_random_life() -> None:
    chooser = random.Random(1)
    for _ in range(30):
        count = chooser.randrange(1, 5)
        slots, ledger = table(count)
        stems = [[chooser.randrange(3) for _ in range(chooser.randrange(5, 60))] for _ in range(4)]
        running: list[tuple[int, list[int]]] = []
        for _ in range(60):
            if running and chooser.random() < 0.5:
                index, tokens = running.pop(chooser.randrange(len(running)))
                slot = slots.slots[index]
                for position in range(len(slot.tokens), chooser.randrange(len(slot.tokens), len(tokens) + 1)):
                    ledger.write(index, position, tokens)
                    slot.tokens.append(tokens[position])
                slots.release(slot)
            else:
                tokens = chooser.choice(stems) + [chooser.randrange(3) for _ in range(chooser.randrange(1, 40))]
                taken = slots.take(tokens)
                if taken is None:
                    assert len(running) == count
                    continue
                slot, reused = taken
                lowest_free = min(set(range(count)) - {index for index, _ in running})
                assert slot.index == lowest_free
                assert slot.tokens == tokens[:reused]
                running.append((slot.index, tokens))
            for slot in slots.slots:
                assert ledger.holds(slot.index, slot.tokens)


@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_the_common_beginning_is_as_long_as_counting_says(held: list[int], wanted: list[int]) -> None:
    length = 0
    while length < min(len(held), len(wanted)) and held[length] == wanted[length]:
        length += 1
    assert common_prefix(held, wanted) == length
