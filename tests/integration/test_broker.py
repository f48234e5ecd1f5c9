"""Publishing, consuming and dead letters on a real RabbitMQ; every test in a virtual host of its own."""

from __future__ import annotations

import asyncio
import json
import queue
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pika
import pika.exceptions
import pytest

from axon_llm.serving import amqp
from axon_llm.serving.broker import DEAD, Consumer, Publisher, declare, parameters
from axon_llm.serving.ports import Delivery, QueueFull, QueueUnavailable
from axon_llm.serving.reaper import Reaper
from axon_llm.serving.session_store import SessionStore
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.token_log import TokenLog
from axon_llm.serving.wire import Job, JobRef, JobStatus, encode
from deploy.backends import RABBITMQ_ROLES, rabbitmq_definitions
from tests.integration.backends import JOBS, MODEL, SOLO, in_event_loop, make_job
from tests.integration.conftest import settings_for
from tests.integration.servers import RabbitServer, RedisServer, TcpProxy, wait_until

Settings = Callable[..., ServingSettings]


@pytest.fixture
def vhost(redis_server: RedisServer, rabbit_server: RabbitServer) -> Iterator[Settings]:
    """Settings for a virtual host of the test's own; other arguments of the queues do no harm there."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    rabbit_server.ctl("add_vhost", name)
    rabbit_server.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")

    def settings(port: int = rabbit_server.port, **changes: object) -> ServingSettings:
        amqp_url = f"amqp://guest:guest@127.0.0.1:{port}/{name}"
        values: dict[str, object] = {"broker_heartbeat_s": 1, "publish_timeout_s": 2.0}
        return settings_for(redis_server.url(), amqp_url, **(values | changes))

    yield settings
    rabbit_server.ctl("delete_vhost", name)


class Sink:
    """A consumer and what it was given."""

    def __init__(self, settings: ServingSettings, prefetch: int = 4, model: str = MODEL) -> None:
        self.inbox: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.consumer = Consumer(settings, prefetch, [model])
        self.consumer.start(self.inbox.put)
        assert self.consumer.wait_connected(10)

    def take(self) -> Delivery:
        return self.inbox.get(timeout=20)

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self.consumer.close()


def publisher(settings: ServingSettings) -> Publisher:
    made = Publisher(settings)
    made.start()
    assert made.wait_connected(10)
    return made


def _publish_many(out: Publisher, model: str = MODEL) -> None:
    for _ in range(20):
        out.publish_and_wait(make_job(model=model))


def _accepted(out: Publisher) -> bool:
    try:
        out.publish_and_wait(make_job())
    except QueueFull:
        return False
    return True


def count(settings: ServingSettings, name: str) -> int:
    connection = pika.BlockingConnection(parameters(settings))
    found = int(connection.channel().queue_declare(name, passive=True).method.message_count)
    connection.close()
    return found


def consumers(settings: ServingSettings) -> int:
    """How many the broker believes to take from the queue of jobs; 0 where there is none."""
    connection = pika.BlockingConnection(parameters(settings))
    try:
        return int(connection.channel().queue_declare(JOBS, passive=True).method.consumer_count)
    except pika.exceptions.ChannelClosedByBroker:
        return 0
    finally:
        connection.close()


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(vhost: Settings) -> None:
    settings = vhost(queue_max_length=3)
    out = publisher(settings)
    for _ in range(3):
        out.publish_and_wait(make_job())
    with pytest.raises(QueueFull):
        _publish_many(out)  # the limit is applied a moment late
    with Sink(settings) as sink:
        for _ in range(3):
            sink.consumer.ack(sink.take())
        wait_until(lambda: _accepted(out), 10, "a job is accepted again")
        sink.take()
    out.close_and_wait()


def test_a_deleted_queue_is_declared_again_by_whoever_publishes(vhost: Settings) -> None:
    settings = vhost()
    out = publisher(settings)
    connection = pika.BlockingConnection(parameters(settings))
    connection.channel().queue_delete(JOBS)
    connection.close()
    out.publish_and_wait(make_job())
    assert out.depth_and_wait(MODEL) == 1
    out.close_and_wait()


def test_a_deleted_queue_is_consumed_again(vhost: Settings) -> None:
    settings = vhost()
    out = publisher(settings)
    with Sink(settings) as sink:
        for _ in range(3):
            connection = pika.BlockingConnection(parameters(settings))
            connection.channel().queue_delete(JOBS)
            connection.close()
            job = make_job()
            out.publish_and_wait(job)
            delivery = sink.take()
            assert delivery.body == encode(job)
            sink.consumer.ack(delivery)
    out.close_and_wait()


def test_a_queue_that_is_missed_while_connecting_is_not_declared_before_its_other_consumers_know(
    vhost: Settings, rabbit_server: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amqp, "_BACKOFF_S", (0.0, 0.1))
    proxy = TcpProxy(rabbit_server.port)
    with Sink(vhost()) as told, Sink(vhost(proxy.port)) as cut_off:
        wait_until(lambda: consumers(vhost()) == 2, 10, "both consume")
        connection = pika.BlockingConnection(parameters(vhost()))
        connection.channel().queue_delete(JOBS)
        proxy.cut()
        connection.close()
        wait_until(lambda: cut_off.consumer.connected and consumers(vhost()) == 2, 20, "both consume again")
        out = publisher(vhost())
        jobs = [make_job() for _ in range(8)]  # no more than both may hold
        for job in jobs:
            out.publish_and_wait(job)
        held = [sink.take().body for sink in (told, cut_off) for _ in range(4)]
        assert sorted(held) == sorted(encode(job) for job in jobs)
        out.close_and_wait()
    proxy.close()


def test_no_more_jobs_are_handed_out_than_the_prefetch_allows(vhost: Settings) -> None:
    settings = vhost()
    out = publisher(settings)
    for _ in range(5):
        out.publish_and_wait(make_job())
    with Sink(settings, prefetch=2) as sink:
        held = [sink.take(), sink.take()]
        with pytest.raises(queue.Empty):
            sink.inbox.get(timeout=0.3)
        sink.consumer.ack(held[0])
        sink.take()
    out.close_and_wait()


def test_a_lost_connection_brings_the_message_back_and_voids_the_old_tag(
    vhost: Settings, rabbit_server: RabbitServer
) -> None:
    proxy = TcpProxy(rabbit_server.port)
    settings, job = vhost(port=proxy.port), make_job()
    out = publisher(vhost())
    out.publish_and_wait(job)
    with Sink(settings) as sink:
        first = sink.take()
        proxy.cut()
        second = sink.take()
        assert second.redelivered
        assert second.generation > first.generation
        assert not sink.consumer.is_current(first)
        assert sink.consumer.is_current(second)
        sink.consumer.ack(first)  # void: it must not acknowledge whatever has this tag now
        sink.consumer.ack(second)
        wait_until(lambda: count(settings, JOBS) == 0, 5, "the queue is empty")
        with pytest.raises(queue.Empty):
            sink.inbox.get(timeout=0.3)
    out.close_and_wait()
    proxy.close()


def test_a_half_open_connection_is_noticed_by_its_heartbeats(vhost: Settings, rabbit_server: RabbitServer) -> None:
    proxy = TcpProxy(rabbit_server.port)
    out = publisher(vhost())
    with Sink(vhost(port=proxy.port)) as cut_off:
        out.publish_and_wait(make_job())
        cut_off.take()
        proxy.partition()
        with Sink(vhost()) as other:
            assert other.take().redelivered
        proxy.heal()
    out.close_and_wait()
    proxy.close()


def test_suspects_come_one_at_a_time(vhost: Settings) -> None:
    settings = vhost()
    with Sink(settings) as sink:
        for _ in range(3):
            sink.consumer.move_to_solo(make_job())
        first = sink.take()
        assert first.solo
        with pytest.raises(queue.Empty):
            sink.inbox.get(timeout=0.3)
        sink.consumer.ack(first)
        assert sink.take().solo


def test_stopping_to_consume_keeps_what_is_held(vhost: Settings) -> None:
    settings = vhost()
    out = publisher(settings)
    out.publish_and_wait(make_job())
    with Sink(settings) as sink:
        held = sink.take()
        sink.consumer.stop_consuming()
        out.publish_and_wait(make_job())
        with pytest.raises(queue.Empty):
            sink.inbox.get(timeout=0.3)
        sink.consumer.ack(held)
        wait_until(lambda: count(settings, JOBS) == 1, 5, "only the new job is left")
    out.close_and_wait()


def test_every_model_has_queues_of_its_own(vhost: Settings) -> None:
    settings = vhost(queue_max_length=3)
    names = ["one", "org/two:v1", "drei und Übergrößen"]
    out = publisher(settings)
    jobs = {name: [make_job(model=name) for _ in range(2)] for name in names}
    for name in names:  # a queue of a model that no worker serves yet keeps its jobs
        for job in jobs[name]:
            out.publish_and_wait(job)
        assert out.depth_and_wait(name) == 2
    for name in names:
        with Sink(settings, model=name) as sink:
            first = [sink.take(), sink.take()]
            assert [delivery.body for delivery in first] == [encode(job) for job in jobs[name]]
            for delivery in first:
                sink.consumer.ack(delivery)
            sink.consumer.move_to_solo(jobs[name][0])
            suspect = sink.take()
            assert suspect.solo
            assert suspect.body == encode(jobs[name][0])
            sink.consumer.ack(suspect)
            with pytest.raises(queue.Empty):
                sink.inbox.get(timeout=0.2)
    for _ in range(3):
        out.publish_and_wait(jobs["one"][0])
    with pytest.raises(QueueFull):
        _publish_many(out, "one")
    out.publish_and_wait(jobs["org/two:v1"][0])  # one model's queue is full, another's is not
    out.close_and_wait()


@in_event_loop
async def test_publishing_without_a_broker_fails_in_time_and_works_again_later(
    vhost: Settings, rabbit_server: RabbitServer
) -> None:
    proxy = TcpProxy(rabbit_server.port)
    out = publisher(vhost(port=proxy.port))
    await out.publish(make_job())
    proxy.partition()
    with pytest.raises(QueueUnavailable):
        await out.publish(make_job())
    proxy.heal()
    proxy.cut()
    while True:
        try:
            await out.publish(make_job())
            break
        except QueueUnavailable:
            await asyncio.sleep(0.1)
    assert out.connected
    await out.close()
    with pytest.raises(QueueUnavailable):
        await out.publish(make_job())
    proxy.close()


@in_event_loop
async def test_a_broker_that_hangs_cannot_be_published_to_until_it_answers_again(
    vhost: Settings, rabbit_server: RabbitServer
) -> None:
    proxy = TcpProxy(rabbit_server.port)
    out = publisher(vhost(port=proxy.port, broker_heartbeat_s=30))
    await out.publish(make_job())
    assert out.connected
    proxy.partition()  # half-open: heartbeats would tell it only after a minute
    with pytest.raises(QueueUnavailable):
        await out.publish(make_job())
    assert not out.connected
    proxy.heal()
    await asyncio.to_thread(wait_until, lambda: out.connected, 10, "the broker answered")
    await out.publish(make_job())
    await out.close()
    proxy.close()


def status(settings: ServingSettings, ref: JobRef) -> JobStatus:
    async def ask() -> JobStatus:
        store = SessionStore(settings)
        found = await store.status(ref)
        await store.close()
        return found

    return asyncio.run(ask())


def submit(settings: ServingSettings, *jobs: Job) -> None:
    async def run() -> None:
        store = SessionStore(settings)
        for job in jobs:
            await store.submit(job)
        await store.close()

    asyncio.run(run())


def wait_for_code(settings: ServingSettings, job: Job, code: str) -> None:
    def ended() -> bool:
        terminal = status(settings, job.ref).terminal
        return terminal is not None and terminal.error is not None and terminal.error.code == code

    wait_until(ended, 20, f"the job fails with {code}")


def test_a_message_delivered_too_often_ends_as_a_dead_letter_with_a_terminal_error(vhost: Settings) -> None:
    settings, job = vhost(delivery_limit=5, outbox_grace_s=30.0), make_job()
    submit(settings, job)
    out = publisher(settings)
    out.publish_and_wait(job)
    with Sink(settings) as sink:
        for _ in range(6):
            sink.consumer.reject(sink.take(), requeue=True)
        wait_until(lambda: count(settings, DEAD) == 1, 10, "the message is a dead letter")
    reaper = Reaper(settings)
    reaper.start()
    wait_for_code(settings, job, "delivery_failed")
    wait_until(lambda: count(settings, DEAD) == 0, 5, "the dead letter was acknowledged")
    reaper.close()
    out.close_and_wait()


def test_garbage_among_the_dead_letters_is_buried_and_damaged_jobs_are_failed(vhost: Settings) -> None:
    settings, damaged = vhost(outbox_grace_s=30.0), make_job()
    submit(settings, damaged)
    connection = pika.BlockingConnection(parameters(settings))
    channel = connection.channel()
    declare(channel, settings)
    wrong = json.loads(encode(damaged)) | {"schema_version": 99}
    for body in (b"\xff\x00", b"[" * 10_000, b"{}", b'{"tenant": {"a": 1}, "job_id": 5}', json.dumps(wrong).encode()):
        channel.basic_publish("", DEAD, body)
    connection.close()
    reaper = Reaper(settings)
    reaper.start()
    wait_for_code(settings, damaged, "delivery_failed")
    wait_until(lambda: count(settings, DEAD) == 0, 5, "every dead letter was acknowledged")
    reaper.close()


def test_a_dead_letter_of_a_job_that_is_being_decoded_ends_nothing(vhost: Settings) -> None:
    settings, job = vhost(outbox_grace_s=30.0, lease_s=30.0), make_job()
    submit(settings, job)
    log = TokenLog(settings)
    log.claim(job, "w1")
    connection = pika.BlockingConnection(parameters(settings))
    channel = connection.channel()
    declare(channel, settings)
    channel.basic_publish("", DEAD, encode(job))
    connection.close()
    reaper = Reaper(settings)
    reaper.start()
    wait_until(lambda: count(settings, DEAD) == 0, 10, "the dead letter was acknowledged")
    assert status(settings, job.ref).state == "running"
    reaper.close()
    log.close()


def test_the_outbox_publishes_what_was_submitted_and_never_published(vhost: Settings) -> None:
    settings, job = vhost(outbox_grace_s=0.3), make_job()
    submit(settings, job)
    reaper = Reaper(settings)
    reaper.start()
    with Sink(settings) as sink:
        assert sink.take().body == encode(job)
    reaper.close()


def test_a_job_nobody_took_before_its_deadline_ends_with_a_reason(vhost: Settings) -> None:
    settings = vhost(outbox_grace_s=0.3)
    job = make_job(deadline_unix_s=time.time() + 0.2)
    submit(settings, job)
    reaper = Reaper(settings)
    reaper.start()
    wait_for_code(settings, job, "deadline_exceeded")
    reaper.close()


def test_the_shipped_users_can_do_their_work_and_no_more(rabbit_server: RabbitServer, tmp_path: Path) -> None:
    passwords = {role: f"{role}-password" for role in RABBITMQ_ROLES}
    definitions = tmp_path / "definitions.json"
    definitions.write_text(rabbitmq_definitions(passwords))
    rabbit_server.ctl("import_definitions", str(definitions))
    for role in RABBITMQ_ROLES:
        url = f"amqp://axon-{role.replace('_', '-')}:{passwords[role]}@127.0.0.1:{rabbit_server.port}/axon"
        settings, job = settings_for("redis://unused", url), make_job()
        out = publisher(settings)
        with Sink(settings) as sink:
            out.publish_and_wait(job)
            delivery = sink.take()
            assert delivery.body == encode(job)
            sink.consumer.reject(delivery, requeue=False)
            wait_until(lambda: count(settings, DEAD) == 1, 10, "rejected messages become dead letters")  # noqa: B023
        reading = Consumer(settings, 1, models=())
        inbox: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        reading.start(inbox.put)
        reading.ack(inbox.get(timeout=10))
        reading.close()
        out.close_and_wait()
        connection = pika.BlockingConnection(parameters(settings))
        for forbidden in ("other", "axon.other", "axon.jobs"):
            with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="ACCESS_REFUSED"):
                connection.channel().queue_declare(forbidden, durable=True)
        connection.close()
    assert count(settings, SOLO) == 0
