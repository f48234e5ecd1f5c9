"""The worker's side of Redis: claiming jobs, appending to their logs, announcing the worker.

The log is the truth and Pub/Sub the wake-up; one script does both. What keeps a log right whatever dies is in
``lua/``: a fence lets one writer through, a sequence number makes every append repeatable. All appends of one decode
step travel in one pipeline. Blocking; one instance belongs to one thread. Next: ``lua/emit.lua``, ``lua/claim.lua``,
``session_store.py``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from axon_llm.serving import redis_scripts
from axon_llm.serving.ports import Claim, DueJob, Emit, EmitResult
from axon_llm.serving.redis_scripts import Keys, ScriptName, milliseconds, script, store_errors
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.wire import (
    ErrorInfo,
    Job,
    JobRef,
    LogEntry,
    Terminal,
    WireError,
    WorkerCard,
    decode,
    encode,
)

log = logging.getLogger("axon.store")


class TokenLog:
    """``ports.WorkerStore`` on Redis."""

    def __init__(self, settings: ServingSettings) -> None:
        self._settings = settings
        self._client: redis.Redis = redis.Redis.from_url(
            settings.redis_url.get_secret_value(),
            retry=Retry(NoBackoff(), 1),
            **redis_scripts.connection_options(settings),
        )

    def claim(self, job: Job, worker_id: str, *, redelivered: bool = False, solo: bool = False) -> Claim:
        """Try to become the one writer of a job; see ``ports.WorkerStore``."""
        settings, keys = self._settings, Keys.of(job.ref)
        poisoned = Terminal(
            finish_reason="error",
            attempts=settings.max_attempts,
            error=ErrorInfo(
                type="server_error",
                code="too_many_attempts",
                message=f"The job was given up: {settings.max_attempts - 1} workers died while they worked on it.",
                http_status=500,
            ),
        )
        body, *fields = redis_scripts.job_fields(job, encode(job), settings)
        [reply] = self._run(
            "claiming a job",
            [
                (
                    "claim",
                    [keys.job(job.job_id), keys.log(job.job_id), keys.turn],
                    [
                        job.job_id,
                        worker_id,
                        int(redelivered),
                        int(solo),
                        milliseconds(settings.lease_s),
                        milliseconds(settings.takeover_silence_s),
                        settings.suspect_attempt,
                        settings.max_attempts,
                        encode(poisoned),
                        keys.channel(job.job_id),
                        body,
                        *fields,
                        int(job.session_id is not None),
                    ],
                )
            ],
        )
        if reply[0] == b"failed":
            self._forget_schedules([job.ref])
        return Claim(
            outcome=reply[0].decode(),
            fence=int(reply[1]),
            attempt=int(reply[2]),
            cancel_requested=bool(reply[3]),
            retry_after_s=int(reply[4]) / 1000,
            entries=tuple(decode(LogEntry, entry) for entry in reply[5:]),
        )

    def emit(self, emits: Sequence[Emit]) -> list[EmitResult]:
        """Append the entries of several jobs in one round trip; see ``ports.WorkerStore``."""
        if not emits:
            return []
        calls: list[tuple[ScriptName, list[str], list[Any]]] = []
        for emit in emits:
            ref, keys = emit.ref, Keys.of(emit.ref)
            terminal = emit.entries[-1].terminal if emit.entries else None
            calls.append(
                (
                    "emit",
                    [keys.job(ref.job_id), keys.log(ref.job_id), keys.history, keys.turn],
                    [
                        ref.job_id,
                        emit.fence,
                        emit.entries[0].seq if emit.entries else 1,
                        keys.channel(ref.job_id),
                        encode(terminal) if terminal else "",
                        encode(emit.turn) if emit.turn else "",
                        self._settings.session_ttl_s * 1000,
                        *(encode(entry) for entry in emit.entries),
                    ],
                )
            )
        replies = self._run("appending to the log", calls)
        results = [
            EmitResult(outcome=outcome.decode(), next_seq=int(next_seq), cancel_requested=bool(cancel))
            for outcome, next_seq, cancel in replies
        ]
        self._forget_schedules(
            [
                emit.ref
                for emit, result in zip(emits, results, strict=True)
                if result.outcome == "ok" and emit.entries and emit.entries[-1].terminal
            ]
        )
        return results

    def release(self, ref: JobRef, fence: int) -> None:
        """Give a job up unfinished, so that the next claim is not counted as a take-over."""
        self._run("releasing a job", [("release", [Keys.of(ref).job(ref.job_id)], [fence])])

    def fail(self, ref: JobRef, terminal: Terminal, *, unless_leased: bool = False) -> bool:
        """End a job from outside with a terminal error. False if it had ended, is unknown, or has a live holder."""
        keys = Keys.of(ref)
        [reply] = self._run(
            "ending a job",
            [
                (
                    "finish",
                    [keys.job(ref.job_id), keys.log(ref.job_id), keys.turn],
                    [
                        ref.job_id,
                        keys.channel(ref.job_id),
                        encode(terminal),
                        "unheld" if unless_leased else "always",
                        milliseconds(self._settings.lease_s),
                    ],
                )
            ],
        )
        if reply == b"ended":
            self._forget_schedules([ref])
        return bool(reply == b"ended")

    def announce(self, card: WorkerCard, ttl_s: float) -> None:
        """Make this worker known for ``ttl_s`` seconds."""
        with store_errors("announcing the worker"):
            pipeline = self._client.pipeline(transaction=False)
            pipeline.set(redis_scripts.worker_key(card.worker_id), encode(card), px=milliseconds(ttl_s))
            pipeline.zadd(redis_scripts.WORKERS, {card.worker_id: time.time()})
            pipeline.zremrangebyscore(redis_scripts.WORKERS, "-inf", time.time() - 3600)
            pipeline.execute()

    def withdraw(self, worker_id: str) -> None:
        """Take the announcement back."""
        with store_errors("withdrawing the worker"):
            pipeline = self._client.pipeline(transaction=False)
            pipeline.delete(redis_scripts.worker_key(worker_id))
            pipeline.zrem(redis_scripts.WORKERS, worker_id)
            pipeline.execute()

    def published(self, due: DueJob) -> None:
        """The broker confirmed a job that was taken from the outbox or the watch list."""
        ref = due.job.ref
        if due.confirmed:
            self._run("confirming a job", [("again", [Keys.of(ref).job(ref.job_id)], [])])
        member = redis_scripts.schedule_member(ref)
        with store_errors("confirming a job"):
            pipeline = self._client.pipeline(transaction=False)
            pipeline.zadd(redis_scripts.WATCH, {member: (time.time() + self._settings.outbox_grace_s) * 1000})
            pipeline.zrem(redis_scripts.OUTBOX, member)
            pipeline.execute()

    def due(self, limit: int = 100) -> list[DueJob]:
        """Take jobs of the outbox and the watch list that nobody seems to hold."""
        jobs = []
        for schedule, confirmed in ((redis_scripts.OUTBOX, False), (redis_scripts.WATCH, True)):
            [members] = self._run(
                "reading the outbox", [("due", [schedule], [limit, milliseconds(self._settings.outbox_grace_s)])]
            )
            refs = [redis_scripts.read_schedule_member(member) for member in members]
            looks = self._run(
                "looking at the outbox",
                [
                    (
                        "look",
                        [Keys.of(ref).job(ref.job_id)],
                        [milliseconds(self._settings.lease_s), milliseconds(self._settings.outbox_grace_s)],
                    )
                    for ref in refs
                ],
            )
            self._forget_schedules([ref for ref, look in zip(refs, looks, strict=True) if look[0] == b"gone"])
            for ref, look in zip(refs, looks, strict=True):
                if look[0] == b"idle":
                    try:
                        job = decode(Job, look[1])
                    except WireError as error:  # of a newer version, which has reapers of its own
                        log.warning("job %s cannot be read: %s", ref.job_id, error)
                        continue
                    jobs.append(
                        DueJob(
                            job=job,
                            expired=bool(look[3]),
                            # The message of a job whose worker went silent is not waiting in the queue: it may be
                            # with that worker, which may never give it back.
                            confirmed=confirmed and not look[4],
                            waited_s=int(look[2]) / 1000,
                            looks=int(look[5]),
                            published_again=bool(look[6]),
                        )
                    )
        return jobs

    def ping(self) -> None:
        """Return when Redis answers."""
        with store_errors("asking whether it is there"):
            self._client.ping()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _forget_schedules(self, refs: Sequence[JobRef]) -> None:
        # An ended job that stays scheduled is harmless: the sweeper finds it ended and removes it.
        if not refs:
            return
        members = [redis_scripts.schedule_member(ref) for ref in refs]
        with store_errors("clearing the outbox"):
            pipeline = self._client.pipeline(transaction=False)
            pipeline.zrem(redis_scripts.OUTBOX, *members)
            pipeline.zrem(redis_scripts.WATCH, *members)
            pipeline.execute()

    def _run(self, doing: str, calls: Sequence[tuple[ScriptName, list[str], list[Any]]]) -> list[Any]:
        """Run scripts in one pipeline.

        A restarted Redis has forgotten them: load them and run all again, as all may be.
        """
        if not calls:
            return []
        with store_errors(doing):
            for _ in range(2):
                pipeline = self._client.pipeline(transaction=False)
                for name, keys, arguments in calls:
                    pipeline.evalsha(script(name).sha, len(keys), *keys, *arguments)
                replies = pipeline.execute(raise_on_error=False)
                if not any(isinstance(reply, redis.exceptions.NoScriptError) for reply in replies):
                    break
                for name in {name for name, _, _ in calls}:
                    self._client.script_load(script(name).source)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        return replies
