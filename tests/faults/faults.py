"""Everything that is done to the serving path while jobs flow, one coroutine per row of the fault matrix.

Each gets the stack and the traffic, does its harm, and undoes it where somebody would (an operator frees the disk, a
platform restarts the process). None waits for the system to recover: that is what the checker finds out.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import resource
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pika
import redis

from axon_llm.serving.broker import jobs_queue, parameters
from axon_llm.serving.redis_scripts import Keys
from axon_llm.serving.wire import encode
from tests.faults.stack import Stack, WorkerProcess
from tests.faults.tiny_engine import MODEL, POISON
from tests.faults.traffic import UNAVAILABLE, Seen, Traffic
from tests.integration.servers import TcpProxy

JOBS = jobs_queue(MODEL)

Injection = Callable[[Stack, Traffic], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """One row.

    Attributes:
        inject: what is done.
        expected: what must come of it, in words.
        felt: what some worker must have logged because of it (a regular expression), from when it began.
    """

    name: str
    inject: Injection
    expected: str
    felt: str = ""


class NotFelt(Exception):
    """A fault has hit nobody, and must not pass for one that was survived."""


async def _until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Ask, on another thread, until something is so."""
    end = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        if time.monotonic() > end:
            raise NotFelt(f"not within {timeout_s:g} s: {what}")
        await asyncio.sleep(0.05)


async def _until_refused(traffic: Traffic, timeout_s: float) -> None:
    """Submit until something is refused."""
    before, end = len(traffic.refused), time.monotonic() + timeout_s
    while len(traffic.refused) == before:
        if time.monotonic() > end:
            raise NotFelt("nothing was refused")
        traffic.probe()
        await asyncio.sleep(0.4)


def _worker(stack: Stack, traffic: Traffic) -> WorkerProcess:
    return traffic.rng.choice(stack.workers)


async def _busy_worker(stack: Stack, traffic: Traffic, among: Sequence[WorkerProcess] = ()) -> WorkerProcess:
    """Wait for a worker that is in the middle of an answer, so that a fault has something to break."""
    workers, end = among or stack.workers, time.monotonic() + 10
    while time.monotonic() < end:
        holders: list[bytes] = []
        with contextlib.suppress(redis.exceptions.RedisError):
            holders = await asyncio.to_thread(_holders, stack, traffic)
        busy = [
            worker
            for worker in workers
            if worker.process is not None and any(f"-{worker.process.pid}-".encode() in holder for holder in holders)
        ]
        if busy:
            return traffic.rng.choice(busy)
        await asyncio.sleep(0.05)
    raise NotFelt("no worker was in the middle of an answer")


def _holders(stack: Stack, traffic: Traffic) -> list[bytes]:
    """Who holds the jobs that are running with a token or more to their name."""
    open_jobs = [seen.job for seen in traffic.seen if seen.entries and seen.entries[-1].terminal is None]
    with _redis(stack) as client:
        found = [client.hmget(Keys.of(job.ref).job(job.job_id), "state", "holder") for job in open_jobs]
    return [holder for state, holder in found if state == b"running" and holder]  # type: ignore[misc, union-attr]


async def kill_worker(stack: Stack, traffic: Traffic) -> None:
    (await _busy_worker(stack, traffic)).signal(signal.SIGKILL)


async def drain_worker(stack: Stack, traffic: Traffic) -> None:
    (await _busy_worker(stack, traffic)).signal(signal.SIGTERM)


async def zombie_worker(stack: Stack, traffic: Traffic) -> None:
    worker = await _busy_worker(stack, traffic)
    worker.signal(signal.SIGSTOP)
    await asyncio.sleep(stack.pace.zombie_s)
    worker.signal(signal.SIGCONT)


async def poison_job(stack: Stack, traffic: Traffic) -> None:
    job = traffic.job(prompt=f"{POISON} {traffic.rng.random()}")
    while not await traffic.run_job(job, expect="too_many_attempts"):
        await asyncio.sleep(0.3)
        job = traffic.job(prompt=f"{POISON} {traffic.rng.random()}")


async def crash_broker(stack: Stack, traffic: Traffic) -> None:
    await asyncio.to_thread(stack.rabbit.kill)
    await asyncio.to_thread(stack.rabbit.start)


async def broker_disk_alarm(stack: Stack, traffic: Traffic) -> None:
    await asyncio.to_thread(stack.rabbit.ctl, "set_disk_free_limit", "900000GB")
    try:
        await _until_refused(traffic, 20)
    finally:
        await asyncio.to_thread(stack.rabbit.ctl, "set_disk_free_limit", "50MB")


async def broker_memory_alarm(stack: Stack, traffic: Traffic) -> None:
    await asyncio.to_thread(stack.rabbit.ctl, "set_vm_memory_high_watermark", "0.00001")
    try:
        await _until_refused(traffic, 20)
    finally:
        await asyncio.to_thread(stack.rabbit.ctl, "set_vm_memory_high_watermark", "0.4")


async def close_connections(stack: Stack, traffic: Traffic) -> None:
    await asyncio.to_thread(stack.rabbit.ctl, "close_all_connections", "maintenance")


async def purge_queue(stack: Stack, traffic: Traffic) -> None:
    """Messages that no worker has been given yet are gone."""

    def purge() -> int:
        try:
            connection = pika.BlockingConnection(parameters(stack.direct_settings))
            purged = connection.channel().queue_purge(JOBS).method.message_count
            connection.close()
        except (pika.exceptions.AMQPError, OSError):
            return 0
        return int(purged)

    for _ in range(20):  # more at once than workers are given
        traffic.probe()
    await _until(purge, 10.0, "a message was in the queue")


async def delete_queue(stack: Stack, traffic: Traffic) -> None:
    await asyncio.to_thread(stack.rabbit.ctl, "delete_queue", JOBS)


async def crash_redis(stack: Stack, traffic: Traffic) -> None:
    await asyncio.to_thread(stack.redis.kill)
    await asyncio.to_thread(stack.redis.start)


async def hang_redis(stack: Stack, traffic: Traffic) -> None:
    def answers() -> bool:
        with redis.Redis(port=stack.redis.port, socket_timeout=0.2, retry=None) as client:
            try:
                return bool(client.ping())
            except redis.exceptions.TimeoutError:
                return False

    stack.redis.pause()
    try:
        traffic.probe()
        await asyncio.sleep(stack.pace.hang_s)
        if await asyncio.to_thread(answers):
            raise NotFelt("Redis answered all the while")
    finally:
        stack.redis.resume()


def _redis(stack: Stack) -> redis.Redis:
    return redis.Redis(port=stack.redis.port, socket_timeout=5)


async def fill_redis(stack: Stack, traffic: Traffic) -> None:
    def set_limit(limit: str) -> None:
        with _redis(stack) as client:
            client.config_set("maxmemory", limit)

    await asyncio.to_thread(set_limit, "100kb")
    try:
        await _until_refused(traffic, 5)
        await asyncio.sleep(stack.pace.hang_s)
    finally:
        await asyncio.to_thread(set_limit, "0")


async def fill_redis_disk(stack: Stack, traffic: Traffic) -> None:
    """The append-only file cannot grow: with ``appendfsync always`` Redis ends itself rather than lose a write."""
    size = stack.redis.append_only_file().stat().st_size
    pid = stack.redis.pid
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size + 2000, resource.RLIM_INFINITY))
    assert stack.redis.process is not None
    process, end = stack.redis.process, time.monotonic() + 10
    while process.poll() is None and time.monotonic() < end:
        await asyncio.sleep(0.05)
    await asyncio.to_thread(stack.redis.kill)
    await asyncio.to_thread(stack.redis.start)


async def tear_append_only_file(stack: Stack, traffic: Traffic) -> None:
    """Redis dies in the middle of writing a record that it never acknowledged."""
    await asyncio.to_thread(stack.redis.kill)
    with stack.redis.append_only_file().open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$9\r\naxon:torn\r\n$100000\r\nhalf a val")
    await asyncio.to_thread(stack.redis.start)


async def set_redis_back(stack: Stack, traffic: Traffic) -> None:
    """Worse than promised: Redis comes back without its last writes, acknowledged or not."""
    await asyncio.to_thread(stack.redis.kill)
    traffic.set_back_at_unix_s = time.time()
    path = stack.redis.append_only_file()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(max(0, size - traffic.rng.randint(1, min(4000, max(size // 2, 1)))))
    await asyncio.to_thread(stack.redis.start)


async def kill_subscriptions(stack: Stack, traffic: Traffic) -> None:
    def kill() -> bool:
        with contextlib.suppress(redis.exceptions.RedisError), _redis(stack) as client:
            return int(client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")) > 0  # type: ignore[arg-type]
        return False

    await _until(kill, 10.0, "somebody was subscribed")


async def slow_subscriber(stack: Stack, traffic: Traffic) -> None:
    """Somebody subscribes to everything and does not read; Redis must cut it off and nobody else may notice."""

    def subscribe() -> socket.socket:
        with _redis(stack) as client:
            client.config_set("client-output-buffer-limit", "pubsub 8mb 4mb 1")
        connection = socket.create_connection(("127.0.0.1", stack.redis.port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(b"PSUBSCRIBE *\r\n")
        return connection

    connection = await asyncio.to_thread(subscribe)
    address = "{}:{}".format(*connection.getsockname())

    def cut_off() -> bool:
        with contextlib.suppress(redis.exceptions.RedisError), _redis(stack) as client:
            client.publish("noise", bytes(1_000_000))  # beside it, what the system itself takes in for a connection
            return address not in {found["addr"] for found in client.client_list()}
        return False

    try:
        await _until(cut_off, 20.0, "the subscriber was cut off")
    finally:
        connection.close()


async def drop_wakeups(stack: Stack, traffic: Traffic) -> None:
    """No wake-up arrives for a while, though every connection looks well: polling must make up for it."""
    await asyncio.gather(*(kill_subscriptions(stack, traffic) for _ in range(3)))
    for _ in range(5):
        await asyncio.sleep(0.1)
        await kill_subscriptions(stack, traffic)


async def submit_and_die(stack: Stack, traffic: Traffic) -> None:
    """A session manager dies between storing a job and publishing it: the outbox publishes it."""
    job = traffic.job()
    try:
        await traffic.store.submit(job)
    except UNAVAILABLE:
        return
    traffic.seen.append(seen := Seen(job))
    await traffic.follow(seen)


async def publish_and_die(stack: Stack, traffic: Traffic) -> None:
    """A session manager dies after the broker's confirm: the job is in the queue and in the outbox."""
    job = traffic.job()
    try:
        await traffic.store.submit(job)
        await traffic.queue.publish(job)
    except UNAVAILABLE:
        traffic.refused.append(job)
        with contextlib.suppress(*UNAVAILABLE):
            await traffic.store.cancel(job.ref)
        return
    traffic.seen.append(seen := Seen(job))
    await traffic.follow(seen)


async def publish_twice(stack: Stack, traffic: Traffic) -> None:
    job = traffic.job()
    try:
        await traffic.store.submit(job)
        await traffic.queue.publish(job)
    except UNAVAILABLE:
        traffic.refused.append(job)
        with contextlib.suppress(*UNAVAILABLE):
            await traffic.store.cancel(job.ref)
        return
    for _ in range(3):
        with contextlib.suppress(*UNAVAILABLE):
            await traffic.queue.publish(job)
    traffic.seen.append(seen := Seen(job))
    await traffic.follow(seen)


async def _partition(stack: Stack, traffic: Traffic, *proxies: TcpProxy) -> None:
    await _busy_worker(stack, traffic, stack.workers[:1])  # the one behind proxies
    for proxy in proxies:
        proxy.partition()
    await asyncio.sleep(stack.pace.zombie_s)
    for proxy in proxies:
        proxy.heal()


async def partition_from_redis(stack: Stack, traffic: Traffic) -> None:
    await _partition(stack, traffic, stack.worker_redis)


async def partition_from_broker(stack: Stack, traffic: Traffic) -> None:
    await _partition(stack, traffic, stack.worker_amqp)


async def partition_from_both(stack: Stack, traffic: Traffic) -> None:
    await _partition(stack, traffic, stack.worker_redis, stack.worker_amqp)


async def partition_clients(stack: Stack, traffic: Traffic) -> None:
    proxy = traffic.rng.choice((stack.client_redis, stack.client_amqp))
    proxy.partition()
    await asyncio.sleep(stack.pace.hang_s)
    proxy.heal()


async def reset_connections(stack: Stack, traffic: Traffic) -> None:
    for proxy in (stack.worker_redis, stack.worker_amqp, stack.client_redis, stack.client_amqp):
        proxy.cut()


async def latency(stack: Stack, traffic: Traffic) -> None:
    proxies = (stack.worker_redis, stack.worker_amqp, stack.client_redis, stack.client_amqp)
    for proxy in proxies:
        proxy.delay_s = 0.05
    await asyncio.sleep(stack.pace.hang_s)
    for proxy in proxies:
        proxy.delay_s = 0.0


async def garbage_messages(stack: Stack, traffic: Traffic) -> None:
    """Bytes that are no job, a job of another schema, and a job that expired on the way."""
    known = traffic.job()
    try:
        await traffic.store.submit(known)
    except UNAVAILABLE:
        return
    traffic.seen.append(seen := Seen(known, expect="delivery_failed"))
    other_schema = encode(known).replace(b'"schema_version":1', b'"schema_version":2')
    late = traffic.job(deadline_unix_s=time.time() + 0.05)
    with contextlib.suppress(*UNAVAILABLE):
        if await traffic.store.submit(late):
            traffic.seen.append(late_seen := Seen(late, expect="deadline_exceeded"))
            await asyncio.sleep(0.1)

    def publish() -> None:
        for _ in range(50):
            try:
                connection = pika.BlockingConnection(parameters(stack.direct_settings))
                channel = connection.channel()
                for body in (b"\x00garbage", b"[" * 5000, b'{"schema_version":1}', other_schema, encode(late)):
                    channel.basic_publish("", JOBS, body)
                connection.close()
                return
            except (pika.exceptions.AMQPError, OSError):
                time.sleep(0.2)

    await asyncio.to_thread(publish)
    await traffic.follow(seen)
    if late in [item.job for item in traffic.seen]:
        await traffic.follow(late_seen)


async def forget_scripts(stack: Stack, traffic: Traffic) -> None:
    def flush() -> int:
        with _redis(stack) as client:
            client.script_flush()
            return missed(client)

    def missed(client: redis.Redis) -> int:
        errors: dict[str, Any] = client.info("errorstats")  # type: ignore[assignment]
        return int(errors.get("errorstat_NOSCRIPT", {"count": 0})["count"])

    def missed_since(before: int) -> bool:
        with contextlib.suppress(redis.exceptions.RedisError), _redis(stack) as client:
            return missed(client) > before
        return False

    before = await asyncio.to_thread(flush)
    await _until(lambda: missed_since(before), 10.0, "somebody missed a script")


async def lose_a_running_job(stack: Stack, traffic: Traffic) -> None:
    """The state and the log of a job vanish from Redis while it is being decoded."""
    job = traffic.job()
    task = asyncio.create_task(traffic.run_job(job))

    def lose() -> None:
        keys = Keys.of(job.ref)
        end = time.monotonic() + 5
        with contextlib.suppress(redis.exceptions.RedisError), _redis(stack) as client:
            while client.xlen(keys.log(job.job_id)) < 3 and time.monotonic() < end:
                time.sleep(0.01)
            client.delete(keys.job(job.job_id), keys.log(job.job_id))

    await asyncio.to_thread(lose)
    await task


ALL_FINISH = "all finish"
TAKEN_OVER = r"claimed, attempt [2-9]"
HANDED_BACK = r"drained, [1-9]\d* unfinished jobs handed back"
FENCED = r": (fenced|done), dropped at token"
NO_BROKER = r"broker connection lost"
NO_REDIS = r"Redis (did not answer|refuses writes)"
PUBLISHED_AGAIN = r"published again after"
QUEUE_GONE = rf"a queue was deleted|declaring {re.escape(JOBS)}|{re.escape(JOBS)} delivers nothing"
ROWS: tuple[Fault, ...] = (
    Fault("worker killed while decoding", kill_worker, "continues at the next token elsewhere", felt=TAKEN_OVER),
    Fault("worker drained (SIGTERM)", drain_worker, "handed back, continues elsewhere at once", felt=HANDED_BACK),
    Fault("zombie worker (stopped, continued)", zombie_worker, "its emits are fenced, nothing doubled", felt=FENCED),
    Fault("poison job", poison_job, "it fails with a reason, its neighbours finish", felt="moved to the solo queue"),
    Fault("broker crash", crash_broker, ALL_FINISH, felt=NO_BROKER),
    Fault("broker disk alarm", broker_disk_alarm, "503, then recovery"),
    Fault("broker memory alarm", broker_memory_alarm, "503, then recovery"),
    Fault("AMQP connections closed", close_connections, ALL_FINISH, felt=NO_BROKER),
    Fault("queue purged", purge_queue, "the outbox makes up for it", felt=PUBLISHED_AGAIN),
    Fault("queue deleted", delete_queue, "declared again, the outbox makes up for it", felt=QUEUE_GONE),
    Fault("Redis crash", crash_redis, "acknowledged tokens survive", felt=NO_REDIS),
    Fault("Redis hang", hang_redis, "retries or 503"),
    Fault("Redis memory full", fill_redis, "503 or retries, never half a write", felt=NO_REDIS),
    Fault("Redis disk full", fill_redis_disk, "acknowledged tokens survive", felt=NO_REDIS),
    Fault("append-only file torn", tear_append_only_file, "acknowledged tokens survive", felt=NO_REDIS),
    Fault(
        "Redis set back (file truncated)",
        set_redis_back,
        "filled in from memory or generated again, the same",
        felt=NO_REDIS,
    ),
    Fault("Redis scripts forgotten", forget_scripts, "loaded again"),
    Fault("a running job lost from Redis", lose_a_running_job, "claimed anew and filled in"),
    Fault("Pub/Sub connections killed", kill_subscriptions, "replay from the log, no gap"),
    Fault("wake-ups lost for a while", drop_wakeups, "the log is polled, no gap"),
    Fault("slow subscriber", slow_subscriber, "it is cut off, others unaffected"),
    Fault(
        "session manager dies before publishing", submit_and_die, "the outbox publishes the job", felt=PUBLISHED_AGAIN
    ),
    Fault("session manager dies after the confirm", publish_and_die, "one answer"),
    Fault("duplicate publish", publish_twice, "one answer"),
    Fault(
        "worker cut off from Redis (half-open)", partition_from_redis, "fenced, others finish its jobs", felt=TAKEN_OVER
    ),
    Fault(
        "worker cut off from the broker (half-open)", partition_from_broker, "it finishes what it has", felt=NO_BROKER
    ),
    Fault("worker cut off from both", partition_from_both, "fenced, others finish its jobs", felt=TAKEN_OVER),
    Fault("session manager partitioned", partition_clients, ALL_FINISH),
    Fault("connections reset", reset_connections, ALL_FINISH, felt=NO_BROKER),
    Fault("latency 50 ms each way", latency, ALL_FINISH),
    Fault(
        "garbage, wrong schema, expired",
        garbage_messages,
        "dead letters; known jobs fail with a reason",
        felt="is no job",
    ),
)
