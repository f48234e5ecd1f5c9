"""The reaper goes on whatever happens to it. What it does is in ``test_broker.py``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import redis

from axon_llm.serving.ports import QueueFull
from axon_llm.serving.reaper import LONG_WAIT_LOOKS, Reaper
from axon_llm.serving.session_store import SessionStore
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.token_log import TokenLog
from axon_llm.serving.wire import Job
from tests.integration.backends import make_job
from tests.integration.conftest import settings_for
from tests.integration.servers import RedisServer, wait_until


class Broker:
    """One that takes every job."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.waiting = 0
        self.full = False
        self.publisher = SimpleNamespace(
            connected=True, publish_and_wait=self._publish, depth_and_wait=lambda model: self.waiting
        )

    def _publish(self, job: Job) -> None:
        if self.full:
            raise QueueFull("full")
        self.jobs.append(job)

    def start(self, on_delivery: Any) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def reaping(settings: ServingSettings) -> Iterator[Broker]:
    reaper, broker = Reaper(settings), Broker()
    reaper._consumer.publisher.close_and_wait()
    reaper._consumer = broker  # type: ignore[assignment]
    reaper.start()
    try:
        yield broker
    finally:
        reaper.close()
        assert "axon-reaper" not in {thread.name for thread in threading.enumerate()}


def submit(settings: ServingSettings, job: Job) -> None:
    async def run() -> None:
        store = SessionStore(settings)
        await store.submit(job)
        await store.close()

    asyncio.run(run())


def test_a_password_that_was_wrong_for_a_moment_ends_nothing(server: RedisServer) -> None:
    with redis.Redis(port=server.port) as admin:
        admin.execute_command("ACL", "SETUSER", "reaper", "on", ">right", "~*", "&*", "+@all")
        settings = settings_for(server.url("reaper", "right"), "amqp://unused", outbox_grace_s=0.2)
        with reaping(settings) as broker:
            admin.execute_command("ACL", "SETUSER", "reaper", "resetpass", ">wrong")
            admin.execute_command("CLIENT", "KILL", "USER", "reaper")
            wait_until(lambda: bool(admin.execute_command("ACL", "LOG")), 5, "it was refused")
            admin.execute_command("ACL", "SETUSER", "reaper", "resetpass", ">right")
            job = make_job()
            submit(settings, job)
            wait_until(lambda: broker.jobs == [job], 5, "it looks after jobs again")


def test_a_job_of_a_newer_version_keeps_nobody_from_the_others(server: RedisServer) -> None:
    settings = settings_for(server.url(), "amqp://unused", outbox_grace_s=0.2)
    newer, job = make_job(), make_job()
    submit(settings, newer)
    with redis.Redis(port=server.port) as admin:
        [key] = [key for key in admin.scan_iter("axon:*") if key.endswith(f"job:{newer.job_id}".encode())]
        body = admin.hget(key, "body")
        assert isinstance(body, bytes)
        assert b'"schema_version":1' in body
        admin.hset(key, "body", body.replace(b'"schema_version":1', b'"schema_version":2'))
    submit(settings, job)
    with reaping(settings) as broker:
        wait_until(lambda: broker.jobs == [job], 5, "it looks after the other")


def test_a_job_in_a_long_queue_is_published_again_once_and_again_after_a_worker_had_it(server: RedisServer) -> None:
    settings, job = settings_for(server.url(), "amqp://unused", outbox_grace_s=0.1), make_job()
    submit(settings, job)
    with reaping(settings) as broker, redis.Redis(port=server.port) as admin:
        broker.waiting = 5
        wait_until(lambda: broker.jobs == [job], 5, "it was in the outbox")
        [key] = [key for key in admin.scan_iter("axon:*") if key.endswith(f"job:{job.job_id}".encode())]

        def looked_at(times: int) -> bool:
            return int(admin.hget(key, "looks") or 0) >= times  # type: ignore[arg-type]

        broker.full = True
        wait_until(lambda: looked_at(LONG_WAIT_LOOKS + 1), 10, "it could not be published when it was time")
        broker.full = False
        wait_until(lambda: broker.jobs == [job] * 2, 10, "so it was later")
        wait_until(lambda: looked_at(LONG_WAIT_LOOKS + 4), 10, "it was looked at more often")
        assert broker.jobs == [job] * 2
        log = TokenLog(settings)
        log.release(job.ref, log.claim(job, "w1").fence)
        log.close()
        wait_until(lambda: broker.jobs == [job] * 3, 10, "once more, when a worker had given it back")
