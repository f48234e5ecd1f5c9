"""A model as a worker decodes with it, seen from outside: the worker imports neither the engine nor torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from axon_llm.engine.events import Request, TokenEvent
from axon_llm.serving.wire import Job, ModelCard


class EngineStatistics(Protocol):
    """What the worker shows of ``EngineStats``."""

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        ...

    @property
    def waiting(self) -> int:
        """Requests in line."""
        ...

    @property
    def slots(self) -> int:
        """Slots of the cache."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        ...

    @property
    def cache_bytes_in_use(self) -> int:
        """Bytes that hold running sequences."""
        ...


class DecodingEngine(Protocol):
    """The part of ``Engine`` that a worker uses."""

    @property
    def max_seq_len(self) -> int:
        """Most tokens of prompt and completion together."""
        ...

    def submit(self, request: Request) -> None:
        """Put a request in line."""
        ...

    def step(self) -> list[TokenEvent]:
        """Make one scheduling iteration."""
        ...

    def cancel(self, request_id: str) -> None:
        """Ask for a request's end."""
        ...

    def has_work(self) -> bool:
        """Whether a step would do something."""
        ...

    def stats(self) -> EngineStatistics:
        """Return numbers for metrics."""
        ...


@dataclass(frozen=True)
class ServedModel:
    """A model ready to be asked; ``model_loading.py`` makes one.

    Attributes:
        engine: warmed up.
        encode: the tokens of a job's prompt; raises ``RequestError`` if it has none.
        spell: what a token is called, and the bytes it adds to a text.
        models: what to announce it as.
    """

    engine: DecodingEngine
    encode: Callable[[Job], tuple[int, ...]]
    spell: Callable[[int], tuple[str, bytes]]
    models: tuple[ModelCard, ...]
