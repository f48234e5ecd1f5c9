"""The interfaces between the parts of the serving path.

    session manager ── JobStore (async), JobQueue.publish ──▶  Redis + RabbitMQ, or the embedded store and queue
    worker          ── WorkerStore (sync), JobSource      ──▶  the same

Implementations: ``token_log.py`` + ``session_store.py`` (Redis), ``broker.py`` (RabbitMQ), ``embedded.py`` (one
process). One contract test-suite runs against both. The session manager's side is asyncio; the worker's side blocks
and is called from the thread that decodes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from axon_llm.errors import AxonError, ServiceUnavailable
from axon_llm.serving.wire import Job, JobRef, JobStatus, LogEntry, Terminal, Turn, WorkerCard


class StoreUnavailable(ServiceUnavailable):
    """Redis cannot be reached, is full or is loading; nothing is known to have been written. HTTP 503."""


class StoreRefused(StoreUnavailable):
    """Redis knows no such user or password. At the start of a process that is final; later it may be being changed."""


class QueueUnavailable(ServiceUnavailable):
    """The broker did not confirm in time, is blocked by an alarm or unreachable. HTTP 503; cancel the job."""


class QueueFull(ServiceUnavailable):
    """The queue is at its maximum length and rejected the job. HTTP 503 with Retry-After; cancel the job."""


class JobNotFound(AxonError):
    """No such job of this tenant (unknown, expired, or another tenant's). HTTP 404."""


class TurnConflict(AxonError):
    """The session has a running turn, or its history moved on since it was read. HTTP 409."""


class IdempotencyConflict(AxonError):
    """The idempotency key was used with another request body. HTTP 409."""


@dataclass(frozen=True)
class Reservation:
    """What an idempotency key stands for: the job id to use, and whether this call was the first to ask for it."""

    job_id: str
    fresh: bool


class JobStore(Protocol):
    """What the session manager asks of Redis. Every method raises ``StoreUnavailable`` when it cannot be reached.

    A submission is: ``reserve`` (with an idempotency key) → ``submit`` → ``JobQueue.publish`` → ``published``. If
    ``publish`` raises, call ``cancel`` and answer 503. A crash anywhere in between leaves the job in the outbox, and
    it is published or withdrawn later.
    """

    async def reserve(self, tenant: str, key: str, body_sha256: str, job_id: str) -> Reservation:
        """Bind an idempotency key to ``job_id``, or return the job id it is bound to already.

        Raises:
            IdempotencyConflict: it is bound to another request body.
        """
        ...

    async def unreserve(self, tenant: str, key: str, job_id: str) -> None:
        """Free an idempotency key whose job was refused (503), so that the client's retry is a new job.

        No-op if bound otherwise.
        """
        ...

    async def submit(self, job: Job) -> bool:
        """Store a job and put it into the outbox. True if it is new, False if this job id was submitted before.

        Raises:
            TurnConflict: the session has a running turn or a history of another length than ``job.turn``.
        """
        ...

    async def published(self, ref: JobRef) -> None:
        """The broker confirmed the job: the sweeper need not hurry to look at it."""
        ...

    async def find(self, tenant: str, job_id: str) -> JobRef:
        """Return where a job lives, knowing the tenant and the id only.

        Raises:
            JobNotFound: none of that id for that tenant.
        """
        ...

    async def status(self, ref: JobRef) -> JobStatus:
        """Return what is known of a job.

        Raises:
            JobNotFound: unknown or expired.
        """
        ...

    async def cancel(self, ref: JobRef) -> JobStatus:
        """Ask for an end.

        A job that no worker has ends at once (terminal ``cancelled``); another ends at its next step.

        Raises:
            JobNotFound: unknown or expired.
        """
        ...

    async def read_log(self, ref: JobRef, after: int = 0, limit: int = 10_000) -> list[LogEntry]:
        """Return the entries with ``seq > after``, in order, at most ``limit``."""
        ...

    def stream(
        self, ref: JobRef, after: int = 0, idle_s: float | None = None, deadline_unix_s: float | None = None
    ) -> AsyncIterator[LogEntry | None]:
        """Yield the entries with ``seq > after`` as they come, each once and in order; ends after the terminal one.

        Yields None after every ``idle_s`` seconds without an entry (time for a heartbeat). Survives restarts of Redis
        in between. Close it (``aclose``) to unsubscribe. ``after`` beyond the log's end waits for the log to grow. With
        the job's deadline given nothing is asked for at the beginning, so that Redis may be away then, too.

        Raises:
            JobNotFound: the job is unknown or expired.
            StoreUnavailable: Redis stayed away until the job's deadline.
        """
        ...

    async def history(self, tenant: str, session_id: str) -> list[Turn]:
        """Return the committed turns of a session, oldest first; empty when there is none."""
        ...

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        """Forget a session's history. True if there was one.

        Raises:
            TurnConflict: a turn is running.
        """
        ...

    async def workers(self) -> list[WorkerCard]:
        """Return the announcements that have not expired. Never waits for a worker."""
        ...

    async def ping(self) -> None:
        """Return when the store answers."""
        ...

    async def close(self) -> None:
        """Close connections and end every stream."""
        ...


class JobQueue(Protocol):
    """The session manager's way into the queue of each model.

    Safe to use from one event loop; owns its thread and connection.
    """

    async def publish(self, job: Job) -> None:
        """Return when the broker has confirmed that it keeps the job.

        Raises:
            QueueFull: rejected, the queue is at its maximum length.
            QueueUnavailable: no confirmation in time; the job may or may not be in the queue.
        """
        ...

    async def depth(self, model: str) -> int:
        """Return the number of jobs for a model that wait in its queue (those that no worker holds).

        Raises:
            QueueUnavailable: the broker did not answer in time.
        """
        ...

    @property
    def connected(self) -> bool:
        """Whether the broker can be published to now, as far as is known without asking."""
        ...

    def start(self) -> None:
        """Begin to connect, in the background."""
        ...

    async def close(self) -> None:
        """Close the connection and stop the thread."""
        ...


# ---------------------------------------------------------------------------------------------------------- worker side


@dataclass(frozen=True)
class Claim:
    """What a worker learns by claiming a delivery.

    ``outcome``: ``run`` (decode it, from ``len(entries)`` on, writing with ``fence``) · ``suspect`` (move it to the
    solo queue) · ``busy`` (another worker holds it and may be dead: ask again after ``retry_after_s``) ·
    ``duplicate`` (another worker holds it and lives, or this very worker does: drop the message) · ``done`` (already
    ended: drop the message) · ``failed`` (it used up its attempts and has just been given its terminal error: drop
    the message). ``attempt`` counts from 1; only take-overs raise it.
    """

    outcome: Literal["run", "suspect", "busy", "duplicate", "done", "failed"]
    fence: int = 0
    attempt: int = 0
    entries: tuple[LogEntry, ...] = ()
    cancel_requested: bool = False
    retry_after_s: float = 0.0


@dataclass(frozen=True)
class Emit:
    """New log entries of one job, contiguous; empty to renew the lease. The last may be terminal.

    ``turn`` goes with a terminal entry of a session's job that finished by ``stop`` or ``length``: what to commit to
    the history.
    """

    ref: JobRef
    fence: int
    entries: tuple[LogEntry, ...]
    turn: Turn | None = None


@dataclass(frozen=True)
class EmitResult:
    """What became of one ``Emit``.

    ``ok`` (stored, or stored before) · ``gap`` (the store expects ``next_seq``: send again from there) · ``fenced``
    (another worker took the job over: drop it) · ``done`` (it ended otherwise: drop it) · ``missing`` (the store lost
    it: claim again and send everything).
    """

    outcome: Literal["ok", "gap", "fenced", "done", "missing"]
    next_seq: int = 0
    cancel_requested: bool = False


class WorkerStore(Protocol):
    """What the worker asks of Redis.

    Every method raises ``StoreUnavailable`` when it cannot be reached; all may be retried.
    """

    def claim(self, job: Job, worker_id: str, *, redelivered: bool = False, solo: bool = False) -> Claim:
        """Try to become the one writer of a job; a job the store has lost is created again from the message.

        A worker that claims what it holds already is given a new fence, and no take-over is counted.
        """
        ...

    def emit(self, emits: Sequence[Emit]) -> list[EmitResult]:
        """Append the entries of several jobs in one round trip.

        Publish them, renew leases; results in the same order.
        """
        ...

    def release(self, ref: JobRef, fence: int) -> None:
        """Give a job up unfinished, so that the next claim is not counted as a take-over."""
        ...

    def fail(self, ref: JobRef, terminal: Terminal, *, unless_leased: bool = False) -> bool:
        """End a job from outside with a terminal error.

        False if it was not there, already ended, or (if asked) has a live holder.
        """
        ...

    def announce(self, card: WorkerCard, ttl_s: float) -> None:
        """Make this worker known for ``ttl_s`` seconds."""
        ...

    def withdraw(self, worker_id: str) -> None:
        """Take the announcement back."""
        ...

    def due(self, limit: int = 100) -> list[DueJob]:
        """Take jobs of the outbox whose time for a look has come.

        Each is handed to one caller and put off for later.
        """
        ...

    def ping(self) -> None:
        """Return when the store answers."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...


@dataclass(frozen=True)
class DueJob:
    """A job of the outbox that nobody seems to hold.

    Publish it again if the queue lost it, or fail it if it is too late.

    Attributes:
        job: the job.
        expired: past its deadline.
        confirmed: the broker had it once, and no worker has gone silent with it since.
        waited_s: since anything happened to it.
        looks: how often it was handed out before.
        published_again: though the broker had it; not since a worker last began it.
    """

    job: Job
    expired: bool
    confirmed: bool
    waited_s: float
    looks: int
    published_again: bool


@dataclass(frozen=True)
class Delivery:
    """One message handed to this worker.

    ``generation`` numbers the connection it came by; acks of an older one are void. ``queue_name`` is the queue it
    came from, where there are several.
    """

    body: bytes
    solo: bool
    redelivered: bool
    generation: int
    tag: int
    queue_name: str = ""


class JobSource(Protocol):
    """The worker's side of the queue.

    Deliveries come by callback on the source's own thread; the rest may be called from any thread.
    """

    def start(self, on_delivery: Callable[[Delivery], None]) -> None:
        """Connect in the background, consume, and keep doing so through broker restarts."""
        ...

    def ack(self, delivery: Delivery) -> None:
        """The job has ended (its terminal entry is in the store): forget the message.

        Void if the connection changed since.
        """
        ...

    def reject(self, delivery: Delivery, *, requeue: bool) -> None:
        """Give the message back to the queue, or send it to the dead letters. Void if the connection changed since."""
        ...

    def is_current(self, delivery: Delivery) -> bool:
        """Whether the connection the message came by still stands, so that it is still ours."""
        ...

    def move_to_solo(self, job: Job) -> None:
        """Publish to the queue of suspects; returns when confirmed.

        Raises:
            QueueUnavailable, QueueFull: as ``JobQueue.publish``.
        """
        ...

    @property
    def connected(self) -> bool:
        """Whether deliveries can come now."""
        ...

    def stop_consuming(self) -> None:
        """No new deliveries; those held stay held until acknowledged or rejected."""
        ...

    def close(self) -> None:
        """Carry out what acks and rejections are pending, then close the connection."""
        ...
