"""Which sequence sits in which slot of the cache, and what the others still remember.

A slot keeps its keys and values after its sequence ends. A new sequence whose tokens begin like a remembered one takes
that part over instead of computing it again: this is what makes the tenth turn of a chat start as fast as the first.

Two wishes pull apart: a decode step runs over the first R slots, so running sequences should sit low; and what was used
longest ago should be forgotten first, wherever it sits. Both are met by moving memory: copying keys and values costs
their bytes once, a small fraction of computing them. So a new sequence always gets the lowest free slot, and what was
remembered there changes places with what is wanted, or with what is to be forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

MIN_MOVED = 16  # a shorter common beginning (often just the BOS token) is not worth moving memory for


class Memory(Protocol):
    """What can move keys and values between slots; the runner."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions."""
        ...

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` positions."""
        ...

    def erase(self, slot: int) -> None:
        """Zero everything."""
        ...


@dataclass(slots=True)
class Slot:
    """One row of the cache.

    Attributes:
        index: which row.
        tokens: the tokens whose keys and values it holds, from position 0 on.
        scope: only sequences of this scope may reuse them.
        busy: a running sequence owns it.
        used: when it was last owned, on a clock that counts releases.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    scope: str = ""
    busy: bool = False
    used: int = 0


class SlotTable:
    """All slots of one cache.

    Args:
        count: number of slots.
        memory: moves keys and values.
    """

    def __init__(self, count: int, memory: Memory) -> None:
        self.slots = [Slot(index) for index in range(count)]
        self._memory = memory
        self._clock = 0

    @property
    def busy(self) -> int:
        """How many slots running sequences own."""
        return sum(slot.busy for slot in self.slots)

    def take(self, tokens: Sequence[int], scope: str = "") -> tuple[Slot, int] | None:
        """Give a slot to a sequence.

        Args:
            tokens: its tokens so far; the last one is always left to compute, since its logits are wanted.
            scope: whose memory it may reuse, and who may reuse its own.

        Returns:
            The slot and how many of the tokens it holds already; ``None`` when every slot is busy.
        """
        # Where it will sit: the lowest free slot.
        free = [slot for slot in self.slots if not slot.busy]
        if not free:
            return None
        target = free[0]
        # Who remembers most of it, if more than the target does and enough to be worth moving.
        wanted = list(tokens[:-1])
        reused = {slot.index: common_prefix(slot.tokens, wanted) if slot.scope == scope else 0 for slot in self.slots}
        source = max(self.slots, key=lambda slot: (reused[slot.index], slot is target, not slot.busy))
        if reused[source.index] < max(MIN_MOVED, reused[target.index] + 1):
            source = target
        # A free one changes places with the target: nothing is forgotten.
        length = reused[source.index]
        if source is not target and not source.busy:
            self._exchange(source, target)
            source = target
        # What the target holds beyond that would be lost. It is kept in an empty slot, or in the one used longest ago.
        # To forget another conversation for it, it must be more than the newcomer shares: else it is an old end of
        # the newcomer's own conversation.
        shared = length if source is target else 0
        lost = len(target.tokens) - shared
        oldest = min(free, key=lambda slot: (bool(slot.tokens), slot.used))
        if oldest is not target and lost >= max(MIN_MOVED, shared if oldest.tokens else 0):
            self._copy(target, oldest, len(target.tokens))
            oldest.used = target.used
        # A busy one keeps its own, so the part in common is copied.
        if source is not target:
            self._copy(source, target, length)
        # The rest of the slot is the new sequence's to write.
        del target.tokens[length:]
        target.busy, target.scope = True, scope
        return target, length

    def release(self, slot: Slot) -> None:
        """A sequence has ended; its slot remembers what it holds."""
        self._clock += 1
        slot.busy, slot.used = False, self._clock

    def lower(self, slot: Slot) -> Slot | None:
        """Move a running sequence to the lowest free slot, if there is one below; return its new slot."""
        target = next((other for other in self.slots[: slot.index] if not other.busy), None)
        if target is not None:
            self._exchange(slot, target)
            slot.busy, target.busy = False, True
        return target

    def forget(self, slot: Slot) -> None:
        """Erase what a slot holds: NaN in there would reach whoever has the slot next, even from behind the mask."""
        self._memory.erase(slot.index)
        slot.tokens.clear()

    def forget_all(self) -> None:
        """No slot remembers anything: the cache has been used for something else."""
        for slot in self.slots:
            slot.tokens.clear()

    def parked(self, slot: Slot, length: int) -> tuple[int, int]:
        """A dummy token and position for a row of the decode batch that is not decoding.

        The step computes all rows, so an idle row must not damage the keys and values it keeps. If it has room below
        ``length``, the token goes right after its last one, where the next real token overwrites it. Otherwise it
        computes its own token at ``length - 1`` again, which writes the same values up to rounding.

        Args:
            slot: of the idle row.
            length: positions that the dummy has to stay below.

        Returns:
            A token and its position.
        """
        if len(slot.tokens) < length:
            return 0, len(slot.tokens)
        return slot.tokens[length - 1], length - 1

    def _copy(self, source: Slot, target: Slot, length: int) -> None:
        self._memory.copy(source.index, target.index, length)
        target.tokens, target.scope = source.tokens[:length], source.scope

    def _exchange(self, one: Slot, other: Slot) -> None:
        self._memory.swap(one.index, other.index, max(len(one.tokens), len(other.tokens)))
        one.tokens, other.tokens = other.tokens, one.tokens
        one.scope, other.scope = other.scope, one.scope
        one.used, other.used = other.used, one.used


def common_prefix(held: list[int], wanted: list[int]) -> int:
    """How many tokens the two begin with in common, by bisection over whole slices (compared in C)."""
    low, high = 0, min(len(held), len(wanted))  # the first `low` agree
    if held[:high] == wanted[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if held[low:middle] == wanted[low:middle]:
            low = middle
        else:
            high = middle
    return low
