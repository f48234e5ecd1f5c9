"""The contract of store and queue, asked of Redis with RabbitMQ and of the embedded pair alike."""

from __future__ import annotations

import asyncio
import time

import pytest

from axon_llm.serving.ports import Emit, IdempotencyConflict, JobNotFound, TurnConflict
from axon_llm.serving.wire import ErrorInfo, LogEntry, Message, ModelCard, Terminal, Turn, WorkerCard
from tests.integration.backends import MODEL, Backend, entries, in_event_loop, make_job


async def collect(stream: object) -> list[LogEntry]:
    return [entry async for entry in stream if entry is not None]  # type: ignore[attr-defined]


@in_event_loop
async def test_a_log_reads_back_what_was_emitted_in_order(backend: Backend) -> None:
    store, worker, job = backend.store(), backend.worker_store(), make_job()
    assert await store.submit(job)
    claim = worker.claim(job, "w1")
    assert (claim.outcome, claim.attempt, claim.entries) == ("run", 1, ())
    [first] = worker.emit([Emit(job.ref, claim.fence, entries(1, 3))])
    [second] = worker.emit([Emit(job.ref, claim.fence, entries(4, 5, end="length"))])
    assert (first.outcome, first.next_seq) == ("ok", 4)
    assert (second.outcome, second.next_seq) == ("ok", 6)
    assert tuple(await store.read_log(job.ref)) == entries(1, 5, end="length")
    assert await store.read_log(job.ref, after=3, limit=1) == list(entries(4, 4))
    status = await store.status(job.ref)
    assert (status.state, status.next_seq) == ("done", 6)
    assert status.terminal is not None
    assert status.terminal.finish_reason == "length"
    await store.close()


@in_event_loop
async def test_submitting_the_same_job_twice_keeps_one(backend: Backend) -> None:
    store, job = backend.store(), make_job()
    assert await store.submit(job)
    assert not await store.submit(job)
    await store.close()


@in_event_loop
async def test_an_emit_sent_again_changes_nothing(backend: Backend) -> None:
    store, worker, job = backend.store(), backend.worker_store(), make_job()
    await store.submit(job)
    fence = worker.claim(job, "w1").fence
    worker.emit([Emit(job.ref, fence, entries(1, 2))])
    [again] = worker.emit([Emit(job.ref, fence, entries(1, 4))])
    assert (again.outcome, again.next_seq) == ("ok", 5)
    final = Emit(job.ref, fence, entries(5, 6, end="stop"))
    assert [result.outcome for result in worker.emit([final]) + worker.emit([final])] == ["ok", "ok"]
    assert tuple(await store.read_log(job.ref)) == entries(1, 6, end="stop")
    await store.close()


@in_event_loop
async def test_an_emit_that_leaves_a_gap_is_refused_and_told_where_to_begin(backend: Backend) -> None:
    store, worker, job = backend.store(), backend.worker_store(), make_job()
    await store.submit(job)
    fence = worker.claim(job, "w1").fence
    worker.emit([Emit(job.ref, fence, entries(1, 2))])
    [result] = worker.emit([Emit(job.ref, fence, entries(4, 5))])
    assert (result.outcome, result.next_seq) == ("gap", 3)
    assert tuple(await store.read_log(job.ref)) == entries(1, 2)
    await store.close()


@in_event_loop
async def test_a_wrong_fence_writes_nothing(backend: Backend) -> None:
    store, worker, job = backend.store(), backend.worker_store(), make_job()
    await store.submit(job)
    fence = worker.claim(job, "w1").fence
    newer = worker.claim(job, "w1").fence
    assert newer > fence
    [stale, fresh] = worker.emit([Emit(job.ref, fence, entries(1, 1)), Emit(job.ref, newer, entries(1, 2))])
    assert (stale.outcome, fresh.outcome) == ("fenced", "ok")
    assert tuple(await store.read_log(job.ref)) == entries(1, 2)
    await store.close()


@in_event_loop
async def test_claiming_again_returns_the_log_and_counts_no_attempt(backend: Backend) -> None:
    store, worker, job = backend.store(), backend.worker_store(), make_job()
    await store.submit(job)
    worker.emit([Emit(job.ref, worker.claim(job, "w1").fence, entries(1, 3))])
    claim = worker.claim(job, "w1")
    assert (claim.outcome, claim.attempt, claim.entries) == ("run", 1, entries(1, 3))
    await store.close()


@in_event_loop
async def test_a_second_worker_is_told_that_the_first_lives(backend: Backend) -> None:
    store, worker, job = backend.store(), backend.worker_store(), make_job()
    await store.submit(job)
    worker.claim(job, "w1")
    assert worker.claim(job, "w2").outcome == "duplicate"
    await store.close()


@in_event_loop
async def test_a_released_job_goes_on_elsewhere_without_counting_an_attempt(backend: Backend) -> None:
    store, worker, job = backend.store(), backend.worker_store(), make_job()
    await store.submit(job)
    fence = worker.claim(job, "w1").fence
    worker.emit([Emit(job.ref, fence, entries(1, 2))])
    worker.release(job.ref, fence)
    [late] = worker.emit([Emit(job.ref, fence, entries(3, 3))])
    assert late.outcome == "fenced"
    claim = worker.claim(job, "w2", redelivered=True)
    assert (claim.outcome, claim.attempt, claim.entries) == ("run", 1, entries(1, 2))
    await store.close()


@in_event_loop
async def test_a_finished_job_cannot_be_claimed_or_written(backend: Backend) -> None:
    store, worker, job = backend.store(), backend.worker_store(), make_job()
    await store.submit(job)
    fence = worker.claim(job, "w1").fence
    worker.emit([Emit(job.ref, fence, entries(1, 1, end="stop"))])
    assert worker.claim(job, "w2").outcome == "done"
    assert worker.emit([Emit(job.ref, fence, entries(2, 2))])[0].outcome == "done"
    assert worker.emit([Emit(job.ref, fence + 1, entries(1, 1))])[0].outcome == "done"
    assert not worker.fail(job.ref, Terminal(finish_reason="cancelled"))
    await store.close()


@in_event_loop
async def test_a_turn_is_committed_with_the_last_entry_and_frees_its_session(backend: Backend) -> None:
    store, worker = backend.store(), backend.worker_store()
    job = make_job(session_id="s1")
    await store.submit(job)
    with pytest.raises(TurnConflict):
        await store.submit(make_job(session_id="s1"))
    turn = Turn(
        turn=0,
        job_id=job.job_id,
        messages=(Message(role="user", content="hello"), Message(role="assistant", content="<1><2>")),
        committed_at_unix_s=1.5,
    )
    fence = worker.claim(job, "w1").fence
    last = Emit(job.ref, fence, entries(1, 2, end="stop"), turn)
    worker.emit([last])
    worker.emit([last])
    assert await store.history("acme", "s1") == [turn]
    assert await store.history("other", "s1") == []
    with pytest.raises(TurnConflict):
        await store.submit(make_job(session_id="s1"))  # its writer believes the history to be empty
    assert await store.submit(make_job(session_id="s1", turn=1))
    with pytest.raises(TurnConflict):
        await store.delete_session("acme", "s1")
    await store.close()


@in_event_loop
async def test_a_deleted_session_begins_anew(backend: Backend) -> None:
    store, worker = backend.store(), backend.worker_store()
    job = make_job(session_id="s2")
    await store.submit(job)
    turn = Turn(turn=0, job_id=job.job_id, messages=(), committed_at_unix_s=1.0)
    worker.emit([Emit(job.ref, worker.claim(job, "w1").fence, entries(1, 1, end="stop"), turn)])
    assert await store.delete_session("acme", "s2")
    assert not await store.delete_session("acme", "s2")
    assert await store.history("acme", "s2") == []
    assert await store.submit(make_job(session_id="s2"))
    await store.close()


@in_event_loop
async def test_cancelling_a_waiting_job_ends_it_and_frees_its_session(backend: Backend) -> None:
    store, worker = backend.store(), backend.worker_store()
    job = make_job(session_id="s3")
    await store.submit(job)
    status = await store.cancel(job.ref)
    assert status.terminal is not None
    assert status.terminal.finish_reason == "cancelled"
    assert [entry.seq for entry in await store.read_log(job.ref)] == [1]
    assert worker.claim(job, "w1").outcome == "done"
    assert await store.submit(make_job(session_id="s3"))
    await store.close()


@in_event_loop
async def test_cancelling_a_running_job_tells_its_worker_with_the_next_emit(backend: Backend) -> None:
    store, worker, job = backend.store(), backend.worker_store(), make_job()
    await store.submit(job)
    fence = worker.claim(job, "w1").fence
    assert (await store.cancel(job.ref)).state == "running"
    assert worker.emit([Emit(job.ref, fence, ())])[0].cancel_requested
    assert worker.claim(job, "w1").cancel_requested
    await store.close()


@in_event_loop
async def test_failing_a_job_from_outside_writes_its_last_entry_and_fences_its_worker(backend: Backend) -> None:
    store, worker, job = backend.store(), backend.worker_store(), make_job()
    await store.submit(job)
    fence = worker.claim(job, "w1").fence
    worker.emit([Emit(job.ref, fence, entries(1, 2))])
    error = ErrorInfo(type="server_error", code="delivery_failed", message="no", http_status=500)
    terminal = Terminal(finish_reason="error", error=error)
    assert not worker.fail(job.ref, terminal, unless_leased=True)
    assert worker.fail(job.ref, terminal)
    assert worker.emit([Emit(job.ref, fence, entries(3, 3))])[0].outcome == "done"
    assert await store.read_log(job.ref, after=2) == [LogEntry(seq=3, terminal=terminal)]
    assert not worker.fail(make_job().ref, terminal)
    await store.close()


@in_event_loop
async def test_a_stream_that_begins_in_the_middle_sees_every_later_entry_once(backend: Backend) -> None:
    store, worker, job = backend.store(), backend.worker_store(), make_job()
    await store.submit(job)
    fence = worker.claim(job, "w1").fence
    worker.emit([Emit(job.ref, fence, entries(1, 4))])
    streams = [asyncio.create_task(collect(store.stream(job.ref, after))) for after in (0, 2, 4, 7)]
    await asyncio.sleep(0.05)
    for seq in range(5, 9):
        await asyncio.to_thread(worker.emit, [Emit(job.ref, fence, entries(seq, seq))])
    await asyncio.to_thread(worker.emit, [Emit(job.ref, fence, entries(9, 9, end="stop"))])
    for stream, after in zip(streams, (0, 2, 4, 7), strict=True):
        assert tuple(await stream) == entries(after + 1, 9, end="stop")
    await store.close()


@in_event_loop
async def test_a_stream_without_news_says_so(backend: Backend) -> None:
    store, worker, job = backend.store(), backend.worker_store(), make_job()
    await store.submit(job)
    stream = store.stream(job.ref, idle_s=0.05)
    assert await anext(stream) is None
    assert await anext(stream) is None
    await asyncio.to_thread(worker.emit, [Emit(job.ref, worker.claim(job, "w1").fence, entries(1, 1))])
    while (entry := await anext(stream)) is None:
        pass
    assert entry == entries(1, 1)[0]
    await stream.aclose()  # type: ignore[attr-defined]
    await store.close()


@in_event_loop
async def test_unknown_jobs_and_other_tenants_jobs_are_not_found(backend: Backend) -> None:
    store, job = backend.store(), make_job(session_id="s4")
    await store.submit(job)
    assert await store.find("acme", job.job_id) == job.ref
    stranger = make_job().ref
    for attempt in (
        store.find("other", job.job_id),
        store.find("acme", stranger.job_id),
        store.status(stranger),
        store.cancel(stranger),
        collect(store.stream(stranger)),
    ):
        with pytest.raises(JobNotFound):
            await attempt
    await store.close()


@in_event_loop
async def test_an_idempotency_key_stands_for_one_job_and_one_body(backend: Backend) -> None:
    store = backend.store()
    first = await store.reserve("acme", "key {1}", "aa", "job-a")
    again = await store.reserve("acme", "key {1}", "aa", "job-b")
    other = await store.reserve("globex", "key {1}", "bb", "job-c")
    assert (first.job_id, first.fresh) == ("job-a", True)
    assert (again.job_id, again.fresh) == ("job-a", False)
    assert other.fresh
    with pytest.raises(IdempotencyConflict):
        await store.reserve("acme", "key {1}", "cc", "job-d")
    await store.unreserve("acme", "key {1}", "job-b")
    assert not (await store.reserve("acme", "key {1}", "aa", "job-e")).fresh
    await store.unreserve("acme", "key {1}", "job-a")
    assert (await store.reserve("acme", "key {1}", "cc", "job-f")).fresh
    await store.close()


@in_event_loop
async def test_a_workers_card_is_shown_until_it_expires_or_is_withdrawn(backend: Backend) -> None:
    store, worker = backend.store(), backend.worker_store()
    model = ModelCard(id="m", created_unix_s=1, max_seq_len=64, vocab_size=10, has_chat_template=False)
    cards = [
        WorkerCard(worker_id=name, models=(model,), slots=4, running=1, waiting=0, started_at_unix_s=1.0)
        for name in ("w1", "w2", "w3")
    ]
    for card, ttl_s in zip(cards, (60, 60, 0.05), strict=True):
        worker.announce(card, ttl_s)
    worker.withdraw("w2")
    await asyncio.sleep(0.1)
    assert await store.workers() == [cards[0]]
    await store.close()


@in_event_loop
async def test_a_job_travels_through_the_queue_and_comes_back_when_handed_back(backend: Backend) -> None:
    queue, source = backend.queue(), backend.source(4)
    loop, inbox = asyncio.get_running_loop(), asyncio.Queue()
    job = make_job()
    await queue.publish(job)
    source.start(lambda delivery: loop.call_soon_threadsafe(inbox.put_nowait, delivery))  # type: ignore[misc]
    first = await inbox.get()
    assert not first.redelivered
    assert source.is_current(first)
    source.reject(first, requeue=True)
    second = await inbox.get()
    assert second.redelivered
    assert second.body == first.body
    source.ack(second)
    end = time.monotonic() + 10
    while await queue.depth(MODEL) and time.monotonic() < end:
        await asyncio.sleep(0.05)
    assert await queue.depth(MODEL) == 0
    source.close()
    await queue.close()
