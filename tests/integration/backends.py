"""The two implementations of the serving path's interfaces, made the same way for tests; and jobs to try them with."""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import pika
import redis

from axon_llm.serving.broker import DEAD, Consumer, Publisher, declare, jobs_queue, parameters, suspects_queue
from axon_llm.serving.embedded import EmbeddedQueue, EmbeddedStore
from axon_llm.serving.ports import JobQueue, JobSource, JobStore, WorkerStore
from axon_llm.serving.session_store import SessionStore
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.token_log import TokenLog
from axon_llm.serving.wire import Job, LogEntry, Message, Sampling, Terminal

MODEL = "tiny-hash"
JOBS, SOLO = jobs_queue(MODEL), suspects_queue(MODEL)
_numbers = itertools.count(1)


class Backend(Protocol):
    """A store and a queue seen from both sides."""

    settings: ServingSettings

    def store(self) -> JobStore:
        """The session manager's side; make it inside the event loop."""

    def worker_store(self) -> WorkerStore:
        """The worker's side."""

    def queue(self) -> JobQueue:
        """The session manager's way into the queue, started."""

    def source(self, prefetch: int) -> JobSource:
        """A worker's side of the queue, not yet started."""

    def close(self) -> None:
        """Close what was made."""


class RealBackend:
    """Redis and RabbitMQ, emptied first."""

    def __init__(self, settings: ServingSettings) -> None:
        self.settings = settings
        self._opened: list[Any] = []
        client = redis.Redis.from_url(settings.redis_url.get_secret_value())
        client.flushall()
        client.close()
        connection = pika.BlockingConnection(parameters(settings))
        channel = connection.channel()
        declare(channel, settings, JOBS, SOLO)
        for name in (JOBS, SOLO, DEAD):
            channel.queue_purge(name)
        connection.close()

    def store(self) -> JobStore:
        return SessionStore(self.settings)

    def worker_store(self) -> WorkerStore:
        store = TokenLog(self.settings)
        self._opened.append(store)
        return store

    def queue(self) -> JobQueue:
        publisher = Publisher(self.settings)
        publisher.start()
        assert publisher.wait_connected(10)
        self._opened.append(_Closing(publisher.close_and_wait))
        return publisher

    def source(self, prefetch: int) -> JobSource:
        consumer = Consumer(self.settings, prefetch, [MODEL])
        self._opened.append(consumer)
        return consumer

    def close(self) -> None:
        for opened in self._opened:
            opened.close()


class _Closing:
    def __init__(self, close: Callable[[], None]) -> None:
        self.close = close


class EmbeddedBackend:
    """The store and queue of ``axon serve``."""

    def __init__(self, settings: ServingSettings) -> None:
        self.settings = settings
        self._store = EmbeddedStore(settings)
        self._queue: EmbeddedQueue | None = None

    def store(self) -> JobStore:
        return self._store

    def worker_store(self) -> WorkerStore:
        return self._store.worker_side()

    def queue(self) -> JobQueue:
        self._queue = self._queue or EmbeddedQueue(self.settings, prefetch=4)
        return self._queue

    def source(self, prefetch: int) -> JobSource:
        self._queue = self._queue or EmbeddedQueue(self.settings, prefetch=prefetch)
        return self._queue.source()

    def close(self) -> None:
        pass


def in_event_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an asynchronous test to its end, at most for a minute."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(60):
                await test(*arguments, **named)

        asyncio.run(bounded())

    return run


def make_job(**changes: Any) -> Job:
    """Return a job of its own id; sessions get one new message."""
    number = next(_numbers)
    values: dict[str, Any] = {
        "job_id": f"job-{number}-{uuid.uuid4().hex[:8]}",
        "tenant": "acme",
        "model": MODEL,
        "sampling": Sampling(max_tokens=changes.pop("max_tokens", 8), seed=number),
        "deadline_unix_s": time.time() + 60,
        "created_at_unix_s": time.time(),
        "trace_id": f"trace-{number}",
    }
    if "session_id" in changes:
        values |= {"turn": 0, "messages": (Message(role="user", content="hello"),), "new_messages": 1}
    elif not {"messages", "prompt_tokens"} & set(changes):
        values["prompt"] = f"prompt {number}"
    return Job(**(values | changes))


def entries(first: int, last: int, *, end: str | None = None) -> tuple[LogEntry, ...]:
    """Return entries ``first … last`` with made-up tokens, the last one terminal if ``end`` names a finish reason."""
    result = [LogEntry(seq=seq, token=seq * 10, text=f"<{seq}>") for seq in range(first, last + 1)]
    if end is not None:
        result[-1] = result[-1].model_copy(update={"terminal": Terminal(finish_reason=end)})  # type: ignore[arg-type]
    return tuple(result)
