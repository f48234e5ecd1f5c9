"""What only Redis can show.

Leases and take-overs, lost state, forgotten scripts, full memory, crashes, the roles' users.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.exceptions
from pydantic import SecretStr

from axon_llm.serving import http_service, redis_client, redis_scripts, session_store, wakeups
from axon_llm.serving.embedded import EmbeddedQueue
from axon_llm.serving.http_auth import Anybody
from axon_llm.serving.http_service import Service
from axon_llm.serving.http_settings import SessionManagerSettings
from axon_llm.serving.ports import Emit, StoreUnavailable
from axon_llm.serving.redis_scripts import OUTBOX, WATCH, Keys, schedule_member
from axon_llm.serving.session_store import SessionStore
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.token_log import TokenLog
from axon_llm.serving.wire import Job, LogEntry, Terminal
from deploy.backends import REDIS_ROLES, redis_acl
from tests.integration.backends import entries, in_event_loop, make_job
from tests.integration.conftest import settings_for
from tests.integration.servers import RedisServer, TcpProxy
from tests.needs import need

LEASE_S = 0.6
SILENCE_S = 0.3


def quick(server: RedisServer, **changes: object) -> ServingSettings:
    values: dict[str, object] = {"lease_s": LEASE_S, "takeover_silence_s": SILENCE_S, "outbox_grace_s": 0.2}
    return settings_for(server.url(), "amqp://unused", **(values | changes))


def submit(settings: ServingSettings, *jobs: Job) -> None:
    async def run() -> None:
        store = SessionStore(settings)
        try:
            for job in jobs:
                await store.submit(job)
        finally:
            await store.close()

    asyncio.run(run())


def read_log(settings: ServingSettings, job: Job) -> tuple[LogEntry, ...]:
    async def run() -> tuple[LogEntry, ...]:
        store = SessionStore(settings)
        log = tuple(await store.read_log(job.ref))
        await store.close()
        return log

    return asyncio.run(run())


def test_a_silent_holder_is_waited_for_then_replaced_and_fenced_off(server: RedisServer) -> None:
    settings, job = quick(server), make_job()
    submit(settings, job)
    log = TokenLog(settings)
    old = log.claim(job, "w1")
    log.emit([Emit(job.ref, old.fence, entries(1, 2))])
    waiting = log.claim(job, "w2", redelivered=True)
    assert waiting.outcome == "busy"
    assert 0 < waiting.retry_after_s <= SILENCE_S
    time.sleep(SILENCE_S + 0.1)
    assert log.claim(job, "w2").outcome == "duplicate"  # nobody said that the first one's connection was lost
    new = log.claim(job, "w2", redelivered=True)
    assert (new.outcome, new.attempt, new.entries) == ("run", 2, entries(1, 2))
    [stale, fresh] = log.emit([Emit(job.ref, old.fence, entries(3, 4)), Emit(job.ref, new.fence, entries(3, 3))])
    assert (stale.outcome, fresh.outcome) == ("fenced", "ok")
    assert read_log(settings, job) == entries(1, 3)
    log.close()


def test_renewing_keeps_the_job(server: RedisServer) -> None:
    settings, job = quick(server), make_job()
    submit(settings, job)
    log = TokenLog(settings)
    fence = log.claim(job, "w1").fence
    for _ in range(4):
        time.sleep(SILENCE_S / 2)
        assert log.emit([Emit(job.ref, fence, ())])[0].outcome == "ok"
    assert log.claim(job, "w2", redelivered=True).outcome == "busy"
    log.close()


def test_an_expired_lease_is_taken_over_even_by_a_message_published_again(server: RedisServer) -> None:
    settings, job = quick(server), make_job()
    submit(settings, job)
    log = TokenLog(settings)
    log.claim(job, "w1")
    time.sleep(LEASE_S + 0.1)
    assert log.claim(job, "w2").attempt == 2
    log.close()


def test_the_third_attempt_runs_alone_and_the_fifth_is_a_failure_with_a_reason(server: RedisServer) -> None:
    settings, job = quick(server, takeover_silence_s=0.01), make_job(session_id="poisoned")
    submit(settings, job)
    log = TokenLog(settings)
    attempts = []
    for worker in ("w1", "w2"):
        attempts.append(log.claim(job, worker, redelivered=True))
        time.sleep(0.05)
    assert log.claim(job, "w3", redelivered=True).outcome == "suspect"
    assert log.claim(job, "w4", redelivered=True).outcome == "suspect"  # the move may be repeated; it counts once
    for worker in ("w5", "w6"):
        attempts.append(log.claim(job, worker, redelivered=True, solo=True))
        time.sleep(0.05)
    assert [(claim.outcome, claim.attempt) for claim in attempts] == [("run", 1), ("run", 2), ("run", 3), ("run", 4)]
    assert log.claim(job, "w7", redelivered=True, solo=True).outcome == "failed"
    assert log.emit([Emit(job.ref, attempts[-1].fence, entries(1, 1))])[0].outcome == "done"
    [last] = read_log(settings, job)
    assert last.terminal is not None
    assert last.terminal.error is not None
    assert last.terminal.error.code == "too_many_attempts"
    submit(settings, make_job(session_id="poisoned"))  # its session is free again
    log.close()


def test_scripts_that_redis_has_forgotten_are_loaded_again(server: RedisServer) -> None:
    settings, job = quick(server), make_job()
    submit(settings, job)
    log = TokenLog(settings)
    fence = log.claim(job, "w1").fence
    client = redis.Redis(port=server.port)
    client.script_flush()
    assert log.emit([Emit(job.ref, fence, entries(1, 1))])[0].outcome == "ok"
    client.script_flush()
    submit(settings, make_job())
    client.close()
    log.close()


def test_a_health_check_may_fall_due_at_any_moment_of_a_new_connection(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before redis-py was told to keep its name to itself, a check between its first two commands took the reply to the
    # first for a pong; an interval of next to nothing makes every moment one for a check.
    usual = redis_scripts.connection_options

    def always_due(settings: ServingSettings) -> dict[str, Any]:
        return usual(settings) | {"health_check_interval": 1e-9}

    monkeypatch.setattr(redis_scripts, "connection_options", always_due)
    monkeypatch.setattr(redis_client, "connection_options", always_due)
    settings, job = quick(server), make_job()
    submit(settings, job)
    log = TokenLog(settings)
    assert log.claim(job, "w1").outcome == "run"
    log.close()

    async def ping() -> bool:
        async with redis_client.asyncio_client(settings) as client:
            return bool(await client.ping())

    assert asyncio.run(ping())


def test_a_job_that_redis_lost_is_created_again_with_a_newer_fence(server: RedisServer) -> None:
    settings, job = quick(server), make_job(session_id="lost")
    submit(settings, job)
    log = TokenLog(settings)
    fence = log.claim(job, "w1").fence
    client = redis.Redis(port=server.port)
    client.flushall()
    assert log.emit([Emit(job.ref, fence, entries(1, 2))])[0].outcome == "missing"
    claim = log.claim(job, "w2")
    assert (claim.outcome, claim.entries) == ("run", ())
    assert claim.fence > fence
    assert (
        log.emit([Emit(job.ref, fence, entries(1, 1)), Emit(job.ref, claim.fence, entries(1, 1))])[0].outcome
        == "fenced"
    )
    assert client.get(Keys.of(job.ref).turn) == job.job_id.encode()
    client.flushall()
    late = job.model_copy(update={"deadline_unix_s": time.time() - 1})
    assert log.claim(late, "w3").outcome == "done"
    client.close()
    log.close()


def test_a_full_redis_refuses_and_leaves_nothing_half_written(server: RedisServer) -> None:
    settings, job = quick(server), make_job(session_id="full")
    submit(settings, job)
    log = TokenLog(settings)
    fence = log.claim(job, "w1").fence
    client = redis.Redis(port=server.port)
    before = {key: client.dump(key) for key in client.scan_iter()}
    client.config_set("maxmemory", "1kb")
    with pytest.raises(StoreUnavailable):
        log.emit([Emit(job.ref, fence, entries(1, 2, end="stop"))])
    with pytest.raises(StoreUnavailable):
        log.fail(job.ref, Terminal(finish_reason="cancelled"))
    with pytest.raises(StoreUnavailable):
        submit(settings, make_job())
    client.config_set("maxmemory", "0")
    assert {key: client.dump(key) for key in before} == before
    assert log.emit([Emit(job.ref, fence, entries(1, 2, end="stop"))])[0].outcome == "ok"
    client.close()
    log.close()


def test_acknowledged_entries_survive_a_crash(server: RedisServer) -> None:
    # a slow disk makes fifty synchronous writes longer than the other tests' short leases and time-outs
    settings, job = quick(server, lease_s=30.0, redis_timeout_s=5.0), make_job()
    submit(settings, job)
    log = TokenLog(settings)
    fence = log.claim(job, "w1").fence
    for seq in range(1, 51):
        log.emit([Emit(job.ref, fence, entries(seq, seq))])
    server.kill()
    with pytest.raises(StoreUnavailable):
        log.emit([Emit(job.ref, fence, entries(51, 51))])
    server.start()
    assert log.emit([Emit(job.ref, fence, entries(51, 51))])[0].outcome == "ok"
    assert read_log(settings, job) == entries(1, 51)
    log.close()


def test_a_hung_redis_is_given_up_in_time_and_the_emit_may_be_repeated(server: RedisServer) -> None:
    settings, job = quick(server, redis_timeout_s=0.2), make_job()
    submit(settings, job)
    log = TokenLog(settings)
    fence = log.claim(job, "w1").fence
    server.pause()
    with pytest.raises(StoreUnavailable):
        log.emit([Emit(job.ref, fence, entries(1, 3))])
    server.resume()
    assert log.emit([Emit(job.ref, fence, entries(1, 3))])[0].outcome == "ok"
    assert read_log(settings, job) == entries(1, 3)
    log.close()


def test_the_outbox_hands_out_what_nobody_holds_and_forgets_what_has_ended(server: RedisServer) -> None:
    settings = quick(server, lease_s=30.0, outbox_grace_s=2.0)
    lingering, confirmed, held, ended, late = (make_job() for _ in range(5))
    late = late.model_copy(update={"deadline_unix_s": time.time() + 0.1})

    async def prepare() -> None:
        store = SessionStore(settings)
        for job in (lingering, confirmed, held, ended, late):
            await store.submit(job)
        await store.published(confirmed.ref)
        await store.cancel(ended.ref)
        await store.close()

    asyncio.run(prepare())
    log = TokenLog(settings)
    log.claim(held, "w1")
    assert log.due() == []
    time.sleep(2.2)
    due = {item.job.job_id: item for item in log.due()}
    assert set(due) == {lingering.job_id, confirmed.job_id, late.job_id}
    assert due[lingering.job_id].job == lingering
    assert not due[lingering.job_id].confirmed
    assert due[confirmed.job_id].confirmed
    assert due[late.job_id].expired
    assert log.due() == []  # handed out once, then put off
    with redis.Redis(port=server.port) as client:
        left = client.zrange(OUTBOX, 0, -1) + client.zrange(WATCH, 0, -1)
    assert schedule_member(ended.ref).encode() not in left
    log.close()


@in_event_loop
async def test_a_stream_goes_on_through_lost_wakeups_and_restarts(server: RedisServer) -> None:
    settings = quick(server, poll_s=0.2)
    store, log, job = SessionStore(settings), TokenLog(settings), make_job()
    await store.submit(job)
    fence = log.claim(job, "w1").fence
    seen: list[LogEntry] = []

    async def follow() -> None:
        async for entry in store.stream(job.ref):
            assert entry is not None
            seen.append(entry)

    following = asyncio.create_task(follow())
    client = redis.Redis(port=server.port)
    for seq in range(1, 10):
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await asyncio.to_thread(log.emit, [Emit(job.ref, fence, entries(seq, seq))])
        await asyncio.sleep(0.03)
    await asyncio.to_thread(server.kill)
    await asyncio.sleep(0.3)
    await asyncio.to_thread(server.start)
    await asyncio.to_thread(log.emit, [Emit(job.ref, fence, entries(10, 12, end="stop"))])
    await following
    assert tuple(seen) == entries(1, 12, end="stop")
    client.close()
    log.close()
    await store.close()


@in_event_loop
async def test_a_stream_that_does_not_read_holds_a_bounded_number_of_messages(server: RedisServer) -> None:
    settings = quick(server)
    store, log, job = SessionStore(settings), TokenLog(settings), make_job()
    await store.submit(job)
    fence = log.claim(job, "w1").fence
    stream = store.stream(job.ref)
    log.emit([Emit(job.ref, fence, entries(1, 1))])
    assert await anext(stream) == entries(1, 1)[0]
    for seq in range(2, 601):
        await asyncio.to_thread(log.emit, [Emit(job.ref, fence, entries(seq, seq))])
    [listening] = store._wakeups._streams[Keys.of(job.ref).channel(job.job_id)]
    assert len(listening._messages) <= 256
    await asyncio.to_thread(log.emit, [Emit(job.ref, fence, entries(601, 601, end="stop"))])
    assert tuple([entry async for entry in stream]) == entries(2, 601, end="stop")
    log.close()
    await store.close()


@in_event_loop
async def test_a_stream_that_begins_while_redis_is_away_begins_when_it_is_back(server: RedisServer) -> None:
    settings = quick(server, redis_timeout_s=0.3, poll_s=0.2)
    store, log, job = SessionStore(settings), TokenLog(settings), make_job()
    await store.submit(job)
    await asyncio.to_thread(log.emit, [Emit(job.ref, log.claim(job, "w1").fence, entries(1, 4, end="stop"))])
    server.pause()
    following = asyncio.create_task(_all(store.stream(job.ref, deadline_unix_s=job.deadline_unix_s)))
    await asyncio.sleep(1.0)
    assert not following.done()
    server.resume()
    assert tuple(await following) == entries(1, 4, end="stop")
    log.close()
    await store.close()


@in_event_loop
async def test_a_stream_of_a_job_that_redis_lost_waits_for_the_worker_that_makes_it_anew(server: RedisServer) -> None:
    settings = quick(server, poll_s=0.2)
    store, log, job = SessionStore(settings), TokenLog(settings), make_job()
    await store.submit(job)
    with redis.Redis(port=server.port) as client:
        client.flushall()
    following = asyncio.create_task(_all(store.stream(job.ref, deadline_unix_s=job.deadline_unix_s)))
    await asyncio.sleep(0.3)
    await asyncio.to_thread(log.emit, [Emit(job.ref, log.claim(job, "w1").fence, entries(1, 4, end="stop"))])
    assert tuple(await following) == entries(1, 4, end="stop")
    log.close()
    await store.close()


@in_event_loop
async def test_a_submission_whose_reply_was_lost_is_still_the_first(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, job = SessionStore(quick(server)), make_job(session_id="s1")
    monkeypatch.setattr(session_store.secrets, "token_hex", lambda size: "one call")
    assert await store.submit(job)
    assert await store.submit(job)  # redis-py sends the same command again when a reply does not come
    monkeypatch.setattr(session_store.secrets, "token_hex", lambda size: "another")
    assert not await store.submit(job)
    await store.close()


@in_event_loop
async def test_a_job_that_is_stored_after_its_submission_timed_out_is_cancelled(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_service, "CANCEL_PAUSE_S", 0.1)
    settings = SessionManagerSettings(redis_url=SecretStr(server.url()), trust="open")
    queue = EmbeddedQueue(settings, prefetch=1)
    service, job = Service(settings, SessionStore(settings), queue, Anybody()), make_job()
    service.spawn(service.cancel(job.ref, may_come=True))
    await asyncio.sleep(0.2)
    await service.store.submit(job)
    while (await service.store.status(job.ref)).state != "done":
        await asyncio.sleep(0.05)
    await service.close()


@in_event_loop
async def test_a_half_open_subscription_is_made_up_for_by_polling(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeups, "PING_S", 600.0)
    proxy = TcpProxy(server.port)
    direct = quick(server)
    store = SessionStore(settings_for(f"redis://127.0.0.1:{proxy.port}/0", "amqp://unused", poll_s=0.2))
    log, job = TokenLog(direct), make_job()
    await store.submit(job)
    fence = log.claim(job, "w1").fence
    following = asyncio.create_task(_all(store.stream(job.ref)))
    await asyncio.sleep(0.3)
    proxy.hang(b"SUBSCRIBE")
    await asyncio.to_thread(log.emit, [Emit(job.ref, fence, entries(1, 4, end="stop"))])
    assert tuple(await asyncio.wait_for(following, 10)) == entries(1, 4, end="stop")
    log.close()
    await store.close()
    proxy.close()


@in_event_loop
async def test_a_subscription_that_has_gone_silent_is_made_anew(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeups, "PING_S", 0.1)
    monkeypatch.setattr(wakeups, "SILENCE_S", 0.5)
    proxy = TcpProxy(server.port)
    client = redis_client.asyncio_client(settings_for(f"redis://127.0.0.1:{proxy.port}/0", "amqp://unused"))
    hub = wakeups.WakeUps(client)
    with redis.Redis(port=server.port) as publisher:
        async with hub.subscribe("axon:{x}:ch:j") as live:
            await asyncio.wait_for(live.confirmed.wait(), 5)
            proxy.hang()
            assert await live.wait(5) == []  # a nudge: the connection was given up
            heard: list[bytes] | None = None
            while not heard:
                await asyncio.to_thread(publisher.publish, "axon:{x}:ch:j", "hello")
                heard = await live.wait(0.2)
            assert set(heard) == {b"hello"}
    await hub.close()
    await client.aclose()
    proxy.close()


async def _all(stream: object) -> list[LogEntry]:
    return [entry async for entry in stream]  # type: ignore[attr-defined]


def test_the_shipped_users_can_do_their_work_and_no_more(tmp_path: Path) -> None:
    need("redis-server")
    passwords = {role: f"{role}-password" for role in REDIS_ROLES}
    with RedisServer(tmp_path / "redis", acl=redis_acl(passwords)) as server:
        assert isinstance(server, RedisServer)

        def settings(role: str) -> ServingSettings:
            url = server.url(f"axon-{role.replace('_', '-')}", passwords[role])
            return settings_for(url, "amqp://unused", outbox_grace_s=0.01)

        job = make_job(session_id="s1")

        async def front() -> None:
            store = SessionStore(settings("session_manager"))
            await store.reserve("acme", "key", "hash", job.job_id)
            await store.submit(job)
            await store.published(job.ref)
            log = TokenLog(settings("worker"))
            fence = (await asyncio.to_thread(log.claim, job, "w1")).fence
            stream = store.stream(job.ref)
            await asyncio.to_thread(log.emit, [Emit(job.ref, fence, entries(1, 1))])
            assert await anext(stream) == entries(1, 1)[0]
            await asyncio.to_thread(log.emit, [Emit(job.ref, fence, entries(2, 2, end="stop"))])
            assert await anext(stream) == entries(2, 2, end="stop")[0]
            for call in (
                store.find("acme", job.job_id),
                store.status(job.ref),
                store.cancel(job.ref),
                store.history("acme", "s1"),
                store.delete_session("acme", "s1"),
                store.unreserve("acme", "key", job.job_id),
                store.workers(),
                store.ping(),
            ):
                await call
            log.close()
            await store.close()

        asyncio.run(front())
        for role in ("worker", "session_manager"):  # both run the reaper
            log = TokenLog(settings(role))
            submit(settings("session_manager"), lingering := make_job())
            time.sleep(0.05)
            log.due()
            log.fail(lingering.ref, Terminal(finish_reason="cancelled"))
            log.close()
        for role, command in (
            ("worker", ("HGETALL", "axon:key:1")),
            ("worker", ("GET", "axon:ref:acme:x")),
            ("worker", ("KEYS", "*")),
            ("session_manager", ("HSET", "axon:key:1", "a", "b")),
            ("session_manager", ("FLUSHALL",)),
            ("session_manager", ("CONFIG", "GET", "*")),
            ("keys", ("GET", "axon:{acme:s1}:turn")),
        ):
            client = redis.Redis.from_url(settings(role).redis_url.get_secret_value())
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
            client.close()
        nobody = redis.Redis(port=server.port)
        with pytest.raises(redis.exceptions.AuthenticationError):
            nobody.ping()
        nobody.close()


def test_what_scripts_wrote_is_there_after_a_crash_with_the_shipped_users(tmp_path: Path) -> None:
    need("redis-server")
    passwords = {role: f"{role}-password" for role in REDIS_ROLES}
    with RedisServer(tmp_path / "redis", acl=redis_acl(passwords)) as server:
        assert isinstance(server, RedisServer)
        settings = settings_for(server.url("axon-session-manager", passwords["session_manager"]), "amqp://unused")
        jobs = [make_job() for _ in range(50)]
        submit(settings, *jobs)
        server.kill()
        server.start()
        log = TokenLog(settings_for(server.url("axon-worker", passwords["worker"]), "amqp://unused"))
        assert [log.claim(job, "w1").attempt for job in jobs] == [1] * 50
        log.close()

        async def states() -> list[str]:
            store = SessionStore(settings)
            found = [(await store.status(job.ref)).state for job in jobs]
            await store.close()
            return found

        assert asyncio.run(states()) == ["running"] * 50
