"""A session manager in a thread of the test process, on private servers or on the embedded store.

``http_backend`` is a fixture with two values, so that every test that asks for it runs on both.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from axon_llm.serving.embedded import EmbeddedQueue, EmbeddedStore
from axon_llm.serving.http_auth import Anybody, Gateway, Keys
from axon_llm.serving.http_server import HttpServer, listen
from axon_llm.serving.http_service import Service
from axon_llm.serving.http_settings import SessionManagerSettings
from axon_llm.serving.wire import ModelCard
from tests.integration.scripted_worker import CARD, MODEL, ScriptedWorker
from tests.integration.servers import RabbitServer, RedisServer
from tests.needs import need

SETTINGS: dict[str, Any] = {"port": 0, "trust": "open", "heartbeat_s": 0.5, "drain_s": 1, "poll_s": 0.5}


class Rig:
    """One session manager, its address, and whatever serves its jobs."""

    def __init__(self, make_service: Callable[[], Service]) -> None:
        self._make_service = make_service
        self._up = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.url = ""
        self.service: Service
        self.loop: asyncio.AbstractEventLoop
        self._thread.start()
        assert self._up.wait(20), "the session manager did not start"
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._failure = error
            self._up.set()

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = self._make_service()
        self.service.queue.start()
        while not self.service.queue.connected:
            await asyncio.sleep(0.02)
        self._server = HttpServer(self.service, self._listening)
        await self._server.run_on(listen(self.service.settings))
        if isinstance(self.service.keys, Keys):
            await self.service.keys.keys.close()

    def _listening(self, address: str) -> None:
        self.url = address
        self._up.set()

    def ask(self, coroutine: Any) -> Any:
        """Runs something on the session manager's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self.url + "/v1", **{"api_key": "none", "max_retries": 0, "timeout": 20.0, **options}
        )

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._server.stop)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the session manager does not end"
        if self._failure is not None:
            raise self._failure


@dataclass
class Backend:
    """A store and a queue, and a way to put session managers and workers on them."""

    name: str
    make_service: Callable[..., Service]
    make_worker: Callable[..., ScriptedWorker]
    redis: RedisServer | None = None
    rabbit: RabbitServer | None = None

    def rig(self, **settings: Any) -> Rig:
        return Rig(lambda: self.make_service(**settings))


class SharedStore(EmbeddedStore):
    """One that several session managers of a test may close without ending the others."""

    async def close(self) -> None:
        pass


class SharedQueue(EmbeddedQueue):
    """The same for the queue."""

    async def close(self) -> None:
        pass


def embedded_backend(**overrides: Any) -> Backend:
    base = SessionManagerSettings(**{**SETTINGS, **overrides})
    store, queue = SharedStore(base), SharedQueue(base, prefetch=64)

    def make_service(**settings: Any) -> Service:
        chosen = SessionManagerSettings(**{**SETTINGS, **overrides, **settings})
        return Service(chosen, store, queue, Anybody())

    def make_worker(card: ModelCard = CARD) -> ScriptedWorker:
        return ScriptedWorker(store.worker_side(), queue.source(), card=card)

    return Backend("embedded", make_service, make_worker)


def real_backend(redis_server: RedisServer, rabbit: RabbitServer, **overrides: Any) -> Backend:
    from redis.asyncio import Redis

    from axon_llm.serving.broker import Consumer, Publisher
    from axon_llm.serving.keys import KeyStore
    from axon_llm.serving.rate_limit import RateLimit
    from axon_llm.serving.session_store import SessionStore
    from axon_llm.serving.token_log import TokenLog

    base = {**SETTINGS, "redis_url": redis_server.url(), "amqp_url": rabbit.url(), **overrides}

    def make_service(**settings: Any) -> Service:
        chosen = SessionManagerSettings(**{**base, **settings})
        client: Any = Redis.from_url(redis_server.url(), protocol=2)
        rate = RateLimit(client, per_minute=chosen.rate_per_minute, burst_s=chosen.rate_burst_s)
        keys = Keys(KeyStore(client), rate)
        secret = chosen.gateway_secret.get_secret_value()
        identify = {"open": Anybody(), "keys": keys, "gateway": Gateway(secret)}[chosen.trust]
        return Service(chosen, SessionStore(chosen), Publisher(chosen), identify, keys)

    def make_worker(model: str = MODEL) -> ScriptedWorker:
        chosen = SessionManagerSettings(**base)
        card = CARD.model_copy(update={"id": model})
        return ScriptedWorker(
            TokenLog(chosen), Consumer(chosen, 64, [model]), "scripted-" + model.replace("/", "-"), card
        )

    return Backend("real", make_service, make_worker, redis_server, rabbit)


@pytest.fixture(scope="session")
def real_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RedisServer, RabbitServer]]:
    need("redis-server", "rabbitmq-server")
    folder: Path = tmp_path_factory.mktemp("servers")
    redis_server, rabbit = RedisServer(folder / "redis"), RabbitServer(folder / "rabbit")
    try:
        redis_server.start()
        rabbit.start()
        yield redis_server, rabbit
    finally:
        redis_server.stop()
        rabbit.stop()


@pytest.fixture(scope="module", params=["embedded", "real"])
def http_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param == "embedded":
        chosen = embedded_backend()
    else:
        chosen = real_backend(*request.getfixturevalue("real_servers"))
    worker = chosen.make_worker()
    worker.start()
    yield chosen
    worker.stop()


@pytest.fixture(scope="module")
def rig(http_backend: Backend) -> Iterator[Rig]:
    running = http_backend.rig()
    yield running
    running.stop()
