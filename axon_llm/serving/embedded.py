"""Store and queue in one process: ``axon serve`` on a laptop, without Redis and RabbitMQ.

``EmbeddedStore`` is ``ports.JobStore`` and ``ports.WorkerStore`` at once, ``EmbeddedQueue`` ``ports.JobQueue`` and
``ports.JobSource``; the contract tests run against them as against the real ones. Nothing survives the process. One
lock guards the state: the session manager's event loop and the worker's thread both come here, and nobody holds it
for long. Next: ``ports.py``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from axon_llm.serving.embedded_queue import EmbeddedQueue
from axon_llm.serving.ports import (
    Claim,
    DueJob,
    Emit,
    EmitResult,
    IdempotencyConflict,
    JobNotFound,
    Reservation,
    TurnConflict,
)
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.wire import Job, JobRef, JobState, JobStatus, LogEntry, Terminal, Turn, WorkerCard

_SWEEP_EVERY = 256


@dataclass
class _Record:
    """One job: what Redis keeps in a hash and a stream."""

    job: Job
    state: JobState = "queued"
    fence: int = 0
    attempts: int = 0
    holder: str = ""
    cancel: bool = False
    entries: list[LogEntry] = field(default_factory=list)
    terminal: Terminal | None = None

    @property
    def next_seq(self) -> int:
        return len(self.entries) + 1


@dataclass(frozen=True)
class _Listener:
    """A stream that waits for entries: its event loop and what to set there."""

    loop: asyncio.AbstractEventLoop
    wake: asyncio.Event

    def nudge(self) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.wake.set)


class EmbeddedStore:
    """``ports.JobStore`` and ``ports.WorkerStore`` in memory."""

    def __init__(self, settings: ServingSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._jobs: dict[tuple[str, str], _Record] = {}
        self._turns: dict[tuple[str, str], list[Turn]] = {}
        self._running: dict[tuple[str, str], str] = {}
        self._touched: dict[tuple[str, str], float] = {}
        self._bound: dict[tuple[str, str], tuple[str, str, float]] = {}
        self._cards: dict[str, tuple[WorkerCard, float]] = {}
        self._listeners: dict[tuple[str, str], set[_Listener]] = {}
        self._submissions = 0

    # ------------------------------------------------------------------------------------------------ session manager

    async def reserve(self, tenant: str, key: str, body_sha256: str, job_id: str) -> Reservation:
        """Bind an idempotency key to ``job_id``, or return the job id it is bound to already."""
        with self._lock:
            bound = self._bound.get((tenant, key))
            if bound is None or bound[2] < time.monotonic():
                expires = time.monotonic() + self._settings.idempotency_ttl_s
                self._bound[tenant, key] = (job_id, body_sha256, expires)
                return Reservation(job_id, fresh=True)
            if bound[1] != body_sha256:
                raise IdempotencyConflict("this idempotency key was used with another request", hint="choose a new key")
            return Reservation(bound[0], fresh=False)

    async def unreserve(self, tenant: str, key: str, job_id: str) -> None:
        """Free an idempotency key whose job was refused; no effect if it is bound to another job."""
        with self._lock:
            bound = self._bound.get((tenant, key))
            if bound is not None and bound[0] == job_id:
                del self._bound[tenant, key]

    async def submit(self, job: Job) -> bool:
        """Store a job; see ``ports.JobStore``."""
        with self._lock:
            self._sweep()
            if (job.tenant, job.job_id) in self._jobs:
                return False
            if job.session_id is not None:
                session = (job.tenant, job.session_id)
                if self._is_running(session):
                    raise TurnConflict("the session is busy with another turn", hint="wait for its end")
                if len(self._turns.get(session, ())) != job.turn:
                    raise TurnConflict("the session has moved on since its history was read", hint="send it again")
                self._running[session] = job.job_id
                self._touched[session] = time.monotonic()
            self._jobs[job.tenant, job.job_id] = _Record(job)
            return True

    async def published(self, ref: JobRef) -> None:
        """Nothing to do: this queue loses nothing that the store keeps."""

    async def find(self, tenant: str, job_id: str) -> JobRef:
        """Return where a job lives, knowing the tenant and the id only."""
        with self._lock:
            return self._record(tenant, job_id).job.ref

    async def status(self, ref: JobRef) -> JobStatus:
        """Return what is known of a job."""
        with self._lock:
            record = self._record(ref.tenant, ref.job_id)
            return JobStatus(
                ref=ref,
                model=record.job.model,
                trace_id=record.job.trace_id,
                state=record.state,
                next_seq=record.next_seq,
                attempts=record.attempts,
                created_at_unix_s=record.job.created_at_unix_s,
                deadline_unix_s=record.job.deadline_unix_s,
                cancel_requested=record.cancel,
                terminal=record.terminal,
            )

    async def cancel(self, ref: JobRef) -> JobStatus:
        """Ask for an end; see ``ports.JobStore``."""
        with self._lock:
            record = self._record(ref.tenant, ref.job_id)
            if record.state == "running":
                record.cancel = True
            elif record.state != "done":
                self._close(record, Terminal(finish_reason="cancelled", attempts=0))
        return await self.status(ref)

    async def read_log(self, ref: JobRef, after: int = 0, limit: int = 10_000) -> list[LogEntry]:
        """Return the entries with ``seq > after``, in order, at most ``limit``."""
        with self._lock:
            record = self._jobs.get((ref.tenant, ref.job_id))
            return record.entries[after : after + limit] if record is not None else []

    async def stream(
        self, ref: JobRef, after: int = 0, idle_s: float | None = None, deadline_unix_s: float | None = None
    ) -> AsyncIterator[LogEntry | None]:
        """Yield the entries with ``seq > after`` as they come, each once and in order; see ``ports.JobStore``."""
        listener = _Listener(asyncio.get_running_loop(), asyncio.Event())
        key = (ref.tenant, ref.job_id)
        with self._lock:
            self._record(*key)
            self._listeners.setdefault(key, set()).add(listener)
        try:
            while True:
                listener.wake.clear()
                await self.status(ref)  # JobNotFound if it has expired
                entries = await self.read_log(ref, after)
                for entry in entries:
                    after = entry.seq
                    yield entry
                    if entry.terminal is not None:
                        return
                if not entries:
                    try:
                        async with asyncio.timeout(idle_s or self._settings.poll_s):
                            await listener.wake.wait()
                    except TimeoutError:
                        if idle_s is not None:
                            yield None
        finally:
            with self._lock:
                self._listeners[key].discard(listener)
                if not self._listeners[key]:
                    del self._listeners[key]

    async def history(self, tenant: str, session_id: str) -> list[Turn]:
        """Return the committed turns of a session, oldest first."""
        with self._lock:
            return list(self._turns.get((tenant, session_id), ()))

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        """Forget a session's history. True if there was one."""
        session = (tenant, session_id)
        with self._lock:
            if self._is_running(session):
                raise TurnConflict("the session is busy with a turn", hint="cancel it or wait for its end")
            self._running.pop(session, None)
            self._touched.pop(session, None)
            return bool(self._turns.pop(session, None))

    async def workers(self) -> list[WorkerCard]:
        """Return the announcements that have not expired."""
        with self._lock:
            now = time.monotonic()
            return [card for card, expires in self._cards.values() if expires > now]

    async def ping(self) -> None:
        """Return at once: there is nothing that could be away."""

    async def close(self) -> None:
        """Wake every stream."""
        with self._lock:
            for listeners in self._listeners.values():
                for listener in listeners:
                    listener.nudge()

    # --------------------------------------------------------------------------------------------------------- worker

    def worker_side(self) -> EmbeddedWorkerStore:
        """Return the same store with the worker's interface."""
        return EmbeddedWorkerStore(self)

    def _record(self, tenant: str, job_id: str) -> _Record:
        record = self._jobs.get((tenant, job_id))
        if record is None:
            raise JobNotFound("no such job", hint="jobs are kept for some time after they end, then forgotten")
        return record

    def _is_running(self, session: tuple[str, str]) -> bool:
        other = self._jobs.get((session[0], self._running.get(session, "")))
        return other is not None and other.state != "done"

    def _append(self, record: _Record, entries: Sequence[LogEntry], turn: Turn | None) -> None:
        job = record.job
        record.entries.extend(entries)
        terminal = entries[-1].terminal if entries else None
        if terminal is not None:
            record.state, record.terminal = "done", terminal
            if job.session_id is not None:
                session = (job.tenant, job.session_id)
                if turn is not None:
                    self._turns.setdefault(session, []).append(turn)
                    self._touched[session] = time.monotonic()
                if self._running.get(session) == job.job_id:
                    del self._running[session]
        for listener in self._listeners.get((job.tenant, job.job_id), ()):
            listener.nudge()

    def _close(self, record: _Record, terminal: Terminal) -> None:
        record.fence += 1
        self._append(record, [LogEntry(seq=record.next_seq, terminal=terminal)], None)

    def _sweep(self) -> None:
        """Forget what has expired, now and then."""
        self._submissions += 1
        if self._submissions % _SWEEP_EVERY:
            return
        now = time.monotonic()
        oldest_unix_s = time.time() - self._settings.job_ttl_s
        for key in [key for key, record in self._jobs.items() if record.job.deadline_unix_s < oldest_unix_s]:
            del self._jobs[key]
        for session in [s for s, at in self._touched.items() if at < now - self._settings.session_ttl_s]:
            if not self._is_running(session):
                self._turns.pop(session, None)
                del self._touched[session]
        for bound in [key for key, value in self._bound.items() if value[2] < now]:
            del self._bound[bound]


class EmbeddedWorkerStore:
    """``ports.WorkerStore`` on an ``EmbeddedStore``. With one process there is nobody to take a job over from."""

    def __init__(self, store: EmbeddedStore) -> None:
        self._store = store

    def claim(self, job: Job, worker_id: str, *, redelivered: bool = False, solo: bool = False) -> Claim:
        """Become the one writer of a job; see ``ports.WorkerStore``."""
        store = self._store
        with store._lock:
            record = store._jobs.get((job.tenant, job.job_id))
            if record is None or record.state == "done":
                return Claim("done")
            if record.state == "running" and record.holder != worker_id:
                return Claim("duplicate", attempt=record.attempts)
            record.attempts = max(record.attempts, 1)
            record.fence += 1
            record.state, record.holder = "running", worker_id
            return Claim(
                "run",
                fence=record.fence,
                attempt=record.attempts,
                entries=tuple(record.entries),
                cancel_requested=record.cancel,
            )

    def emit(self, emits: Sequence[Emit]) -> list[EmitResult]:
        """Append the entries of several jobs; see ``ports.WorkerStore``."""
        with self._store._lock:
            return [self._emit(emit) for emit in emits]

    def _emit(self, emit: Emit) -> EmitResult:
        record = self._store._jobs.get((emit.ref.tenant, emit.ref.job_id))
        if record is None:
            return EmitResult("missing")
        following = record.next_seq
        if record.state == "done":
            stored = record.fence == emit.fence and (not emit.entries or emit.entries[-1].seq < following)
            return EmitResult("ok" if stored else "done", following)
        if record.state != "running" or record.fence != emit.fence:
            return EmitResult("fenced", following)
        if emit.entries and emit.entries[0].seq > following:
            return EmitResult("gap", following, record.cancel)
        fresh = [entry for entry in emit.entries if entry.seq >= following]
        if fresh:
            self._store._append(record, fresh, emit.turn)
        return EmitResult("ok", record.next_seq, record.cancel)

    def release(self, ref: JobRef, fence: int) -> None:
        """Give a job up unfinished."""
        with self._store._lock:
            record = self._store._jobs.get((ref.tenant, ref.job_id))
            if record is not None and record.state == "running" and record.fence == fence:
                record.state = "released"

    def fail(self, ref: JobRef, terminal: Terminal, *, unless_leased: bool = False) -> bool:
        """End a job from outside with a terminal error."""
        with self._store._lock:
            record = self._store._jobs.get((ref.tenant, ref.job_id))
            if record is None or record.state == "done" or (unless_leased and record.state == "running"):
                return False
            self._store._close(record, terminal)
            return True

    def announce(self, card: WorkerCard, ttl_s: float) -> None:
        """Make this worker known for ``ttl_s`` seconds."""
        with self._store._lock:
            self._store._cards[card.worker_id] = (card, time.monotonic() + ttl_s)

    def withdraw(self, worker_id: str) -> None:
        """Take the announcement back."""
        with self._store._lock:
            self._store._cards.pop(worker_id, None)

    def due(self, limit: int = 100) -> list[DueJob]:
        """Nothing: what this queue holds cannot be lost while the store lives."""
        return []

    def ping(self) -> None:
        """Return at once: there is nothing that could be away."""

    def close(self) -> None:
        """Nothing to close."""


__all__ = ["EmbeddedQueue", "EmbeddedStore", "EmbeddedWorkerStore"]
