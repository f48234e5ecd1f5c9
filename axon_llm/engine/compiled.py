"""A step of one shape, compiled by ``torch.compile`` into a single graph.

Each shape gets a function of its own, not one function that is compiled again and again: the compiler keeps its
versions of a function in a list, searches it at every call, and gives up after a handful. A function that only ever
sees one shape has one version, and nothing left to guard against; leaving the guards out saves about a tenth of a small
model's step. The price: parts of the model that are replaced after its first step are not noticed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from axon_llm.cache import KVCache
from axon_llm.model import Transformer


class CompiledStep:
    """One step over one view of the cache, compiled when first called.

    Where that is impossible (no C++ compiler, an operation the compiler cannot follow), a warning says so and the model
    is run as it is. A device that is out of memory or broken is not the compiler's doing, and is not hidden.

    Args:
        model: the decoder.
        view: the first R slots of the cache, cut to the positions that the step reads.
        on_failure: called if it cannot be compiled.
    """

    def __init__(self, model: Transformer, view: KVCache, on_failure: Callable[[], None]) -> None:
        self._on_failure = on_failure
        self._plain = _step_function(model, view)
        self._step: Callable[[Tensor, Tensor], Tensor] = torch.compile(
            self._plain, fullgraph=True, dynamic=False, options={"guard_filter_fn": _without_guards}
        )
        self._proven = False

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Run T tokens of each row: ``tokens`` and ``positions`` ``[R, T]`` → logits ``[R, T, V]`` float32."""
        if self._proven:
            return self._step(tokens, positions)
        try:
            logits = self._step(tokens, positions)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # the compiler's own errors share no base class
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(f"the decode step cannot be compiled and runs uncompiled: {reason}", RuntimeWarning, 2)
            self._step = self._plain
            self._on_failure()
            logits = self._plain(tokens, positions)
        self._proven = True
        return logits


def _step_function(model: Transformer, view: KVCache) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that runs one step, with a code object of its own."""

    def step(tokens: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = model(tokens, positions, view)  # [R, T, V]
        return logits

    name = f"step_{view.slots}x{view.max_seq_len}"
    return FunctionType(step.__code__.replace(co_name=name), globals(), name, None, step.__closure__)


def _without_guards(guards: Sequence[Any]) -> list[bool]:
    return [False] * len(guards)
