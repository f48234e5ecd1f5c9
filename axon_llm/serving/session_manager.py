"""``axon session-manager``: the HTTP application on Redis and RabbitMQ, in one event loop. Never imports torch.

State lives in Redis; a session manager can be killed, doubled or replaced at any moment. On SIGTERM it stops accepting,
gives open answers some time, and leaves their jobs running: whoever resumes a stream elsewhere finds it going on.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

from axon_llm.errors import ServiceUnavailable
from axon_llm.serving.broker import Publisher
from axon_llm.serving.http_auth import Anybody, Gateway, Identify, Keys
from axon_llm.serving.http_server import HttpServer, listen, start_metrics
from axon_llm.serving.http_service import Service
from axon_llm.serving.http_settings import SessionManagerSettings
from axon_llm.serving.keys import KeyStore
from axon_llm.serving.ports import StoreRefused, StoreUnavailable
from axon_llm.serving.rate_limit import RateLimit
from axon_llm.serving.reaper import Reaper
from axon_llm.serving.redis_client import asyncio_client
from axon_llm.serving.session_store import SessionStore

log = logging.getLogger("axon.session_manager")


def run(settings: SessionManagerSettings, on_listening: Callable[[str, int], None] | None = None) -> int:
    """Runs the session manager until SIGTERM or SIGINT.

    Args:
        settings: where everything is.
        on_listening: called once with the address and the metrics port.

    Returns:
        the signal that ended it.

    Raises:
        UsageError: the address cannot be had.
        ServiceUnavailable: Redis or the broker could not be reached within ``start_timeout_s``, or refused the login.
    """
    return asyncio.run(_run(settings, on_listening))


async def _run(settings: SessionManagerSettings, on_listening: Callable[[str, int], None] | None) -> int:
    client = asyncio_client(settings)
    rate = RateLimit(client, per_minute=settings.rate_per_minute, burst_s=settings.rate_burst_s)
    keys = Keys(KeyStore(client), rate)
    store, queue = SessionStore(settings), Publisher(settings)
    service = Service(settings, store, queue, _identify(settings, keys), keys)
    listener = listen(settings)
    metrics_port = start_metrics(service)
    queue.start()
    # Here as well as in the workers: when the last worker is gone, somebody must still end jobs past their deadline.
    reaper = Reaper(settings) if settings.reaper else None
    if reaper is not None:
        reaper.start()
    try:
        # Listening begins before Redis and the broker answer: until they do, /ready says so and requests get a 503.
        watchdog = asyncio.ensure_future(_reachable(service))
        server = HttpServer(service, lambda address: on_listening(address, metrics_port) if on_listening else None)
        serving = asyncio.ensure_future(server.run_on(listener))
        await asyncio.wait({watchdog, serving}, return_when=asyncio.FIRST_COMPLETED)
        if watchdog.done() and watchdog.exception() is not None:
            server.stop()
        await serving
        if watchdog.done():
            watchdog.result()
        watchdog.cancel()
        return server.ended_by or signal.SIGTERM
    finally:
        if reaper is not None:
            await asyncio.to_thread(reaper.close)
        await keys.keys.close()


async def _reachable(service: Service) -> None:
    """Returns once Redis and the broker have been reached; gives up after ``start_timeout_s``."""
    store_seen = False
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + service.settings.start_timeout_s
    while not (store_seen and service.queue.connected):
        if loop.time() > give_up_at:
            missing = [
                name for name, seen in (("Redis", store_seen), ("the broker", service.queue.connected)) if not seen
            ]
            raise ServiceUnavailable(
                f"{' and '.join(missing)} could not be reached within {service.settings.start_timeout_s:g} s.",
                "Check AXON_REDIS_URL and AXON_AMQP_URL.",
            )
        if not store_seen:
            try:
                await service.store.ping()
                store_seen = True
            except StoreRefused:
                raise
            except StoreUnavailable:
                pass
        await asyncio.sleep(0.05)
    log.info("%s: both answer", service.settings.places)


def _identify(settings: SessionManagerSettings, keys: Keys) -> Identify:
    if settings.trust == "gateway":
        return Gateway(settings.gateway_secret.get_secret_value())
    if settings.trust == "keys":
        return keys
    return Anybody()
