"""A step of one shape, captured as a CUDA graph: the GPU replays its kernels without Python launching each.

A graph remembers addresses, not values. So the inputs are copied into tensors that stay in place, the output is always
the same tensor, and the cache is the same memory by design.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP_CALLS = 2  # before capture, libraries must have chosen kernels and allocated their workspaces


class CapturedStep:
    """Captures another step when first called, and replays it from then on.

    Where that is impossible, a warning says so and the step is run as it is.

    Args:
        step: ``(tokens [R, T], positions [R, T]) → logits [R, T, V]``, on CUDA, compiled or not.
        pool: memory shared with other captured steps, of which one runs at a time (``torch.cuda.graph_pool_handle``).
        on_failure: called if it cannot be captured.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], pool: Any, on_failure: Callable[[], None]) -> None:
        self._step, self._pool, self._on_failure = step, pool, on_failure
        self._graph: torch.cuda.CUDAGraph | None = None
        self._impossible = False

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Run the step; the result is overwritten by the next call of any step of the pool."""
        if self._graph is None and not self._impossible:
            self._capture(tokens, positions)
        if self._graph is None:
            return self._step(tokens, positions)
        if tokens is not self._tokens:
            self._tokens.copy_(tokens)
            self._positions.copy_(positions)
        self._graph.replay()
        return self._logits

    def _capture(self, tokens: Tensor, positions: Tensor) -> None:
        # With the real inputs: every run writes the same keys and values to the same positions, so that capturing in
        # the middle of a generation harms nobody.
        self._tokens, self._positions = tokens, positions  # [R, T] each; the caller's own, if they stay in place
        usual = torch.cuda.current_stream()
        self._step(tokens, positions)  # here a compiler works, on the stream that everything else runs on
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(usual)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                self._step(tokens, positions)
        usual.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._logits = self._step(tokens, positions)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of what cannot be captured, each kind has an error of its own
            torch.cuda.set_stream(usual)  # a capture that fails may leave its own stream behind
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(f"the step cannot be captured and runs uncaptured: {reason}", RuntimeWarning, 3)
            self._impossible = True
            self._on_failure()
            return
        self._graph = graph
