"""Who runs next, decided without a model."""

from __future__ import annotations

from axon_llm.engine.buckets import Buckets
from axon_llm.engine.completion import Completion
from axon_llm.engine.events import Request
from axon_llm.engine.scheduler import Scheduler
from axon_llm.engine.slots import SlotTable
from axon_llm.engine.stop import TextStream


class Nothing:
    """A memory that moves nothing, and a detokeniser that says nothing."""

    def copy(self, source: int, target: int, length: int) -> None: ...
    def swap(self, one: int, other: int, length: int) -> None: ...
    def erase(self, slot: int) -> None: ...
    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def scheduler(
    slots: int = 4, *, static: bool = True, prefill_chunk: int = 256, interleave_chunk: int = 128
) -> Scheduler:
    buckets = Buckets.choose(slots=slots, max_seq_len=4096, prefill_chunk=prefill_chunk, static=static)
    table = SlotTable(slots, Nothing())
    return Scheduler(table, buckets, prefill_chunk=prefill_chunk, interleave_chunk=interleave_chunk)


def sequence(name: str, prompt_length: int, first: int = 0) -> Completion:
    """A completion whose prompt shares no beginning with others of another ``first`` token."""
    request = Request(id=name, prompt=(first, *range(1, prompt_length)))
    return Completion(request, 0, TextStream(Nothing()), frozenset())


def prefilled(s: Completion) -> Completion:
    """As if its prompt had been run and its first token chosen."""
    assert s.slot is not None
    s.slot.tokens = list(s.tokens)
    s.tokens.append(7)
    s.decoding = True
    return s


def names(sequences: list[Completion]) -> list[str]:
    return [s.request.id for s in sequences]


def test_sequences_are_admitted_in_order_into_the_lowest_slots() -> None:
    plan = scheduler(slots=2)
    for i in range(4):
        plan.waiting.append(sequence(str(i), 10, first=i))
    assert names(plan.admit()) == ["0", "1"]
    assert [s.slot.index for s in plan.running if s.slot] == [0, 1]
    assert plan.admit() == []
    plan.remove(plan.running[0])
    assert names(plan.admit()) == ["2"]
    assert [s.slot.index for s in plan.running if s.slot] == [1, 0]
    plan.remove(plan.waiting[0])
    assert not plan.waiting


def chunks(plan: Scheduler) -> list[tuple[str, int, int]]:
    result = []
    for s, start, end in plan.chunks():
        assert s.slot is not None
        s.slot.tokens = s.tokens[:end]
        result.append((s.request.id, start, end))
        if end == len(s.tokens):
            prefilled(s)
    return result


def test_while_nobody_decodes_prefill_takes_whole_chunks_in_order() -> None:
    plan = scheduler(prefill_chunk=256, interleave_chunk=128)
    plan.waiting.extend([sequence("long", 600, first=1), sequence("short", 30, first=2)])
    plan.admit()
    assert chunks(plan) == [("long", 0, 256)]
    assert chunks(plan) == [("long", 256, 512)]
    assert chunks(plan) == [("long", 512, 600), ("short", 0, 30)]
    assert chunks(plan) == []


def test_while_somebody_decodes_a_step_prefills_no_more_than_the_interleave_chunk() -> None:
    plan = scheduler(prefill_chunk=256, interleave_chunk=128)
    plan.waiting.extend(
        [sequence("talking", 10, first=1), sequence("long", 300, first=2), sequence("next", 90, first=3)]
    )
    plan.admit()
    prefilled(plan.running[0])
    assert chunks(plan) == [("long", 0, 128)]
    assert chunks(plan) == [("long", 128, 256)]
    assert chunks(plan) == [("long", 256, 300), ("next", 0, 64)]
    assert chunks(plan) == [("next", 64, 90)]


def test_short_prompts_count_as_the_passes_over_the_weights_that_they_are() -> None:
    plan = scheduler(slots=8, prefill_chunk=256, interleave_chunk=128)
    plan.waiting.extend([sequence(str(number), 10, first=number) for number in range(8)])
    plan.admit()
    prefilled(plan.running[0])
    assert [chunks(plan) for _ in range(5)] == [
        [("1", 0, 10), ("2", 0, 10)],
        [("3", 0, 10), ("4", 0, 10)],
        [("5", 0, 10), ("6", 0, 10)],
        [("7", 0, 10)],
        [],
    ]


def test_a_little_budget_that_is_left_is_not_spent_on_a_sliver_of_a_prompt() -> None:
    plan = scheduler(prefill_chunk=128, interleave_chunk=128)
    plan.waiting.extend([sequence("one", 100, first=1), sequence("two", 90, first=2)])
    plan.admit()
    assert chunks(plan) == [("one", 0, 100)]
    assert chunks(plan) == [("two", 0, 90)]


def test_an_interleave_chunk_smaller_than_the_smallest_worthwhile_one_still_makes_progress() -> None:
    plan = scheduler(prefill_chunk=128, interleave_chunk=16)
    plan.waiting.extend([sequence("talking", 10, first=1), sequence("other", 40, first=2)])
    plan.admit()
    prefilled(plan.running[0])
    assert [chunks(plan) for _ in range(3)] == [[("other", 0, 16)], [("other", 16, 32)], [("other", 32, 40)]]


def test_a_decode_step_has_a_row_for_every_slot_up_to_the_highest_member() -> None:
    plan = scheduler(slots=8)
    for i, length in enumerate((10, 300, 20)):
        plan.waiting.append(sequence(str(i), length, first=i))
    plan.admit()
    first, second, third = plan.running
    assert plan.batch() is None
    prefilled(first)
    prefilled(third)
    assert second.slot is not None
    second.slot.tokens = second.tokens[:256]  # in the middle of its prefill
    batch = plan.batch()
    assert batch is not None
    assert [(row, s.request.id) for row, s in batch.members] == [(0, "0"), (2, "2")]
    # Four rows, the next bucket after three. The long one repeats its own token where the longest member is.
    assert batch.length == 128
    longest = len(third.tokens)
    assert batch.tokens == [7, second.tokens[longest - 1], 7, 0]
    assert batch.positions == [10, longest - 1, 20, 0]


def test_gaps_are_closed_when_that_makes_the_step_smaller_and_not_otherwise() -> None:
    plan = scheduler(slots=8)  # rows in buckets of 1, 2, 4, 8
    for i in range(6):
        plan.waiting.append(sequence(str(i), 50, first=i))
    plan.admit()
    running = [prefilled(s) for s in plan.running]
    plan.remove(running[1])
    assert plan.compact() == []  # five are as dear as six
    plan.remove(running[0])
    assert plan.compact() == [(running[5], 5), (running[4], 4)]
    batch = plan.batch()
    assert batch is not None
    assert [(row, s.request.id) for row, s in batch.members] == [(2, "2"), (3, "3"), (1, "4"), (0, "5")]
    assert [slot.busy for slot in plan.slot_table.slots] == [True] * 4 + [False] * 4
    assert plan.slot_table.slots[0].tokens == running[5].tokens[:-1]
    assert plan.slot_table.slots[5].tokens == running[0].tokens[:-1]  # what was remembered below is remembered above


def test_the_length_read_covers_the_position_being_written() -> None:
    plan = scheduler()
    plan.waiting.append(sequence("x", 127))
    plan.admit()
    s = prefilled(plan.running[0])
    lengths = []
    for _ in range(3):
        batch = plan.batch()
        assert batch is not None
        assert batch.positions[0] < batch.length
        lengths.append(batch.length)
        s.tokens.append(7)
    assert lengths == [128, 256, 256]
