"""Fast variants that replace parts of the model from outside; each is tested against the readable path.

``accelerate(model)`` swaps the linear layers, and the attention and feed-forward around them, for variants that
compute the same thing quicker on the machine at hand; ``describe(model)`` says what was chosen. Nothing in the readable
path knows about this folder.

Read next: ``plan.py`` (what is chosen), ``strips.py`` and ``linear.py`` (the linears), ``gpu/`` (a GPU's),
``replace.py`` (the swap).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axon_llm.fast.replace import accelerate, describe

__all__ = ["accelerate", "describe"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562): reading a plan needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'axon_llm.fast' has no attribute {name!r}")
    return getattr(import_module("axon_llm.fast.replace"), name)
