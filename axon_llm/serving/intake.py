"""Deliveries that a worker has not claimed yet: those to claim now, those to claim again later, and those to run alone.

They come on the job source's thread and are taken by the worker's; only ``put`` and ``wake`` may be called from both.
Next: ``held_job.py``.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Iterator

from axon_llm.serving.ports import Delivery
from axon_llm.serving.wire import Job

Item = tuple[Delivery, Job]


class Intake:
    """What was delivered and is not held.

    Attributes:
        waiting: to claim now, in order.
        suspects: to run alone, in order: workers died while they worked on them.
    """

    def __init__(self) -> None:
        self.waiting: deque[Item] = deque()
        self.suspects: deque[Item] = deque()
        self._parked: list[tuple[float, Item]] = []
        self._inbox: queue.SimpleQueue[Delivery | None] = queue.SimpleQueue()

    def __len__(self) -> int:
        return len(self.waiting) + len(self.suspects) + len(self._parked)

    def put(self, delivery: Delivery) -> None:
        """Take one that has come, from any thread."""
        self._inbox.put(delivery)

    def wake(self) -> None:
        """End a wait in ``arrived``."""
        self._inbox.put(None)

    def arrived(self, wait_s: float) -> Iterator[Delivery]:
        """What has come since the last time; waits for the first up to this many seconds."""
        try:
            delivery = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                if delivery is not None:
                    yield delivery
                delivery = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def park(self, delivery: Delivery, job: Job, for_s: float) -> None:
        """Claim it again after a while."""
        self._parked.append((time.monotonic() + for_s, (delivery, job)))

    def unparked(self) -> list[Item]:
        """Take those whose time has come."""
        now = time.monotonic()
        items = [item for at, item in self._parked if at <= now]
        self._parked = [(at, item) for at, item in self._parked if at > now]
        return items

    def deliveries(self) -> list[Delivery]:
        """The messages of all that are here, to hand them back."""
        return [delivery for delivery, _ in (*self.waiting, *self.suspects, *(item for _, item in self._parked))]
