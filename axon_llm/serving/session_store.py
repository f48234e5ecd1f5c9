"""The session manager's side of Redis: submissions, streams, histories, idempotency keys, the workers' announcements.

A stream subscribes first, then reads the log, then takes live entries that follow and reads the log again wherever a
sequence number is missing or nothing has come for a while: no gap, no duplicate. Asyncio; one instance belongs to one
event loop, and one Pub/Sub connection serves all its streams. Next: ``lua/submit.lua``, ``wakeups.py``,
``token_log.py``.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import redis.exceptions
from pydantic import TypeAdapter

from axon_llm.serving import redis_scripts
from axon_llm.serving.ports import IdempotencyConflict, JobNotFound, Reservation, StoreUnavailable, TurnConflict
from axon_llm.serving.redis_client import asyncio_client
from axon_llm.serving.redis_scripts import Keys, ScriptName, milliseconds, script, store_errors
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.wakeups import WakeUps
from axon_llm.serving.wire import (
    Job,
    JobRef,
    JobStatus,
    LogEntry,
    Terminal,
    Turn,
    WireError,
    WorkerCard,
    decode,
    encode,
)

READ_AT_ONCE = 500
_ENTRIES = TypeAdapter(tuple[LogEntry, ...])

log = logging.getLogger("axon.store")


class SessionStore:
    """``ports.JobStore`` on Redis."""

    def __init__(self, settings: ServingSettings) -> None:
        self._settings = settings
        self._client = asyncio_client(settings)
        self._wakeups = WakeUps(self._client)
        self._unreadable: set[bytes] = set()

    async def reserve(self, tenant: str, key: str, body_sha256: str, job_id: str) -> Reservation:
        """Bind an idempotency key to ``job_id``, or return the job id it is bound to already."""
        with store_errors("reserving an idempotency key"):
            bound = await self._client.set(
                redis_scripts.idempotency_key(tenant, key),
                f"{job_id} {body_sha256}",
                nx=True,
                get=True,
                ex=self._settings.idempotency_ttl_s,
            )
        if bound is None:
            return Reservation(job_id, fresh=True)
        bound_id, bound_hash = bound.decode().split(" ")
        if bound_hash != body_sha256:
            raise IdempotencyConflict("this idempotency key was used with another request", hint="choose a new key")
        return Reservation(bound_id, fresh=False)

    async def unreserve(self, tenant: str, key: str, job_id: str) -> None:
        """Free an idempotency key whose job was refused; no effect if it is bound to another job."""
        await self._run(
            "freeing an idempotency key", "unreserve", [redis_scripts.idempotency_key(tenant, key)], [job_id]
        )

    async def submit(self, job: Job) -> bool:
        """Store a job and put it into the outbox; see ``ports.JobStore``."""
        keys, ref = Keys.of(job.ref), job.ref
        body, model, trace_id, created_ms, deadline_ms, expire_ms = redis_scripts.job_fields(
            job, encode(job), self._settings
        )
        member = redis_scripts.schedule_member(ref)
        with store_errors("submitting a job"):
            pipeline = self._client.pipeline(transaction=False)
            pipeline.set(redis_scripts.ref_key(ref.tenant, ref.job_id), ref.session_id or "", pxat=expire_ms)
            pipeline.zadd(redis_scripts.OUTBOX, {member: (time.time() + self._settings.outbox_grace_s) * 1000}, nx=True)
            await pipeline.execute()
        outcome = await self._run(
            "submitting a job",
            "submit",
            [keys.job(ref.job_id), keys.log(ref.job_id), keys.history, keys.turn],
            [
                ref.job_id,
                body,
                model,
                trace_id,
                created_ms,
                deadline_ms,
                expire_ms,
                "" if job.turn is None else job.turn,
                keys.job_prefix,
                secrets.token_hex(8),  # the same when redis-py repeats a command whose reply was lost
            ],
        )
        if outcome in (b"running", b"stale"):
            with store_errors("submitting a job"):
                await self._client.zrem(redis_scripts.OUTBOX, member)
            raise TurnConflict(
                "the session is busy with another turn"
                if outcome == b"running"
                else "the session has moved on since its history was read",
                hint="wait for the running turn to end, then send the next",
            )
        return bool(outcome == b"new")

    async def published(self, ref: JobRef) -> None:
        """The broker confirmed the job: from the outbox to the watch list, which is looked at only for losses."""
        member = redis_scripts.schedule_member(ref)
        with store_errors("confirming a job"):
            pipeline = self._client.pipeline(transaction=False)
            pipeline.zadd(redis_scripts.WATCH, {member: (time.time() + self._settings.outbox_grace_s) * 1000})
            pipeline.zrem(redis_scripts.OUTBOX, member)
            await pipeline.execute()

    async def find(self, tenant: str, job_id: str) -> JobRef:
        """Return where a job lives, knowing the tenant and the id only."""
        with store_errors("looking for a job"):
            session_id = await self._client.get(redis_scripts.ref_key(tenant, job_id))
        if session_id is None:
            raise JobNotFound("no such job", hint="jobs are kept for some time after they end, then forgotten")
        return JobRef(tenant=tenant, job_id=job_id, session_id=session_id.decode() or None)

    async def status(self, ref: JobRef) -> JobStatus:
        """Return what is known of a job."""
        names = ("state", "next", "attempt", "created", "deadline", "cancel", "terminal", "model", "trace")
        with store_errors("reading a job's state"):
            values = await self._client.hmget(Keys.of(ref).job(ref.job_id), names)
        fields = dict(zip(names, values, strict=True))
        if fields["state"] is None:
            raise JobNotFound("no such job", hint="jobs are kept for some time after they end, then forgotten")
        return JobStatus(
            ref=ref,
            model=fields["model"].decode(),
            trace_id=fields["trace"].decode(),
            state=fields["state"].decode(),
            next_seq=int(fields["next"]),
            attempts=int(fields["attempt"]),
            created_at_unix_s=int(fields["created"]) / 1000,
            deadline_unix_s=int(fields["deadline"]) / 1000,
            cancel_requested=fields["cancel"] == b"1",
            terminal=decode(Terminal, fields["terminal"]) if fields["terminal"] else None,
        )

    async def cancel(self, ref: JobRef) -> JobStatus:
        """Ask for an end; see ``ports.JobStore``."""
        keys = Keys.of(ref)
        outcome = await self._run(
            "cancelling a job",
            "finish",
            [keys.job(ref.job_id), keys.log(ref.job_id), keys.turn],
            [
                ref.job_id,
                keys.channel(ref.job_id),
                encode(Terminal(finish_reason="cancelled", attempts=0)),
                "cancel",
                milliseconds(self._settings.lease_s),
            ],
        )
        if outcome == b"missing":
            raise JobNotFound("no such job", hint="jobs are kept for some time after they end, then forgotten")
        return await self.status(ref)

    async def read_log(self, ref: JobRef, after: int = 0, limit: int = 10_000) -> list[LogEntry]:
        """Return the entries with ``seq > after``, in order, at most ``limit``."""
        with store_errors("reading a log"):
            items = await self._client.xrange(Keys.of(ref).log(ref.job_id), min=f"{after + 1}-0", count=limit)
        return [decode(LogEntry, fields[b"e"]) for _, fields in items]

    async def stream(
        self, ref: JobRef, after: int = 0, idle_s: float | None = None, deadline_unix_s: float | None = None
    ) -> AsyncIterator[LogEntry | None]:
        """Yield the entries with ``seq > after`` as they come, each once and in order; see ``ports.JobStore``."""
        poll_s = self._settings.poll_s
        following = after + 1
        async with self._wakeups.subscribe(Keys.of(ref).channel(ref.job_id)) as live:
            if deadline_unix_s is None:
                deadline_unix_s = (await self.status(ref)).deadline_unix_s
            give_up_unix_s = deadline_unix_s + 2 * self._settings.lease_s
            try:
                async with asyncio.timeout(poll_s):
                    await live.confirmed.wait()  # else an entry could come between the reading and the subscription
            except TimeoutError:
                pass  # Pub/Sub is away; polling the log makes up for it
            look, spoke = True, time.monotonic()
            while True:
                entries: tuple[LogEntry, ...] = ()
                if look:
                    try:
                        entries = tuple(await self.read_log(ref, following - 1, READ_AT_ONCE))
                    except StoreUnavailable:
                        if time.time() > give_up_unix_s:
                            raise
                    look = len(entries) == READ_AT_ONCE
                    if not entries and time.time() > give_up_unix_s:
                        await self.status(ref)  # JobNotFound if it has expired
                        raise StoreUnavailable("the job passed its deadline and nothing was heard of its end")
                elif messages := await live.wait(min(poll_s * random.uniform(0.8, 1.2), idle_s or poll_s)):
                    entries = tuple(entry for message in messages for entry in _ENTRIES.validate_json(message))
                else:
                    look = True
                for entry in entries:
                    if entry.seq < following:
                        continue
                    if entry.seq > following:
                        look = True
                        break
                    following += 1
                    yield entry
                    spoke = time.monotonic()
                    if entry.terminal is not None:
                        return
                if idle_s is not None and time.monotonic() - spoke >= idle_s:
                    yield None
                    spoke = time.monotonic()

    async def history(self, tenant: str, session_id: str) -> list[Turn]:
        """Return the committed turns of a session, oldest first."""
        with store_errors("reading a history"):
            turns = await self._client.lrange(Keys.of_session(tenant, session_id).history, 0, -1)
        return [decode(Turn, turn) for turn in turns]

    async def delete_session(self, tenant: str, session_id: str) -> bool:
        """Forget a session's history. True if there was one."""
        keys = Keys.of_session(tenant, session_id)
        outcome = await self._run("deleting a session", "forget", [keys.history, keys.turn], [keys.job_prefix])
        if outcome == b"running":
            raise TurnConflict("the session is busy with a turn", hint="cancel it or wait for its end")
        return bool(outcome)

    async def workers(self) -> list[WorkerCard]:
        """Return the announcements that have not expired."""
        with store_errors("reading the workers"):
            ids = await self._client.zrange(redis_scripts.WORKERS, 0, -1)
            if not ids:
                return []
            cards = await self._client.mget([redis_scripts.worker_key(worker_id.decode()) for worker_id in ids])
        return [card for card in map(self._card, ids, cards) if card is not None]

    def _card(self, worker_id: bytes, card: bytes | None) -> WorkerCard | None:
        """One announcement; None if it has expired, or is such that the others must do without it."""
        try:
            return None if card is None else decode(WorkerCard, card)
        except WireError as error:
            if worker_id not in self._unreadable:  # its next one in a moment will be no better
                self._unreadable.add(worker_id)
                log.warning("the announcement of worker %s cannot be read: %s", worker_id.decode(), error)
            return None

    async def ping(self) -> None:
        """Return when Redis answers."""
        with store_errors("asking whether it is there"):
            await self._client.ping()

    async def close(self) -> None:
        """Close the connections."""
        await self._wakeups.close()
        await self._client.aclose()

    async def _run(self, doing: str, name: ScriptName, keys: list[str], arguments: list[Any]) -> Any:
        with store_errors(doing):
            try:
                return await self._client.evalsha(script(name).sha, len(keys), *keys, *arguments)
            except redis.exceptions.NoScriptError:  # a restarted Redis has forgotten it
                await self._client.script_load(script(name).source)
                return await self._client.evalsha(script(name).sha, len(keys), *keys, *arguments)
