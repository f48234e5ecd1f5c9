"""``axon worker`` as a process: waits for Redis and the broker, builds the engine, works until SIGTERM, leaves tidily.

What is decoded, and with what, comes from outside as a ``ServedModel``; this file never loads one. Next:
``worker.py``.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from axon_llm.serving import broker
from axon_llm.serving.metrics import Health, MetricsServer, WorkerMetrics
from axon_llm.serving.ports import StoreRefused, StoreUnavailable
from axon_llm.serving.reaper import Reaper
from axon_llm.serving.served_model import ServedModel
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.token_log import TokenLog
from axon_llm.serving.worker import Worker

log = logging.getLogger("axon.worker")


def serve(settings: ServingSettings, build: Callable[[], ServedModel]) -> None:
    """Work until SIGTERM or SIGINT; unfinished jobs are handed back before returning.

    Args:
        settings: where Redis and the broker are, and the limits.
        build: makes the engine, warmed up; called once Redis and the broker were reached.

    Raises:
        ServiceUnavailable: Redis or the broker was out of reach for ``settings.start_timeout_s`` seconds at the start.
    """
    _reach_redis(settings)
    broker.reach(settings, settings.start_timeout_s)
    log.info("%s: both answer", settings.places)
    metrics, health = WorkerMetrics(), Health()
    server = MetricsServer(metrics, health, settings.metrics_host, settings.metrics_port)
    log.info("metrics and health on http://%s:%d", settings.metrics_host, server.port)
    served = build()
    worker = Worker(
        settings,
        served.engine,
        TokenLog(settings),
        broker.Consumer(settings, served.engine.stats().slots, [model.id for model in served.models]),
        encode=served.encode,
        spell=served.spell,
        models=served.models,
        worker_id=f"{_host_name()}-{os.getpid()}-{secrets.token_hex(4)}",
        metrics=metrics,
        health=health,
    )
    reaper = Reaper(settings) if settings.reaper else None
    if reaper is not None:
        reaper.start()
    try:
        with stopped_by_signals(worker.stop):
            worker.run()
    finally:
        if reaper is not None:
            reaper.close()
        server.close()


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` on the first SIGTERM or SIGINT; a second one acts as usual.

    The old handlers come back at the end.
    """
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        stop()

    for number in old:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _reach_redis(settings: ServingSettings) -> None:
    store = TokenLog(settings)
    end = time.monotonic() + settings.start_timeout_s
    while True:
        try:
            store.ping()
            break
        except StoreRefused:
            raise
        except StoreUnavailable:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)
    store.close()


def _host_name() -> str:
    """Return the machine's name as far as it may be part of a Redis key."""
    name = "".join(letter for letter in socket.gethostname() if letter.isalnum() or letter in "-.")
    return name[:64].lstrip("-.") or "worker"
