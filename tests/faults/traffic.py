"""Clients that submit jobs without pause while faults happen, and the checker of what they saw.

A client does what the session manager does for a request: submit, publish, stream; where the service says 503 it
tries again with a new job. Some drop the connection at a random token and resume after the last entry they have; some
take several turns of a session.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field

from axon_llm.serving.broker import Publisher
from axon_llm.serving.ports import JobNotFound, QueueFull, QueueUnavailable, StoreUnavailable, TurnConflict
from axon_llm.serving.session_store import SessionStore
from axon_llm.serving.wire import Job, LogEntry, Message, Sampling
from tests.faults import tiny_engine
from tests.faults.stack import Stack

GONE_S = 30.0
UNAVAILABLE = (StoreUnavailable, QueueUnavailable, QueueFull)


@dataclass
class Seen:
    """One accepted job and what its client saw of it; ``expect`` names an error code if it must fail."""

    job: Job
    entries: list[LogEntry] = field(default_factory=list)
    expect: str = ""
    resumes: int = 0
    gone: bool = False


@dataclass
class Verdict:
    """The checker's count over all accepted jobs; ``gone`` are those that a Redis set back has wholly forgotten."""

    jobs: int = 0
    complete: int = 0
    lost: int = 0
    doubled: int = 0
    reordered: int = 0
    wrong: int = 0
    refused: int = 0
    resumes: int = 0
    taken_over: int = 0
    gone: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.jobs > 0 and self.complete == self.jobs and not self.faults


class Traffic:
    """A closed loop of clients. Make it inside the event loop."""

    def __init__(self, stack: Stack, seed: int, *, clients: int = 10, tokens: tuple[int, int] = (8, 80)) -> None:
        self.stack = stack
        self.rng = random.Random(seed)
        self.store = SessionStore(stack.client_settings)
        self.queue = Publisher(stack.client_settings)
        self.seen: list[Seen] = []
        self.refused: list[Job] = []
        self._tokens = tokens
        self._seed = seed
        self._enough = asyncio.Event()
        self._wanted = 0
        self._clients = clients
        self._deadline_s = 600.0
        self._tasks: list[asyncio.Task[None]] = []
        self.set_back_at_unix_s = 0.0  # when Redis was last made to forget acknowledged writes

    def may_be_gone(self, began_unix_s: float) -> bool:
        """Whether a Redis that was set back may have forgotten for good what began at that time."""
        return began_unix_s < self.set_back_at_unix_s

    def probe(self) -> None:
        """Submit one more job beside the clients, whatever becomes of it."""

        async def run() -> None:
            await self.run_job(self.job())

        self._tasks.append(asyncio.create_task(run()))

    async def start(self, jobs: int) -> None:
        """Begin; clients go on until ``finish`` was called and at least ``jobs`` jobs were accepted."""
        self._wanted = jobs
        self.queue.start()
        while not self.queue.connected or len(await self.store.workers()) < len(self.stack.workers):
            await asyncio.sleep(0.02)
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(self._clients)]

    async def finish(self, timeout_s: float) -> None:
        """Let the clients finish their jobs.

        Raises:
            TimeoutError: some did not get to an end.
        """
        self._enough.set()
        done, pending = await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in done:
            task.result()
        for task in pending:
            task.cancel()
        if pending:
            stuck = [seen for seen in self.seen if not (seen.entries and seen.entries[-1].terminal)]
            lines = []
            for seen in stuck:
                try:
                    status = (await self.store.status(seen.job.ref)).model_dump_json(exclude={"terminal"})
                except Exception as error:
                    status = repr(error)
                lines.append(f"{seen.job.job_id}: client has {len(seen.entries)} entries; {status}")
            raise TimeoutError("jobs without an end:\n" + "\n".join(lines))

    async def close(self) -> None:
        await self.queue.close()
        await self.store.close()

    def job(self, **changes: object) -> Job:
        """Return a job of random length."""
        rng = self.rng
        values: dict[str, object] = {
            "job_id": f"job-{uuid.uuid4().hex[:12]}",
            "tenant": rng.choice(("acme", "globex")),
            "model": tiny_engine.MODEL,
            "sampling": Sampling(max_tokens=rng.randint(*self._tokens), seed=rng.getrandbits(60)),
            "deadline_unix_s": time.time() + self._deadline_s,
            "created_at_unix_s": time.time(),
            "trace_id": f"trace-{uuid.uuid4().hex[:8]}",
        }
        if "messages" not in changes and "prompt" not in changes:
            values["prompt"] = f"prompt {rng.random()}"
        return Job.model_validate(values | changes)

    async def submit(self, job: Job) -> bool:
        """Submit as the session manager does. False for a 503; the job may then run or not, but must come to an end."""
        try:
            await self.store.submit(job)
            await self.queue.publish(job)
        except UNAVAILABLE:
            self.refused.append(job)
            with contextlib.suppress(StoreUnavailable, JobNotFound):
                await self.store.cancel(job.ref)
            return False
        with contextlib.suppress(StoreUnavailable):  # then the outbox will publish it once too often
            await self.store.published(job.ref)
        return True

    async def follow(self, seen: Seen, drops: bool = False) -> None:
        """Stream an accepted job to its end, dropping and resuming now and then if asked."""
        unknown_since: float | None = None
        while True:
            leave_after = self.rng.randint(1, 20) if drops else None
            stream = self.store.stream(seen.job.ref, after=len(seen.entries))
            taken = 0
            try:
                async for entry in stream:
                    assert entry is not None
                    seen.entries.append(entry)
                    taken += 1
                    if taken == leave_after:
                        break
            except StoreUnavailable:
                await asyncio.sleep(0.3)
            except JobNotFound:
                # A Redis that was set back may have lost the job with its last writes. Where the broker still has the
                # message a worker creates it again; where the job had ended already, nobody can.
                if not self.may_be_gone(seen.job.created_at_unix_s):
                    raise
                unknown_since = unknown_since or time.monotonic()
                if time.monotonic() - unknown_since > GONE_S:
                    seen.gone = True
                    return
                await asyncio.sleep(0.3)
            finally:
                await stream.aclose()  # type: ignore[attr-defined]
            if seen.entries and seen.entries[-1].terminal is not None:
                return
            seen.resumes += 1
            await asyncio.sleep(self.rng.uniform(0, 0.2))

    async def run_job(self, job: Job, *, expect: str = "", drops: bool = False) -> bool:
        """Submit and follow one job. False if it was refused."""
        if not await self.submit(job):
            return False
        seen = Seen(job, expect=expect)
        self.seen.append(seen)
        await self.follow(seen, drops)
        return True

    async def _client(self, number: int) -> None:
        kind = ("plain", "plain", "drops", "session")[number % 4]
        while not (self._enough.is_set() and len(self.seen) >= self._wanted):
            if kind == "session":
                await self._session()
            elif not await self.run_job(self.job(), drops=kind == "drops"):
                await asyncio.sleep(0.3)

    async def _session(self) -> None:
        tenant, session_id = self.rng.choice(("acme", "globex")), f"s-{uuid.uuid4().hex[:8]}"
        began = time.time()
        for number in range(self.rng.randint(1, 3)):
            try:
                history = await self.store.history(tenant, session_id)
                new = Message(role="user", content=f"question {number}")
                told = tuple(message for turn in history for message in turn.messages)
                job = self.job(
                    tenant=tenant,
                    session_id=session_id,
                    turn=len(history),
                    messages=(*told, new),
                    new_messages=1,
                )
                if not await self.run_job(job):
                    await asyncio.sleep(0.3)
                    return
            except StoreUnavailable:
                await asyncio.sleep(0.3)
                return
            except TurnConflict:
                if not self.may_be_gone(began):
                    raise  # nobody else uses this session: its last turn was not let go of
                return  # a store that was set back has forgotten a turn


async def check(traffic: Traffic, *, patience_s: float) -> Verdict:
    """Compare what clients saw with the log and with what the engine must say; look for anything left behind."""
    stack, verdict = traffic.stack, Verdict(refused=len(traffic.refused))
    store = SessionStore(stack.direct_settings)
    try:
        commits: Counter[str] = Counter()
        sessions = {(seen.job.tenant, seen.job.session_id) for seen in traffic.seen if seen.job.session_id}
        for tenant, session_id in sessions:
            assert session_id is not None
            commits.update(turn.job_id for turn in await store.history(tenant, session_id))
        for seen in traffic.seen:
            if seen.gone:
                verdict.gone += 1
                continue
            verdict.jobs += 1
            verdict.resumes += seen.resumes
            kind, problem = await _problem(store, seen, commits, traffic.may_be_gone(seen.job.created_at_unix_s))
            terminal = seen.entries[-1].terminal if seen.entries else None
            verdict.taken_over += terminal is not None and terminal.attempts > 1
            setattr(verdict, kind, getattr(verdict, kind) + 1)
            if problem:
                verdict.faults.append(f"{seen.job.job_id}: {kind}: {problem}")
        await _check_refused(store, traffic, verdict, patience_s)
        lengths = await asyncio.to_thread(stack.wait_queues_empty, patience_s)
        verdict.faults += [f"queue {name} still holds {count}" for name, count in lengths.items() if count]
    finally:
        await store.close()
    return verdict


async def _problem(store: SessionStore, seen: Seen, commits: Counter[str], may_be_gone: bool) -> tuple[str, str]:
    """Return which count of the verdict the job belongs to, and what is wrong with it if anything is."""
    job, entries = seen.job, seen.entries
    numbers = [entry.seq for entry in entries]
    if len(set(numbers)) < len(numbers):
        return "doubled", f"sequence numbers {numbers}"
    if numbers != sorted(numbers):
        return "reordered", f"sequence numbers {numbers}"
    if numbers != list(range(1, len(numbers) + 1)):
        return "lost", f"sequence numbers {numbers}"
    terminals = [entry.seq for entry in entries if entry.terminal is not None]
    if len(terminals) > 1:
        return "doubled", f"terminal entries at {terminals}"
    if terminals != [len(entries)]:
        return "lost", f"no terminal entry after {len(entries)}"
    terminal = entries[-1].terminal
    assert terminal is not None
    log = await store.read_log(job.ref)
    gone = may_be_gone and not log
    if not gone and _content(log) != _content(entries):
        return "wrong", f"the client saw {len(entries)} entries, the log has {len(log)} or others"
    if seen.expect:
        code = terminal.error.code if terminal.error else terminal.finish_reason
        return ("complete", "") if code == seen.expect else ("wrong", f"ended with {code}, not with {seen.expect}")
    if terminal.finish_reason != "length":
        return "wrong", f"ended with {terminal.finish_reason} {terminal.error}"
    if [(entry.token, entry.text) for entry in entries] != tiny_engine.reference(job):
        return "wrong", "the tokens are not those of the reference"
    if job.session_id is not None and commits[job.job_id] != 1 and not gone:
        return "doubled" if commits[job.job_id] else "lost", f"{commits[job.job_id]} history commits"
    return "complete", ""


def _content(entries: list[LogEntry]) -> list[tuple[int, int | None, str, str]]:
    return [
        (entry.seq, entry.token, entry.text, entry.terminal.finish_reason if entry.terminal else "")
        for entry in entries
    ]


async def _check_refused(store: SessionStore, traffic: Traffic, verdict: Verdict, patience_s: float) -> None:
    """A refused job may have run after all (nobody can know), but it must have ended, and ended once."""
    end = time.monotonic() + patience_s
    for job in traffic.refused:
        while True:
            try:
                status = await store.status(job.ref)
            except JobNotFound:
                break
            if status.state == "done":
                log = await store.read_log(job.ref)
                if sum(entry.terminal is not None for entry in log) != 1:
                    verdict.faults.append(f"{job.job_id}: refused, with more than one end")
                break
            if time.monotonic() > end:
                verdict.faults.append(f"{job.job_id}: refused, and still {status.state}")
                break
            await asyncio.sleep(0.2)
