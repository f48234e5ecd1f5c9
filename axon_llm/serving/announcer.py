"""What a worker tells the world about itself every few seconds, with its measured rates. Next: ``worker.py``."""

from __future__ import annotations

import time
from collections import deque

from axon_llm.serving.ports import WorkerStore
from axon_llm.serving.wire import ModelCard, WorkerCard

EVERY_S = 3.0
TTL_S = 15.0
WINDOW_S = 60.0


class Announcer:
    """Writes the worker's card when its time has come."""

    def __init__(self, store: WorkerStore, worker_id: str, models: tuple[ModelCard, ...], slots: int) -> None:
        self._store, self._worker_id, self._models, self._slots = store, worker_id, models, slots
        self._started_at = time.time()
        self._next = 0.0
        self._ended: deque[tuple[float, float, int]] = deque()  # when, seconds it took, entries

    def ended(self, took_s: float, entries: int) -> None:
        """Count an ended job."""
        self._ended.append((time.monotonic(), took_s, entries))

    def announce(self, *, running: int, waiting: int, draining: bool) -> bool:
        """Write the card if the last one is old enough; whether that was so."""
        now = time.monotonic()
        if now < self._next:
            return False
        while self._ended and (self._ended[0][0] < now - WINDOW_S and len(self._ended) > 1):
            self._ended.popleft()
        recent = [item for item in self._ended if item[0] >= now - WINDOW_S]
        window_s = min(WINDOW_S, max(1.0, time.time() - self._started_at))
        card = WorkerCard(
            worker_id=self._worker_id,
            models=self._models,
            slots=self._slots,
            running=running,
            waiting=waiting,
            draining=draining,
            jobs_per_s=len(recent) / window_s,
            tokens_per_s=sum(item[2] for item in recent) / window_s,
            mean_job_s=sum(item[1] for item in self._ended) / len(self._ended) if self._ended else None,
            started_at_unix_s=self._started_at,
        )
        self._store.announce(card, TTL_S)
        self._next = now + EVERY_S
        return True
