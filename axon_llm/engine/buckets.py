"""The few sizes that the model is run at.

A compiled or captured step exists for one shape only, so real sizes are rounded up to the next of a short list.
Rounding up wastes a little work; a list that doubles keeps both the waste and the number of compilations small. Run
eagerly, a shape costs nothing to change, so the steps there are finer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

SMALLEST_LENGTH = 128
EAGER_LENGTH_STEP = 128


@dataclass(frozen=True)
class Sizes:
    """An ascending list of sizes to round up to; the last one is the largest that can be asked for."""

    values: tuple[int, ...]

    @classmethod
    def up_to(cls, largest: int, wanted: Iterable[int]) -> Sizes:
        """The ``wanted`` sizes below ``largest``, and ``largest`` itself."""
        return cls((*sorted({size for size in wanted if 0 < size < largest}), largest))

    def at_least(self, size: int) -> int:
        """The smallest of the sizes that is not smaller than ``size``."""
        return self.values[bisect_left(self.values, size)]


def doubling(smallest: int, largest: int) -> list[int]:
    """``smallest``, twice that, and so on below ``largest``."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return sizes


@dataclass(frozen=True)
class Buckets:
    """Which sizes the runner uses.

    Attributes:
        lengths: positions of the cache that attention reads in a decode step.
        prefill_lengths: the same for a chunk of a prompt, which is never compiled.
        rows: slots that take part in a decode step.
        chunks: tokens in a prefill chunk.
    """

    lengths: Sizes
    prefill_lengths: Sizes
    rows: Sizes
    chunks: Sizes

    @classmethod
    def choose(
        cls, *, slots: int, max_seq_len: int, prefill_chunk: int, static: bool, tail_is_free: bool = False
    ) -> Buckets:
        """Sizes for a cache of ``slots`` × ``max_seq_len``.

        Args:
            slots: slots of the cache.
            max_seq_len: positions of a slot.
            prefill_chunk: the largest prefill chunk in tokens.
            static: every decode shape costs a compilation (few, doubling), or none does (many, close together).
            tail_is_free: attention does not read what its mask hides, so a shorter view would save nothing: where
                shapes cost something, one length is enough.
        """
        close: Iterable[int] = range(EAGER_LENGTH_STEP, max_seq_len, EAGER_LENGTH_STEP)
        lengths = close
        if static:
            lengths = () if tail_is_free else doubling(SMALLEST_LENGTH, max_seq_len)
        chunk = min(prefill_chunk, max_seq_len)
        # Two sizes per doubling: at most a third of a padded chunk is padding.
        chunks = [size for low in doubling(16, chunk) for size in (low, low + low // 2)]
        return cls(
            lengths=Sizes.up_to(max_seq_len, lengths),
            prefill_lengths=Sizes.up_to(max_seq_len, close),
            rows=Sizes.up_to(slots, doubling(1, slots) if static else range(1, slots)),
            chunks=Sizes.up_to(chunk, chunks),
        )
