"""Memory for weights on huge pages, one tensor right after the other.

PyTorch asks for huge pages too (``memory.py``), tensor by tensor, and each begins where it happens to: what lies before
its first page of 2 MB and after its last one is left on pages of 4 KB, on average 2 MB in all. For the weights of a
billion-parameter model that is a tenth to three quarters of one, and reading a block's takes 7 % longer for it
(``docs/performance.md``). Here a tensor begins where the one before ended, so that nothing is cut between them.

This file does not know what the tensors are for. Where there are no huge pages to have, they are PyTorch's own.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor

from axon_llm.fast.memory import SWITCH

HUGE = 2 << 20  # bytes of a huge page
CHUNK = 128 * HUGE  # bytes asked for at a time; what is not written to takes no memory
LINE = 64  # bytes of a cache line: where a tensor may begin


class HugePages:
    """Hands out memory for tensors that live about as long as each other, to any number of threads.

    A chunk is the tensors' own: it is given back when none of them is left.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._chunk: Callable[[], mmap.mmap | None] = lambda: None  # a weak reference
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU, whose values are not set."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size == 0 or not wanted():
            return torch.empty(*shape, dtype=dtype)
        with self._lock:
            chunk = self._chunk()
            if chunk is None or self._used + size > len(chunk):
                try:
                    chunk = self._begin(size)
                except OSError:  # no address space for it
                    return torch.empty(*shape, dtype=dtype)
            made = torch.frombuffer(chunk, dtype=dtype, count=count, offset=self._used)
            self._used += -(-size // LINE) * LINE
        return made.view(*shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values here."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def _begin(self, size: int) -> mmap.mmap:
        """A new chunk, whose first huge page is what comes first."""
        chunk = mmap.mmap(-1, max(size, CHUNK) + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            chunk.madvise(mmap.MADV_HUGEPAGE)
        self._chunk = weakref.ref(chunk)
        self._used = -torch.frombuffer(chunk, dtype=torch.uint8, count=1).data_ptr() % HUGE
        return chunk


def wanted() -> bool:
    """The system has huge pages to ask for, and nobody has said that PyTorch should not."""
    return hasattr(mmap, "MADV_HUGEPAGE") and os.environ.get(SWITCH) != "0"


weights = HugePages()
