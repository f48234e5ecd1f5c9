"""``axon serve``: session manager, queue, store and worker in one process, with nothing else installed or running.

The same HTTP application and the same worker as in the large system, over ``embedded.py``. The event loop has the main
thread (signals arrive there), the engine one of its own; they meet in the store. What is decoded comes from outside as
a ``ServedModel``, built on the engine's thread. Nothing survives the process.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable

from axon_llm.serving.embedded import EmbeddedQueue, EmbeddedStore
from axon_llm.serving.http_auth import Anybody, Identify, OneKey
from axon_llm.serving.http_server import HttpServer, listen, start_metrics
from axon_llm.serving.http_service import Service
from axon_llm.serving.http_settings import SessionManagerSettings
from axon_llm.serving.metrics import Health, WorkerMetrics
from axon_llm.serving.served_model import ServedModel
from axon_llm.serving.worker import Worker

WORKER_ID = "embedded"
_LOOK_S = 0.1

log = logging.getLogger("axon.serve")


class EngineThread:
    """The worker on a thread: builds the engine, decodes until stopped, remembers what went wrong.

    Args:
        build: makes it ready; called on the thread, because compiled code likes to stay where it was made.
        begin: makes the worker from it.
    """

    def __init__(self, build: Callable[[], ServedModel], begin: Callable[[ServedModel], Worker]) -> None:
        self._build = build
        self._begin = begin
        self._worker: Worker | None = None
        self._stopping = False
        self.ready = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="axon-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def stop(self, timeout_s: float) -> None:
        """Has the worker end after its current step, and waits for that."""
        self._stopping = True
        if self._worker is not None:
            self._worker.stop()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            worker = self._begin(self._build())
            self._worker = worker
            if not self._stopping:
                self.ready.set()
                worker.run()
        except BaseException as error:
            self.error = error


def run(
    settings: SessionManagerSettings,
    build: Callable[[], ServedModel],
    on_listening: Callable[[str, int], None] | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT.

    Args:
        settings: addresses and limits; the broker's and Redis's are not used.
        build: loads the model and warms the engine up.
        on_listening: called once with the address and the metrics port, when requests can be answered.

    Returns:
        the signal that ended it.

    Raises:
        UsageError: the address cannot be had.
        AxonError: whatever ``build`` raises; likewise what the engine fails with later.
    """
    return asyncio.run(_run(settings, build, on_listening))


async def _run(
    settings: SessionManagerSettings,
    build: Callable[[], ServedModel],
    on_listening: Callable[[str, int], None] | None,
) -> int:
    listener = listen(settings)  # before the model is loaded: a taken port is found out at once
    store = EmbeddedStore(settings)
    queues: list[EmbeddedQueue] = []
    metrics, health = WorkerMetrics(), Health()

    def begin(served: ServedModel) -> Worker:
        queue = EmbeddedQueue(settings, prefetch=2 * served.engine.stats().slots)
        queues.append(queue)
        return Worker(
            settings,
            served.engine,
            store.worker_side(),
            queue.source(),
            encode=served.encode,
            spell=served.spell,
            models=served.models,
            worker_id=WORKER_ID,
            metrics=metrics,
            health=health,
        )

    engine = EngineThread(build, begin)
    try:
        while not (engine.ready.is_set() and await store.workers()):  # until the model has been announced
            if not engine.alive:
                raise engine.error or RuntimeError("the engine's thread ended before it began")
            await asyncio.sleep(_LOOK_S / 10)
        service = Service(settings, store, queues[0], _identify(settings))
        metrics_port = start_metrics(service, metrics.registry)
        server = HttpServer(service, lambda address: on_listening(address, metrics_port) if on_listening else None)
        watching = asyncio.ensure_future(_watch(engine, server))
        await server.run_on(listener)
        watching.cancel()
    finally:
        listener.close()
        engine.stop(settings.drain_s)
    if engine.error is not None:
        raise engine.error
    return server.ended_by or signal.SIGTERM


async def _watch(engine: EngineThread, server: HttpServer) -> None:
    """Ends the server when the engine has died: a server that can only promise is worse than none."""
    while engine.alive:
        await asyncio.sleep(_LOOK_S)
    if not server.should_exit:
        log.error("the engine stopped: %s", type(engine.error).__name__)
        server.stop()
        server.force_exit = True


def _identify(settings: SessionManagerSettings) -> Identify:
    key = settings.api_key.get_secret_value()
    return OneKey(key) if key else Anybody()
