"""``python -m tests.faults.http_faults``: the rows of the fault matrix that need HTTP, through nginx, as a table.

Clients stream completions. One whose stream breaks resumes after the last event it has; one that did not even learn
its job's id asks again with the same idempotency key. The checker is the one of the other rows: what the client saw
== the log == the reference.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import redis

from axon_llm.serving.session_store import SessionStore
from axon_llm.serving.wire import Job, Sampling, Terminal, decode
from tests.faults import tiny_engine
from tests.faults.http_stack import HttpStack
from tests.faults.stack import Pace
from tests.integration.servers import missing_programs

CLIENTS = 8


@dataclass
class Answer:
    """One request and what its client has seen of the answer."""

    prompt: str
    seed: int
    max_tokens: int
    idempotency_key: str = field(default_factory=lambda: uuid.uuid4().hex)
    job_id: str = ""
    texts: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    resumes: int = 0
    refused: int = 0

    @property
    def body(self) -> dict[str, object]:
        return {
            "model": tiny_engine.MODEL,
            "prompt": self.prompt,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "stream": True,
            "on_disconnect": "continue",
        }

    def reference(self) -> list[str]:
        now = time.time()
        job = Job(
            job_id="reference",
            tenant="acme",
            model=tiny_engine.MODEL,
            prompt=self.prompt,
            sampling=Sampling(max_tokens=self.max_tokens, seed=self.seed),
            deadline_unix_s=now,
            created_at_unix_s=now,
            trace_id="reference",
        )
        return [text for _, text in tiny_engine.reference(job)]


@dataclass
class Front:
    """Clients of one stack."""

    stack: HttpStack
    rng: random.Random
    answers: list[Answer] = field(default_factory=list)
    drop: bool = False
    enough: bool = False
    wanted: int = 0

    async def flowing(self) -> None:
        """Return when several streams are in the middle, so that a fault has something to break."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if sum(bool(answer.texts) and not answer.finish_reasons for answer in self.answers) >= CLIENTS // 2:
                return
            await asyncio.sleep(0.02)

    async def client(self) -> None:
        async with httpx.AsyncClient(
            base_url=self.stack.gateway.url,
            headers={"authorization": f"Bearer {self.stack.key}"},
            timeout=httpx.Timeout(20.0),
        ) as http:
            while not (self.enough and len(self.answers) >= self.wanted):
                await self.ask(http)

    async def ask(self, http: httpx.AsyncClient) -> None:
        rng = self.rng
        answer = Answer(f"prompt {rng.random()}", rng.getrandbits(60), rng.randint(20, 150))
        self.answers.append(answer)
        while not answer.finish_reasons:
            with contextlib.suppress(httpx.HTTPError, ConnectionError):  # broken in the middle: go on below
                if not answer.job_id:
                    request = http.build_request(
                        "POST",
                        "/v1/completions",
                        json=answer.body,
                        headers={"idempotency-key": answer.idempotency_key},
                    )
                else:
                    path = f"/v1/jobs/{answer.job_id}/events"
                    request = http.build_request("GET", path, params={"after": len(answer.texts)})
                response = await http.send(request, stream=True)
                try:
                    await self.read(response, answer)
                finally:
                    await response.aclose()
            if not answer.finish_reasons:
                answer.resumes += bool(answer.job_id)
                await asyncio.sleep(0.2)

    async def read(self, response: httpx.Response, answer: Answer) -> None:
        if response.status_code != 200:
            answer.refused += 1
            return
        job_id = response.headers["x-axon-job-id"]
        assert answer.job_id in ("", job_id)
        if not answer.job_id:
            answer.texts.clear()
        answer.job_id = job_id
        leave_at = len(answer.texts) + self.rng.randint(1, 15) if self.drop else None
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return
            for choice in event["choices"]:
                answer.texts.append(choice["text"])
                if choice["finish_reason"]:
                    answer.finish_reasons.append(choice["finish_reason"])
            if len(answer.texts) == leave_at:
                return


Injection = Callable[[HttpStack, Front], Awaitable[None]]


async def kill_session_manager(stack: HttpStack, front: Front) -> None:
    stack.kill_session_manager(front.rng.randrange(len(stack.session_managers)))
    await asyncio.sleep(2)


async def drain_session_manager(stack: HttpStack, front: Front) -> None:
    front.rng.choice(stack.session_managers).signal(signal.SIGTERM)
    await asyncio.sleep(2)


async def clients_drop(stack: HttpStack, front: Front) -> None:
    front.drop = True
    await asyncio.sleep(4)
    front.drop = False


async def slow_client(stack: HttpStack, front: Front) -> None:
    """Clients that take one byte a second; the session managers must not grow with what they leave unread."""
    before = stack.resident_bytes()
    body = json.dumps(Answer("slow", 1, 600).body | {"on_disconnect": "cancel"}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {stack.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connections = []
    for _ in range(3):
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.gateway.port, limit=64)
        writer.write(head.encode() + body)
        connections.append((reader, writer))
    for _ in range(6):
        await asyncio.sleep(1)
        for reader, _ in connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.05)
    grown = [now - then for now, then in zip(stack.resident_bytes(), before, strict=True)]
    for _, writer in connections:
        writer.close()
    assert max(grown) < 20_000_000, f"session managers grew by {grown} bytes"


async def reload_gateway(stack: HttpStack, front: Front) -> None:
    stack.gateway.reload()
    await asyncio.sleep(1)


async def kill_worker(stack: HttpStack, front: Front) -> None:
    front.rng.choice(stack.workers).signal(signal.SIGKILL)
    await asyncio.sleep(1)


async def crash_redis(stack: HttpStack, front: Front) -> None:
    await asyncio.to_thread(stack.redis.kill)
    await asyncio.to_thread(stack.redis.start)
    await asyncio.sleep(1)


async def crash_broker(stack: HttpStack, front: Front) -> None:
    await asyncio.to_thread(stack.rabbit.kill)
    await asyncio.to_thread(stack.rabbit.start)


HTTP_ROWS: tuple[tuple[str, Injection, str], ...] = (
    ("session manager killed", kill_session_manager, "resumed elsewhere, none generated twice"),
    ("session manager drained", drain_session_manager, "open answers end or are resumed"),
    ("client drops and resumes", clients_drop, "identical transcript"),
    ("slow client, 1 byte a second", slow_client, "bounded memory, others unaffected"),
    ("gateway reload", reload_gateway, "open streams survive"),
    ("worker killed, seen over HTTP", kill_worker, "a pause, then the rest"),
    ("Redis crash, seen over HTTP", crash_redis, "a pause or 503, then the rest"),
    ("broker crash, seen over HTTP", crash_broker, "503, then recovery"),
)


@dataclass
class Verdict:
    """The checker's count."""

    jobs: int = 0
    complete: int = 0
    resumes: int = 0
    refused: int = 0
    problems: list[str] = field(default_factory=list)


async def run(stack: HttpStack, injections: list[Injection], *, seed: int, jobs: int) -> Verdict:
    """Let clients ask while the faults happen; check every answer."""
    front = Front(stack, random.Random(seed), wanted=jobs)
    verdict = Verdict()
    clients = [asyncio.create_task(front.client()) for _ in range(CLIENTS)]
    for inject in injections:
        await asyncio.sleep(front.rng.uniform(0.0, 0.5))
        await front.flowing()
        try:
            await inject(stack, front)
        except AssertionError as error:
            verdict.problems.append(str(error))
    front.enough = True
    done, pending = await asyncio.wait(clients, timeout=90)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
    store = SessionStore(stack.direct_settings)
    for answer in front.answers:
        verdict.jobs += 1
        verdict.resumes += answer.resumes
        verdict.refused += answer.refused
        problem = await _problem(store, answer)
        if problem:
            verdict.problems.append(f"{answer.job_id or 'no job'}: {problem}")
        else:
            verdict.complete += 1
    await store.close()
    verdict.problems += await asyncio.to_thread(_made_twice, stack, front.answers)
    lengths = await asyncio.to_thread(stack.wait_queues_empty, 120.0)
    verdict.problems += [f"queue {name} still holds {count}" for name, count in lengths.items() if count]
    return verdict


def _made_twice(stack: HttpStack, answers: list[Answer]) -> list[str]:
    """Answers that more than one job was decoded to the end for.

    A request that was refused may have been carried out all the same: whoever refused it could not know.
    """
    whole: Counter[str] = Counter()
    with redis.Redis(port=stack.redis.port, decode_responses=True) as client:
        for name in client.scan_iter("axon:{acme:*}:job:*", count=1000):
            body, terminal = client.hmget(name, "body", "terminal")  # type: ignore[misc]
            if body and terminal and decode(Terminal, terminal.encode()).finish_reason == "length":
                whole[decode(Job, body.encode()).prompt or ""] += 1
    return [
        f"{answer.job_id}: {whole[answer.prompt]} jobs for one idempotency key"
        for answer in answers
        if not 1 <= whole[answer.prompt] <= 1 + answer.refused
    ]


async def _problem(store: SessionStore, answer: Answer) -> str:
    if answer.finish_reasons != ["length"]:
        return f"finish reasons {answer.finish_reasons} after {len(answer.texts)} events"
    if answer.texts != answer.reference():
        return f"{len(answer.texts)} events, not those of the reference"
    log = await store.read_log(await store.find("acme", answer.job_id))
    if [entry.text for entry in log] != answer.texts or [entry.seq for entry in log] != list(range(1, len(log) + 1)):
        return "the log is not what the client saw"
    return ""


def main() -> int:
    """Run the rows, print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.http_faults", description=__doc__)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", nargs="*", default=[])
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the servers are stopped
    missing = missing_programs("redis-server", "rabbitmq-server", "nginx")
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    rows = [row for row in HTTP_ROWS if not options.rows or any(part in row[0] for part in options.rows)]
    print("| Fault | Expected | × | Answers | Complete | Streams resumed | Refused, asked again | s |")
    print("|---|---|--:|--:|--:|--:|--:|--:|", flush=True)
    problems = []
    with tempfile.TemporaryDirectory() as folder, HttpStack(Path(folder), Pace.quick()) as stack:
        for number, (name, inject, expected) in enumerate(rows):
            began = time.monotonic()
            verdict = asyncio.run(
                run(stack, [inject] * options.times, seed=options.seed * 1000 + number, jobs=options.jobs)
            )
            print(
                f"| {name} | {expected} | {options.times} | {verdict.jobs} | {verdict.complete} | {verdict.resumes} "
                f"| {verdict.refused} | {time.monotonic() - began:.0f} |",
                flush=True,
            )
            problems += [f"{name}: {problem}" for problem in verdict.problems]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
