"""What the routes share: the store, the queue, who is asking, settings, and work that outlives a request."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from starlette.requests import Request

from axon_llm.serving.http_auth import Identify
from axon_llm.serving.http_capacity import Capacity
from axon_llm.serving.http_errors import ApiError, unavailable
from axon_llm.serving.http_metrics import HttpMetrics
from axon_llm.serving.http_settings import SessionManagerSettings
from axon_llm.serving.ports import JobNotFound, JobQueue, JobStore, StoreUnavailable
from axon_llm.serving.wire import JobRef

CANCEL_TRIES = 5
CANCEL_PAUSE_S = 1.0

log = logging.getLogger("axon.session_manager")


class Place:
    """One open answer, counted until it is left; a context manager."""

    def __init__(self, service: Service, tenant: str) -> None:
        self._service, self._tenant, self._taken = service, tenant, True
        service.streams += 1
        service.streams_of[tenant] += 1
        service.metrics.open_streams.inc()

    def leave(self) -> None:
        """Makes room. Idempotent."""
        if not self._taken:
            return
        self._taken = False
        service, tenant = self._service, self._tenant
        service.metrics.open_streams.dec()
        service.streams_of[tenant] -= 1
        if not service.streams_of[tenant]:
            del service.streams_of[tenant]
        service.streams -= 1

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *failure: object) -> None:
        self.leave()


class Service:
    """One session manager's state, which is little: everything that matters is in the store.

    Attributes:
        stopping: set when the process has been asked to end. A stream that breaks from then on was not left by its
            client, and its job goes on.
    """

    def __init__(
        self,
        settings: SessionManagerSettings,
        store: JobStore,
        queue: JobQueue,
        identify: Identify,
        keys: Identify | None = None,
    ) -> None:
        self.settings = settings
        self.store = store
        self.queue = queue
        self.identify = identify
        self.keys = keys
        self.capacity = Capacity(store, queue, settings.models)
        self.metrics = HttpMetrics()
        self.stopping = False
        self.streams = 0
        self.streams_of: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def tenant(self, request: Request) -> str:
        """The tenant of a request; kept in its state for the access log."""
        tenant = await self.identify(request)
        request.state.tenant = tenant
        return tenant

    async def place(self, tenant: str, model: str) -> Place:
        """A place for an answer, from before its job is made, so that many at once cannot be more than the limits.

        Raises:
            ApiError: 503 where this process answers as many as it may, 429 where as many of one tenant.
        """
        if self.streams >= self.settings.max_streams:
            wait_s = await self.capacity.retry_after_s(model)
            raise unavailable("This server answers as many requests as it can.", wait_s)
        if self.streams_of[tenant] >= self.settings.max_streams_per_tenant:
            raise ApiError(
                429,
                f"{self.settings.max_streams_per_tenant:,} requests are open already; wait for one to end.",
                code="too_many_open_requests",
                retry_after_s=await self.capacity.retry_after_s(model),
            )
        return Place(self, tenant)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs something that must not end with the request that caused it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def cancel(self, ref: JobRef, *, may_come: bool = False) -> None:
        """Cancels a job that nobody waits for, trying again while the store is away.

        Args:
            ref: the job.
            may_come: a command that stores it may still be on its way.
        """
        store_away = False
        for attempt in range(CANCEL_TRIES):
            if attempt:
                await asyncio.sleep(CANCEL_PAUSE_S * attempt)
            try:
                await self.store.cancel(ref)
                return
            except JobNotFound:
                store_away = False
                if not may_come:
                    return
            except StoreUnavailable:
                store_away = True
        if store_away:
            log.warning("job %s could not be cancelled: the store is away; it ends at its deadline", ref.job_id)

    async def close(self) -> None:
        """Finishes what was spawned, briefly, then closes queue and store."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2.0)
        await self.queue.close()
        await self.store.close()
