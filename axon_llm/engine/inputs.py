"""Tokens and positions of a step, put where the model reads them without the host waiting for the GPU.

A tensor made from Python numbers on a GPU is a copy from ordinary memory, for which the host waits. From pinned memory
the copy is only put in line. So each shape keeps a pinned tensor and one on the GPU; that the latter stays in place is
also what a captured step needs. On a CPU there is nothing to wait for, and every step gets a new tensor.

Legend: R rows · T tokens of each
"""

from __future__ import annotations

from collections.abc import Sequence

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
        self._pinned: Tensor | None = None
        if device.type == "cuda":
            self._pinned = torch.empty(3, rows, tokens, dtype=torch.int64, pin_memory=True)
            self._placed = torch.empty(3, rows, tokens, dtype=torch.int64, device=device)
            self._views = self._placed.unbind()
            self._copied = torch.cuda.Event()

    def put(self, tokens: Numbers, positions: Numbers) -> tuple[Tensor, ...]:
        """Both, and the positions after those, as tensors ``[R, T]`` on the device.

        On a GPU they are valid, and in the same place, until the next call.
        """
        following = [[position + 1 for position in row] for row in positions]
        numbers = torch.tensor((tokens, positions, following))  # [3, R, T]
        if self._pinned is None:
            return numbers.unbind()
        self._copied.synchronize()  # the previous copy: long done, since its step's tokens have been read
        self._pinned.copy_(numbers)
        self._placed.copy_(self._pinned, non_blocking=True)
        self._copied.record()
        return self._views
