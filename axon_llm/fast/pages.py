"""Memory for weights on huge pages, one tensor right after the other.

PyTorch asks for huge pages too (``memory.py``), tensor by tensor, and each begins where it happens to: what lies before
its first page of 2 MB and after its last one is left on pages of 4 KB, on average 2 MB in all. For the weights of a
billion-parameter model that is a tenth to three quarters of one, and reading a block's takes 6 % longer for it
(``docs/performance.md``). Here a tensor begins where the one before ended, so that nothing is cut between them.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE = 2 << 20  # bytes of a huge page
CHUNK = 128 * HUGE  # bytes asked for at a time; what is not written to takes no memory
LINE = 64  # bytes of a cache line: where a tensor may begin


class HugePages:
    """Hands out memory for tensors that live about as long as each other.

    A chunk is given back when none of its tensors is left.
    """

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU, of zeros; an ordinary one where the system has no huge pages to ask for."""
        size = math.prod(shape) * dtype.itemsize
        if size == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(*shape, dtype=dtype)
        if self._chunk is None or self._used + size > len(self._chunk):
            self._begin(size)
        assert self._chunk is not None
        made = torch.frombuffer(self._chunk, dtype=dtype, count=math.prod(shape), offset=self._used)
        self._used += -(-size // LINE) * LINE
        return made.view(*shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values here."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def _begin(self, size: int) -> None:
        """Take a new chunk, whose first huge page is what comes first."""
        self._chunk = mmap.mmap(-1, max(size, CHUNK) + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._chunk.madvise(mmap.MADV_HUGEPAGE)
        at = torch.frombuffer(self._chunk, dtype=torch.uint8, count=1).data_ptr()
        self._used = -at % HUGE


weights = HugePages()
