"""Tokens and positions of a step, put where the model reads them without the host waiting for the GPU.

A tensor made from Python numbers on a GPU is a copy from ordinary memory, for which the host waits. From pinned memory
the copy is only put in line. So each shape keeps a pinned tensor and one on the GPU; that the latter stays in place is
also what a captured step needs. On a CPU there is nothing to wait for; but making a tensor takes a tenth of a
millisecond when a step's weights have driven all else out of the caches, and writing into one that is kept does not.

Legend: R rows · T tokens of each
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

Numbers = Sequence[Sequence[int]]


class Inputs:
    """Tokens and positions of one shape.

    Args:
        rows: R.
        tokens: T.
        device: the model's.
    """

    def __init__(self, rows: int, tokens: int, device: torch.device) -> None:
        self._numbers = array("q", bytes(3 * rows * tokens * 8))
        self._host = torch.frombuffer(self._numbers, dtype=torch.int64).view(3, rows, tokens)  # the same memory
        self._pinned: Tensor | None = None
        placed = self._host
        if device.type == "cuda":
            self._pinned = torch.empty(3, rows, tokens, dtype=torch.int64, pin_memory=True)
            self._placed = placed = torch.empty(3, rows, tokens, dtype=torch.int64, device=device)
            self._copied = torch.cuda.Event()
        self._views = (placed[0], placed[1], placed[2].view(-1))

    def put(self, tokens: Numbers, positions: Numbers) -> tuple[Tensor, Tensor, Tensor]:
        """Put both on the device.

        Returns:
            Tokens ``[R, T]``, positions ``[R, T]``, and the positions after those ``[R · T]``, all valid, and in the
            same place, until the next call.
        """
        after = (position + 1 for row in positions for position in row)
        self._numbers[:] = array("q", chain(chain.from_iterable((*tokens, *positions)), after))
        if self._pinned is not None:
            self._copied.synchronize()  # the previous copy: long done, since its step's tokens have been read
            self._pinned.copy_(self._host)
            self._placed.copy_(self._pinned, non_blocking=True)
            self._copied.record()
        return self._views
