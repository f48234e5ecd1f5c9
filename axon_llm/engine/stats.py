"""What the engine holds and has done, as plain numbers for metrics and displays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from axon_llm.cache import KVCache
from axon_llm.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A moment of the engine.

    Attributes:
        running: sequences that own a slot.
        waiting: requests in line.
        slots: slots of the cache.
        cache_bytes: bytes of the cache, all allocated at the start.
        cache_bytes_in_use: of those, bytes that hold keys and values of running sequences.
        cache_bytes_resident: bytes that hold keys and values of any sequence, ended ones included.
        steps: scheduling iterations so far.
        decode_steps: decode steps so far.
        prefill_chunks: prefill chunks so far.
        prompt_tokens: prompt tokens of all requests that got a slot so far.
        cached_tokens: of those, tokens that a slot still held.
        generated_tokens: tokens chosen so far.
        draft_tokens: tokens drafted ahead so far.
        accepted_tokens: of those, tokens that were then chosen.
        finished: requests ended so far, by finish reason.
    """

    running: int
    waiting: int
    slots: int
    cache_bytes: int
    cache_bytes_in_use: int
    cache_bytes_resident: int
    steps: int
    decode_steps: int
    prefill_chunks: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    draft_tokens: int
    accepted_tokens: int
    finished: Mapping[str, int]

    @classmethod
    def of(cls, scheduler: Scheduler, cache: KVCache, counters: Mapping[str, int]) -> EngineStats:
        """Read the numbers off the scheduler, the cache and the engine's counters."""
        slots = scheduler.slot_table.slots
        position_bytes = cache.nbytes // (cache.slots * cache.max_seq_len)
        return cls(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            slots=cache.slots,
            cache_bytes=cache.nbytes,
            cache_bytes_in_use=position_bytes * sum(len(slot.tokens) for slot in slots if slot.busy),
            cache_bytes_resident=position_bytes * sum(len(slot.tokens) for slot in slots),
            steps=counters.get("steps", 0),
            decode_steps=counters.get("decode_steps", 0),
            prefill_chunks=counters.get("prefill_chunks", 0),
            prompt_tokens=counters.get("prompt_tokens", 0),
            cached_tokens=counters.get("cached_tokens", 0),
            generated_tokens=counters.get("generated_tokens", 0),
            draft_tokens=counters.get("draft_tokens", 0),
            accepted_tokens=counters.get("accepted_tokens", 0),
            finished={
                reason: counters.get(f"finished_{reason}", 0) for reason in ("stop", "length", "cancelled", "error")
            },
        )
