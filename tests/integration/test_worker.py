"""The worker's loop with the tiny engine: on the embedded store, on one that fails on purpose, and as a process."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from axon_llm.serving.embedded import EmbeddedQueue, EmbeddedStore
from axon_llm.serving.metrics import Health, MetricsServer, WorkerMetrics
from axon_llm.serving.ports import Claim, Delivery, Emit, EmitResult, StoreUnavailable, WorkerStore
from axon_llm.serving.wire import Job, LogEntry, Message, Sampling, Terminal, WorkerCard, encode
from axon_llm.serving.worker import Worker
from tests.faults import tiny_engine
from tests.faults.stack import environment
from tests.integration.backends import in_event_loop, make_job
from tests.integration.conftest import settings_for
from tests.integration.servers import RabbitServer, RedisServer, wait_until
from tests.processes import ended

SETTINGS = settings_for("redis://unused", "amqp://unused")


class Bench:
    """An embedded store and queue, and workers on threads."""

    def __init__(self) -> None:
        self.store = EmbeddedStore(SETTINGS)
        self.queue = EmbeddedQueue(SETTINGS, prefetch=4)

    @contextmanager
    def worker(
        self,
        *,
        step_s: float = 0.0,
        store: WorkerStore | None = None,
        name: str = "w1",
        encode: Callable[[Job], tuple[int, ...]] = tiny_engine.encode,
    ) -> Iterator[Worker]:
        worker = Worker(
            SETTINGS,
            tiny_engine.TinyEngine(4, step_s),
            store or self.store.worker_side(),
            self.queue.source(),
            encode=encode,
            spell=tiny_engine.spell,
            models=(tiny_engine.model_card(),),
            worker_id=name,
            metrics=WorkerMetrics(),
            health=Health(),
        )
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            yield worker
        finally:
            worker.stop()
            thread.join(10)
            assert not thread.is_alive()

    async def submit(self, job: Job) -> None:
        await self.store.submit(job)
        await self.queue.publish(job)

    async def all(self, job: Job) -> list[LogEntry]:
        return [entry async for entry in self.store.stream(job.ref) if entry is not None]


def content(entries: Sequence[LogEntry]) -> list[tuple[int | None, str]]:
    return [(entry.token, entry.text) for entry in entries]


def terminal_of(entries: Sequence[LogEntry]) -> Terminal:
    terminal = entries[-1].terminal
    assert terminal is not None
    return terminal


def metric(worker: Worker, name: str) -> float:
    return worker._metrics.registry.get_sample_value(name) or 0.0


@in_event_loop
async def test_jobs_are_decoded_side_by_side_as_the_reference_has_it() -> None:
    bench = Bench()
    jobs = [make_job(max_tokens=20 + number) for number in range(10)]
    for job in jobs:
        await bench.submit(job)
    with bench.worker() as worker:
        for job in jobs:
            entries = await bench.all(job)
            assert content(entries) == tiny_engine.reference(job)
            assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
            usage = terminal_of(entries).usage
            assert usage is not None
            assert usage.completion_tokens == job.sampling.max_tokens
        await asyncio.to_thread(
            wait_until, lambda: worker._metrics.ended.labels("length")._value.get() == 10, 5, "all are counted"
        )
        assert metric(worker, "axon_generated_tokens_total") == sum(job.sampling.max_tokens for job in jobs)
        tokens = sum(job.sampling.max_tokens for job in jobs)
        for name, count in (
            ("time_to_first_token_seconds", 10),
            ("time_per_output_token_seconds", 10),
            ("inter_token_latency_seconds", tokens - 10),
            ("queue_seconds", 10),
            ("job_seconds", 10),
        ):
            assert metric(worker, f"axon_{name}_count") == count, name
        assert metric(worker, "axon_emit_seconds_count") > 0
        assert metric(worker, "axon_prompt_tokens_total") > 0
        [card] = await bench.store.workers()
        assert card.models == (tiny_engine.model_card(),)


@in_event_loop
async def test_a_turn_is_committed_with_the_whole_answer() -> None:
    bench, job = Bench(), make_job(session_id="s1", max_tokens=5)
    await bench.submit(job)
    with bench.worker():
        entries = await bench.all(job)
    [turn] = await bench.store.history("acme", "s1")
    assert turn.messages == (
        Message(role="user", content="hello"),
        Message(role="assistant", content="".join(entry.text for entry in entries)),
    )


@in_event_loop
async def test_what_the_engine_refuses_ends_with_its_reason_and_commits_nothing() -> None:
    bench = Bench()
    too_long = make_job(session_id="s2", sampling=Sampling(max_tokens=10**6, seed=1))
    other_model = make_job(model="other")
    late = make_job(deadline_unix_s=time.time() - 1)
    with bench.worker():
        for job, code, status in (
            (too_long, "context_length_exceeded", 400),
            (other_model, "model_not_found", 404),
            (late, "deadline_exceeded", 504),
        ):
            await bench.submit(job)
            error = terminal_of(await bench.all(job)).error
            assert error is not None
            assert (error.code, error.http_status) == (code, status)
    assert await bench.store.history("acme", "s2") == []


@in_event_loop
async def test_a_job_that_may_shrink_is_cut_to_what_the_context_holds() -> None:
    bench = Bench()
    job = make_job(prompt="p" * (tiny_engine.MAX_SEQ_LEN - 7), sampling=Sampling(max_tokens=500, seed=1))
    await bench.submit(job.model_copy(update={"shrink_to_fit": True}))
    with bench.worker():
        entries = await bench.all(job)
    assert content(entries) == tiny_engine.reference(job)[:7]
    assert terminal_of(entries).finish_reason == "length"


@in_event_loop
async def test_a_deadline_that_passes_while_decoding_ends_the_job() -> None:
    bench = Bench()
    job = make_job(max_tokens=4000, deadline_unix_s=time.time() + 0.3)
    await bench.submit(job)
    with bench.worker(step_s=0.005):
        entries = await bench.all(job)
    error = terminal_of(entries).error
    assert error is not None
    assert error.code == "deadline_exceeded"
    assert content(entries[:-1]) == tiny_engine.reference(job)[: len(entries) - 1]


@in_event_loop
async def test_cancelling_ends_a_running_job_and_keeps_what_was_said() -> None:
    bench, job = Bench(), make_job(max_tokens=4000)
    await bench.submit(job)
    with bench.worker(step_s=0.005):
        stream = bench.store.stream(job.ref)
        await anext(stream)
        await bench.store.cancel(job.ref)
        rest = [entry async for entry in stream if entry is not None]
    assert terminal_of(rest).finish_reason == "cancelled"
    assert len(rest) < 3000


@in_event_loop
async def test_a_drained_worker_hands_over_and_the_next_one_goes_on() -> None:
    bench = Bench()
    jobs = [make_job(max_tokens=60) for _ in range(6)]
    for job in jobs:
        await bench.submit(job)
    with bench.worker(step_s=0.005, name="w1"):
        streams = [bench.store.stream(job.ref) for job in jobs[:4]]
        for stream in streams:
            await anext(stream)
    assert [(await bench.store.status(job.ref)).state for job in jobs[:4]] == ["released"] * 4
    with bench.worker(name="w2") as second:
        for job in jobs:
            entries = await bench.all(job)
            assert content(entries) == tiny_engine.reference(job)
            assert terminal_of(entries).attempts == 1
        assert metric(second, "axon_job_resumes_total") == 4
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]


@in_event_loop
async def test_a_prompt_that_brings_out_a_fault_ends_with_a_reason_and_takes_nobody_down() -> None:
    bench, bad, good = Bench(), make_job(prompt="bad"), make_job(max_tokens=3)

    def encode_prompt(job: Job) -> tuple[int, ...]:
        if job.prompt == "bad":
            raise StopIteration
        return tiny_engine.encode(job)

    await bench.submit(bad)
    await bench.submit(good)
    with bench.worker(encode=encode_prompt):
        error = terminal_of(await bench.all(bad)).error
        assert error is not None
        assert (error.code, error.http_status) == ("internal_error", 500)
        assert content(await bench.all(good)) == tiny_engine.reference(good)


class UnsteadyStore:
    """Knows no job, lets everybody run but a suspect that is claimed for the first time, and may be away.

    Attributes:
        logged: entries that each job's log is said to have.
    """

    def __init__(self) -> None:
        self.away = False
        self.logged: list[LogEntry] = []
        self.sent: list[LogEntry] = []
        self._claimed: set[str] = set()

    def claim(self, job: Job, worker_id: str, *, redelivered: bool = False, solo: bool = False) -> Claim:
        first = job.job_id not in self._claimed
        self._claimed.add(job.job_id)
        if solo and first:
            return Claim("busy", retry_after_s=0.1)
        return Claim("run", fence=1 if first else 2, attempt=1 if first else 3, entries=tuple(self.logged))

    def emit(self, emits: Sequence[Emit]) -> list[EmitResult]:
        self.sent += [entry for emit in emits for entry in emit.entries]
        return [EmitResult("ok", emit.entries[-1].seq + 1 if emit.entries else 1) for emit in emits]

    def announce(self, card: WorkerCard, ttl_s: float) -> None:
        if self.away:
            raise StoreUnavailable("away")


def still_worker(store: UnsteadyStore, health: Health) -> Worker:
    """One whose loop the test turns."""
    source = SimpleNamespace(connected=True, is_current=lambda delivery: True, ack=lambda delivery: None)
    return Worker(
        SETTINGS,
        tiny_engine.TinyEngine(4, 0.0),
        store,  # type: ignore[arg-type]
        source,  # type: ignore[arg-type]
        encode=tiny_engine.encode,
        spell=tiny_engine.spell,
        models=(tiny_engine.model_card(),),
        worker_id="w1",
        health=health,
    )


def test_a_suspect_that_had_to_wait_still_runs_alone() -> None:
    worker = still_worker(UnsteadyStore(), Health())
    suspect, other = make_job(max_tokens=2000), make_job(max_tokens=2000)
    for job, solo in ((suspect, True), (other, False)):
        worker._intake.put(
            Delivery(body=encode(job), solo=solo, redelivered=solo, generation=0, tag=1, queue_name="jobs")
        )
        worker._turn()
    assert [key[1] for key in worker._held] == [other.job_id]
    time.sleep(0.15)
    worker._turn()
    assert [key[1] for key in worker._held] == [other.job_id]
    worker._drop(next(iter(worker._held.values())))
    worker._turn()
    assert [key[1] for key in worker._held] == [suspect.job_id]


@pytest.mark.parametrize("same", [True, False])
def test_a_job_that_comes_back_goes_on_where_its_log_ends_and_in_the_words_of_its_log(same: bool) -> None:
    store = UnsteadyStore()
    worker = still_worker(store, Health())
    job, now = make_job(max_tokens=40), 0
    worker._source.is_current = lambda delivery: delivery.generation == now  # type: ignore[method-assign]

    def deliver() -> None:
        worker._intake.put(
            Delivery(body=encode(job), solo=False, redelivered=now > 0, generation=now, tag=1, queue_name="jobs")
        )

    deliver()
    for _ in range(5):
        worker._turn()
    written = list(store.sent)
    assert 3 <= len(written) < 40
    # The connection is lost. Another worker goes on, rounding otherwise, and is lost, too.
    changed = LogEntry(seq=len(written), token=7, text="other")
    store.logged = [*written[:-1], written[-1] if same else changed]
    store.sent, now = [], 1
    deliver()
    [before] = worker._held.values()
    worker._turn()
    [held] = worker._held.values()
    assert (held is before) is same
    assert (held.fence, held.attempt, held.delivery.generation) == (2, 3, 1)
    for _ in range(60):
        worker._turn()
    assert [entry.seq for entry in store.sent] == list(range(len(written) + 1, 41))
    whole = content([*store.logged, *store.sent])
    assert (whole == tiny_engine.reference(job)) is same
    assert terminal_of(store.sent).attempts == 3
    assert not worker._held


def test_an_idle_worker_is_ready_again_when_the_store_is_back() -> None:
    store, health = UnsteadyStore(), Health()
    worker = still_worker(store, health)
    store.away = True
    worker._turn()
    assert not health.ready
    store.away = False
    time.sleep(0.1)
    worker._turn()
    assert health.ready


class FailingStore:
    """A store that is away now and then, forgets entries, and loses jobs."""

    def __init__(self, store: EmbeddedStore) -> None:
        self._store, self._inner, self._calls = store, store.worker_side(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def emit(self, emits: Sequence[Emit]) -> list[EmitResult]:
        self._calls += 1
        if self._calls % 7 == 3:
            self._inner.emit(emits)  # it happened, and nobody learns of it
            raise StoreUnavailable("away")
        if self._calls % 7 == 5:
            raise StoreUnavailable("away")
        if self._calls % 7 == 0:
            with self._store._lock:
                for emit in emits:
                    record = self._store._jobs[emit.ref.tenant, emit.ref.job_id]
                    if record.state != "done":
                        del record.entries[-2:]  # set back, as after a restore
        return self._inner.emit(emits)


@in_event_loop
async def test_a_store_that_fails_and_forgets_is_given_everything_again() -> None:
    bench = Bench()
    jobs = [make_job(max_tokens=40, session_id=f"s-{number}") for number in range(4)]
    for job in jobs:
        await bench.submit(job)
    with bench.worker(store=FailingStore(bench.store)) as worker:  # type: ignore[arg-type]
        for job in jobs:
            while (await bench.store.status(job.ref)).state != "done":
                await asyncio.sleep(0.02)
            entries = await bench.store.read_log(job.ref)
            assert content(entries) == tiny_engine.reference(job)
            assert [entry.seq for entry in entries] == list(range(1, 41))
            assert len(await bench.store.history("acme", job.session_id or "")) == 1
        assert metric(worker, "axon_emits_backfilled_total") > 0
        assert metric(worker, "axon_store_errors_total") > 0


@in_event_loop
async def test_a_job_taken_over_by_another_worker_is_dropped() -> None:
    bench, job = Bench(), make_job(max_tokens=4000)
    await bench.submit(job)
    with bench.worker(step_s=0.005) as worker:
        stream = bench.store.stream(job.ref)
        await anext(stream)
        with bench.store._lock:
            bench.store._jobs[job.tenant, job.job_id].fence += 1
        await asyncio.to_thread(
            wait_until, lambda: metric(worker, "axon_emits_fenced_total") == 1, 5, "the worker was fenced"
        )
        await asyncio.to_thread(wait_until, lambda: metric(worker, "axon_jobs_running") == 0, 5, "it dropped the job")
        await stream.aclose()  # type: ignore[attr-defined]
    assert (await bench.store.status(job.ref)).state == "running"


@in_event_loop
async def test_a_message_delivered_twice_is_decoded_once() -> None:
    bench, job = Bench(), make_job(max_tokens=30)
    await bench.submit(job)
    for _ in range(3):
        await bench.queue.publish(job)
    with bench.worker(step_s=0.002) as worker:
        assert content(await bench.all(job)) == tiny_engine.reference(job)
        await asyncio.to_thread(
            wait_until, lambda: metric(worker, "axon_deliveries_duplicate_total") >= 1, 5, "duplicates were seen"
        )
        while await bench.queue.depth(tiny_engine.MODEL):
            await asyncio.sleep(0.01)
        assert metric(worker, "axon_generated_tokens_total") == 30


@in_event_loop
async def test_nothing_a_user_typed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    bench = Bench()
    job = make_job(prompt=None, messages=(Message(role="user", content="PRIVATE-WORDS"),), max_tokens=3)
    refused = make_job(prompt="PRIVATE-WORDS", sampling=Sampling(max_tokens=10**6, seed=1))
    bench.queue._waiting.append((b'{"prompt": "PRIVATE-WORDS"}', False))
    with bench.worker():
        for each in (job, refused):
            await bench.submit(each)
            await bench.all(each)
    assert job.job_id in caplog.text
    assert "PRIVATE-WORDS" not in caplog.text


# ---------------------------------------------------------------------------------------------------------- processes


def worker_process(redis_url: str, amqp_url: str, log: Path, **extra: str) -> subprocess.Popen[bytes]:
    env = environment(settings_for(redis_url, amqp_url, start_timeout_s=1.0)) | extra
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.tiny_worker"], env=env, stdout=output, stderr=output
        )


def test_a_worker_without_redis_or_broker_says_so_in_one_line_and_exits_with_4(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    for number, urls in enumerate(
        (("redis://127.0.0.1:1", "amqp://u:secret@127.0.0.1:1/"), (redis_server.url(), "amqp://u:secret@127.0.0.1:1/"))
    ):
        log = tmp_path / f"{number}.log"
        with ended(worker_process(*urls, log)) as process:
            assert process.wait(20) == 4
        lines = log.read_text().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert "secret" not in lines[0]


def fetch(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_loop_that_no_longer_turns_is_unhealthy_and_not_ready() -> None:
    health = Health(stale_s=0.2)
    server = MetricsServer(WorkerMetrics(), health, "127.0.0.1", 0)
    try:
        assert fetch(server.port, "/ready") == (503, "starting\n")
        health.ready = True
        health.beat()
        assert fetch(server.port, "/ready") == (200, "ready\n")
        time.sleep(0.3)
        assert fetch(server.port, "/health") == (503, "stuck\n")
        assert fetch(server.port, "/ready")[0] == 503
        health.beat()
        assert fetch(server.port, "/health") == (200, "ok\n")
    finally:
        server.close()


def test_a_worker_process_shows_its_health_and_metrics_and_leaves_tidily(
    redis_server: RedisServer, rabbit_server: RabbitServer, tmp_path: Path
) -> None:
    log = tmp_path / "worker.log"
    process = worker_process(redis_server.url(), rabbit_server.url(), log)
    try:
        wait_until(lambda: "metrics and health on http://127.0.0.1:" in log.read_text(), 20, "it says where")
        port = int(log.read_text().split("http://127.0.0.1:")[1].split()[0])
        wait_until(lambda: fetch(port, "/ready")[0] == 200, 20, "it is ready")
        assert fetch(port, "/health") == (200, "ok\n")
        assert fetch(port, "/other")[0] == 404
        text = fetch(port, "/metrics")[1]
        for name in (
            "axon_time_to_first_token_seconds",
            "axon_time_per_output_token_seconds",
            "axon_inter_token_latency_seconds",
            "axon_queue_seconds",
            "axon_jobs_running",
            "axon_jobs_waiting",
            "axon_slots 4.0",
            "axon_kv_cache_bytes",
            "axon_kv_cache_used_bytes",
            "axon_prompt_tokens_total",
            "axon_cached_tokens_total",
            "axon_generated_tokens_total",
            "axon_job_resumes_total",
            "axon_emits_fenced_total",
            "axon_job_failures",
        ):
            assert name in text
        command_line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert rabbit_server.url().encode() not in command_line
    finally:
        process.terminate()
        assert process.wait(20) == 0
