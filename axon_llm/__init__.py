"""Axon: LLM serving with its KV cache in plain sight.

The names below are imported on first use, so that ``import axon_llm`` costs nothing and never reaches torch by itself:
the session manager and ``axon --help`` rely on that.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from axon_llm.cache import KVCache
    from axon_llm.checkpoint import load
    from axon_llm.config import ModelConfig
    from axon_llm.engine.engine import Engine
    from axon_llm.engine.events import Request, TokenEvent
    from axon_llm.engine.params import SamplingParams
    from axon_llm.errors import AxonError
    from axon_llm.model import Transformer
    from axon_llm.tokenizer import Tokenizer

_HOME = {
    "AxonError": "errors",
    "Engine": "engine.engine",
    "KVCache": "cache",
    "ModelConfig": "config",
    "Request": "engine.events",
    "SamplingParams": "engine.params",
    "TokenEvent": "engine.events",
    "Tokenizer": "tokenizer",
    "Transformer": "model",
    "load": "checkpoint",
}

__all__ = [
    "AxonError",
    "Engine",
    "KVCache",
    "ModelConfig",
    "Request",
    "SamplingParams",
    "TokenEvent",
    "Tokenizer",
    "Transformer",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home module when it is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'axon_llm' has no attribute {name!r}")
    return getattr(import_module(f"axon_llm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
