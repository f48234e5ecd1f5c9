"""What the workers say they can do: which models there are, and how long a refused client should stay away.

Announcements are read from the store at most once a second and never waited for. A model stays known for a while after
its last worker went away, because jobs for it may well be queued until another one comes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

from axon_llm.serving.http_errors import ApiError, not_found, unavailable
from axon_llm.serving.ports import JobQueue, JobStore, QueueUnavailable, StoreUnavailable
from axon_llm.serving.wire import ModelCard, WorkerCard

FRESH_S = 1.0
DEPTH_TIMEOUT_S = 0.5
KNOWN_FOR_S = 600.0
MIN_RETRY_S, MAX_RETRY_S = 1.0, 120.0


class Capacity:
    """A short-lived memory of announcements and queue depth.

    Args:
        store: where workers announce themselves.
        queue: whose depth counts.
        accepted: model names that are accepted although no worker has announced them.
    """

    def __init__(self, store: JobStore, queue: JobQueue, accepted: Sequence[str] = ()) -> None:
        self._store = store
        self._queue = queue
        self._accepted = frozenset(accepted)
        self._workers: tuple[WorkerCard, ...] = ()
        self._read_at = float("-inf")
        self._known: dict[str, tuple[float, ModelCard]] = {}
        self._depths: dict[str, tuple[float, int]] = {}  # by model: when it was asked for, and what was said

    async def workers(self) -> tuple[WorkerCard, ...]:
        """The announcements, at most a second old; an older reading where the store does not answer."""
        if not self._workers or time.monotonic() - self._read_at > FRESH_S:
            try:
                self._workers = tuple(await self._store.workers())
            except StoreUnavailable:
                return self._workers
            self._read_at = time.monotonic()
            for worker in self._workers:
                for card in worker.models:
                    self._known[card.id] = (self._read_at, card)
        return self._workers

    async def models(self) -> list[ModelCard]:
        """The models that a worker serves now, by name."""
        cards = {card.id: card for worker in await self.workers() for card in worker.models}
        return [cards[name] for name in sorted(cards)]

    async def model(self, name: str) -> ModelCard | None:
        """The card of a model that may be asked for; ``None`` for one that is accepted but never announced.

        Raises:
            ApiError: 404 where there is no such model · 503 where nothing has been announced at all.
        """
        workers = await self.workers()
        seen_at, card = self._known.get(name, (float("-inf"), None))
        if card is not None and time.monotonic() - seen_at < KNOWN_FOR_S:
            return card
        if name in self._accepted:
            return None
        if not workers and not self._known and not self._accepted:
            raise unavailable("No worker has announced a model yet.", await self.retry_after_s(name), "no_worker")
        raise unknown_model(name)

    async def waiting_s(self, model: str) -> float | None:
        """How long a job for a model will wait if it is submitted now; ``None`` if unknown.

        From the depth of the model's queue and the rate that its workers measured.
        """
        rate = _jobs_per_s(worker for worker in await self.workers() if any(card.id == model for card in worker.models))
        if not rate:
            return None
        return await self._waiting(model) / rate

    async def retry_after_s(self, model: str) -> float:
        """When a refused client should try again: when the jobs that wait now for the model will have been served."""
        estimate = await self.waiting_s(model)
        return min(MAX_RETRY_S, max(MIN_RETRY_S, estimate if estimate is not None else MIN_RETRY_S))

    async def _waiting(self, model: str) -> int:
        asked_at, depth = self._depths.get(model, (float("-inf"), 0))
        now = time.monotonic()
        if now - asked_at > FRESH_S:
            self._depths[model] = now, depth  # before asking, so that a broker that hangs is asked by one request only
            try:
                async with asyncio.timeout(DEPTH_TIMEOUT_S):
                    depth = await self._queue.depth(model)
                self._depths[model] = now, depth
            except (QueueUnavailable, TimeoutError):
                pass  # the last known depth is still the best estimate
        return depth


def _jobs_per_s(workers: Iterable[WorkerCard]) -> float:
    """Jobs per second all workers together complete when busy, from what they measured."""
    rate = 0.0
    for worker in workers:
        if not worker.draining:
            busy = worker.slots / worker.mean_job_s if worker.mean_job_s else 0.0
            rate += max(worker.jobs_per_s, busy)
    return rate


def unknown_model(name: str) -> ApiError:
    """404 for a model no worker serves."""
    return not_found("model", name if len(name) <= 128 else name[:128] + "…")
