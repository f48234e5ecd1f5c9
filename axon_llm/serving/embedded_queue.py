"""A queue in one process: ``ports.JobQueue`` and ``ports.JobSource`` in memory. Next: ``embedded.py``."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from axon_llm.serving.ports import Delivery, QueueFull
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.wire import Job, encode


class EmbeddedQueue:
    """``ports.JobQueue`` and ``ports.JobSource`` in memory: hands out at most ``prefetch`` jobs at once."""

    def __init__(self, settings: ServingSettings, prefetch: int) -> None:
        self._settings = settings
        self._prefetch = prefetch
        self._lock = threading.Lock()
        self._waiting: deque[tuple[bytes, bool]] = deque()
        self._held: dict[int, bytes] = {}
        self._tag = 0
        self._on_delivery: Callable[[Delivery], None] | None = None
        self._consuming = False

    def start(self, on_delivery: Callable[[Delivery], None] | None = None) -> None:
        """Begin to hand out jobs, if a callback is given."""
        if on_delivery is not None:
            self._on_delivery = on_delivery
            self._consuming = True
            self._hand_out()

    @property
    def connected(self) -> bool:
        """Always."""
        return True

    async def publish(self, job: Job) -> None:
        """Put a job into the queue; see ``ports.JobQueue``."""
        with self._lock:
            if len(self._waiting) >= self._settings.queue_max_length:
                raise QueueFull("the queue is full", hint="try again later")
            self._waiting.append((encode(job), False))
        self._hand_out()

    async def depth(self, model: str) -> int:
        """Return the number of jobs that wait; there is one queue, as one process serves one model."""
        with self._lock:
            return len(self._waiting)

    def is_current(self, delivery: Delivery) -> bool:
        """Whether the message is still with the worker."""
        with self._lock:
            return delivery.tag in self._held

    def ack(self, delivery: Delivery) -> None:
        """Forget the message."""
        with self._lock:
            self._held.pop(delivery.tag, None)
        self._hand_out()

    def reject(self, delivery: Delivery, *, requeue: bool) -> None:
        """Give the message back to the front of the queue, or drop it (there are no dead letters here)."""
        with self._lock:
            body = self._held.pop(delivery.tag, None)
            if body is not None and requeue:
                self._waiting.appendleft((body, True))
        self._hand_out()

    def move_to_solo(self, job: Job) -> None:
        """Put the job back at the end; in one process no job is ever suspect."""
        with self._lock:
            self._waiting.append((encode(job), False))

    def stop_consuming(self) -> None:
        """No new deliveries."""
        self._consuming = False

    async def close(self) -> None:
        """Stop handing out."""
        self._consuming = False

    def source(self) -> EmbeddedSource:
        """Return the same queue with the worker's interface."""
        return EmbeddedSource(self)

    def _hand_out(self) -> None:
        while True:
            with self._lock:
                if not self._consuming or not self._waiting or len(self._held) >= self._prefetch:
                    return
                body, redelivered = self._waiting.popleft()
                self._tag += 1
                self._held[self._tag] = body
                delivery = Delivery(body=body, solo=False, redelivered=redelivered, generation=1, tag=self._tag)
            assert self._on_delivery is not None
            self._on_delivery(delivery)


class EmbeddedSource:
    """``ports.JobSource`` on an ``EmbeddedQueue``."""

    def __init__(self, queue: EmbeddedQueue) -> None:
        self._queue = queue
        self.start = queue.start
        self.ack = queue.ack
        self.reject = queue.reject
        self.is_current = queue.is_current
        self.move_to_solo = queue.move_to_solo
        self.stop_consuming = queue.stop_consuming
        self.connected = True

    def close(self) -> None:
        """Stop handing out."""
        self._queue.stop_consuming()
