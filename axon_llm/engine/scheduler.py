"""Who runs next: continuous batching, decided anew before every step (iteration-level scheduling: Yu et al., 2022).

A request waits in line until a slot of the cache is free, then runs in that slot until it ends. In each step

1. every sequence that is *decoding* gets one token, all in one pass over the weights;
2. sequences that are still *prefilling* get their prompts into the cache, oldest first, a bounded number of tokens per
   step, so that a long prompt delays the others' next token by no more than one chunk.

A sequence that ends frees its slot, and the next in line takes it in the next step: nobody waits for a batch to finish.

This file decides; it computes nothing. ``iteration.py`` carries the decisions out.

Read next: ``iteration.py``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from axon_llm.engine.buckets import Buckets
from axon_llm.engine.completion import Completion
from axon_llm.engine.slots import SlotTable

SMALLEST_CHUNK = 64  # each chunk is a pass over the weights, which costs no less for fewer tokens than about this many


@dataclass(frozen=True, slots=True)
class Batch:
    """One decode step: a row for each slot from 0 up, whether it takes part or not.

    Attributes:
        tokens: the newest token of each row.
        positions: where it goes.
        length: positions of the cache that the step reads.
        members: the sequences that take part, with their rows.
    """

    tokens: list[int]
    positions: list[int]
    length: int
    members: list[tuple[int, Completion]]


class Scheduler:
    """The line, the sequences that run, and the slots they run in.

    Args:
        slot_table: the cache's slots.
        buckets: the shapes a decode step may have.
        prefill_chunk: prompt tokens per step while nobody is decoding.
        interleave_chunk: prompt tokens per step while somebody is: the bound on what a new prompt delays others by.

    Attributes:
        waiting: first come, first served.
        running: every sequence that owns a slot, oldest first.
    """

    def __init__(self, slot_table: SlotTable, buckets: Buckets, *, prefill_chunk: int, interleave_chunk: int) -> None:
        self.slot_table = slot_table
        self.waiting: deque[Completion] = deque()
        self.running: list[Completion] = []
        self._buckets = buckets
        self._prefill_chunk, self._interleave_chunk = prefill_chunk, min(interleave_chunk, prefill_chunk)

    def admit(self) -> list[Completion]:
        """Move sequences from the line into free slots, and return them. Each begins with what its slot remembers."""
        admitted = []
        while self.waiting:
            sequence = self.waiting[0]
            taken = self.slot_table.take(sequence.tokens, sequence.request.cache_scope)
            if taken is None:
                break
            self.waiting.popleft()
            sequence.start(*taken)
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def compact(self) -> list[tuple[Completion, int]]:
        """Close the gaps that ended sequences left, as far as that makes decode steps smaller.

        Returns:
            The sequences that moved, each with the slot it left.
        """
        moved = []
        while self.running:
            rows = self._buckets.rows.at_least(len(self.running))
            highest = max(self.running, key=lambda s: s.slot.index if s.slot else -1)
            if highest.slot is None or highest.slot.index < rows:
                break
            moved.append((highest, highest.slot.index))
            highest.slot = self.slot_table.lower(highest.slot)
        return moved

    def remove(self, sequence: Completion) -> None:
        """Take a sequence that has ended out of the line or its slot."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self.slot_table.release(sequence.slot)

    def chunks(self) -> Iterator[tuple[Completion, int, int]]:
        """The share of prefill of one step: sequences, each with the positions to run, from and to.

        A chunk costs as many tokens as it has, and no fewer than ``SMALLEST_CHUNK``: or else eight short prompts at
        once would be eight passes over the weights before anybody's next token.
        """
        budget = self._interleave_chunk if any(s.decoding for s in self.running) else self._prefill_chunk
        for sequence in [s for s in self.running if not s.decoding]:
            assert sequence.slot is not None
            start, end = len(sequence.slot.tokens), len(sequence.tokens)
            if end - start > budget and budget < min(SMALLEST_CHUNK, self._interleave_chunk):
                return
            chunk = min(end - start, budget)
            yield sequence, start, start + chunk
            budget -= max(chunk, SMALLEST_CHUNK)
            if budget <= 0:
                return

    def batch(self) -> Batch | None:
        """The next decode step, or ``None`` when nobody is decoding."""
        members = [(s.slot.index, s) for s in self.running if s.decoding and s.slot is not None]
        if not members:
            return None
        rows = self._buckets.rows.at_least(max(row for row, _ in members) + 1)
        longest = max(len(s.tokens) for _, s in members)
        length = self._buckets.lengths.at_least(longest)
        # Who takes no part reads no further than who does: attention may cost what is visible, not what is in view.
        work = [self.slot_table.parked(slot, longest) for slot in self.slot_table.slots[:rows]]
        for row, sequence in members:
            work[row] = (sequence.tokens[-1], len(sequence.tokens) - 1)
        return Batch([token for token, _ in work], [position for _, position in work], length, members)
