"""``python -m tests.faults.kill --tries N``.

Kill -9 in the middle of a sampled answer, with the real engine, in float32.

Each try submits a job with a temperature, waits for a random token, kills the process that decodes it, and compares
what the client saw, to the end, with what an engine of its own says without interruption: same tokens, same text. A
try counts only if the job was really taken over.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import redis

from axon_llm.engine.params import SamplingParams
from axon_llm.serving.redis_scripts import Keys
from axon_llm.serving.served_model import ServedModel
from axon_llm.serving.wire import Job, LogEntry, Message, Sampling
from tests.faults.stack import Pace, Stack
from tests.faults.traffic import Seen, Traffic
from tests.integration.servers import missing_programs

PROMPTS = (
    "Tell me a story about a fox.",
    "My name is Ada. What is my name?",
    "Count the days of the week.",
    "Once upon a time there was a small village.",
)


@dataclass
class Outcome:
    """What came of the tries."""

    tries: int = 0
    taken_over: int = 0
    equal: int = 0
    differing: list[str] | None = None


def worker_command(model: str) -> list[str]:
    """Return how to start a worker with the real engine."""
    return [sys.executable, "-m", "cli.main", "worker", "-m", model, "--dtype", "float32", "--slots", "4"]


def load(model: str) -> ServedModel:
    """Load the same model for the reference."""
    from axon_llm.serving.model_loading import load_served_model

    return load_served_model(model, dtype="float32", slots=1)


def reference(served: ServedModel, job: Job) -> list[tuple[int | None, str]]:
    """Return tokens and texts of an uninterrupted run."""
    parameters = SamplingParams(**job.sampling.model_dump())
    events = served.engine.generate(served.encode(job), parameters)  # type: ignore[attr-defined]
    return [(event.token, event.text) for event in events]


def sampled_job(rng: random.Random, model: str, chat: bool, tokens: int) -> Job:
    """Return a job that samples, with a seed."""
    text = rng.choice(PROMPTS)
    now = time.time()
    return Job.model_validate(
        {
            "job_id": f"job-{uuid.uuid4().hex[:12]}",
            "tenant": "acme",
            "model": model,
            "sampling": Sampling(
                max_tokens=tokens,
                temperature=rng.uniform(0.7, 1.2),
                top_p=rng.choice((1.0, 0.9)),
                seed=rng.getrandbits(62),
                ignore_eos=True,
            ),
            "deadline_unix_s": now + 300,
            "created_at_unix_s": now,
            "trace_id": "kill",
        }
        | ({"messages": (Message(role="user", content=text),)} if chat else {"prompt": text})
    )


def kill_holder(stack: Stack, job: Job) -> None:
    """kill -9 the process that decodes a job: the holder in its state names the process."""
    with redis.Redis(port=stack.redis.port) as client:
        holder = client.hget(Keys.of(job.ref).job(job.job_id), "holder")
    assert isinstance(holder, bytes)
    pid = int(holder.decode().split("-")[-2])
    assert pid in {worker.process.pid for worker in stack.workers if worker.process}
    os.kill(pid, signal.SIGKILL)


async def run(stack: Stack, served: ServedModel, *, tries: int, seed: int, tokens: int = 80) -> Outcome:
    """Make the tries, one after the other."""
    rng = random.Random(seed)
    outcome, traffic = Outcome(differing=[]), Traffic(stack, seed, clients=0)
    model = served.models[0]
    try:
        await traffic.start(0)
        while outcome.taken_over < tries and outcome.tries < 2 * tries + 5:
            while len(await traffic.store.workers()) < len(stack.workers):
                await asyncio.sleep(0.1)  # the one killed before is not back yet
            job = sampled_job(rng, model.id, model.has_chat_template and rng.random() < 0.7, tokens)
            if not await traffic.submit(job):
                continue
            seen = await _follow_and_kill(stack, traffic, job, rng.randint(2, tokens // 2))
            outcome.tries += 1
            terminal = seen[-1].terminal
            assert terminal is not None
            outcome.taken_over += terminal.attempts == 2
            same = [(entry.token, entry.text) for entry in seen] == reference(served, job)
            outcome.equal += same and terminal.attempts == 2
            print(f"{outcome.equal} of {outcome.taken_over} equal", file=sys.stderr, end="\r", flush=True)
            if not same:
                assert outcome.differing is not None
                outcome.differing.append(f"{job.job_id}: {len(seen)} entries, {terminal}")
    finally:
        await traffic.close()
    return outcome


async def _follow_and_kill(stack: Stack, traffic: Traffic, job: Job, after: int) -> list[LogEntry]:
    seen = Seen(job)
    stream = traffic.store.stream(job.ref)
    async for entry in stream:
        assert entry is not None
        seen.entries.append(entry)
        if entry.seq == after:
            await asyncio.to_thread(kill_holder, stack, job)
    return seen.entries


def main() -> int:
    """Make the tries and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kill", description=__doc__)
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--model", default="axon-tiny")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the servers are stopped
    missing = missing_programs("redis-server", "rabbitmq-server")
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    served = load(options.model)
    with tempfile.TemporaryDirectory() as folder:
        command = worker_command(options.model)
        with Stack(Path(folder), Pace.quick(), worker_command=command) as stack:
            outcome = asyncio.run(run(stack, served, tries=options.tries, seed=options.seed))
    print(
        f"{options.model}, float32: {outcome.tries} answers, {outcome.taken_over} killed in the middle and taken over, "
        f"{outcome.equal} of {outcome.taken_over} equal to the uninterrupted run"
    )
    for line in outcome.differing or ():
        print(f"DIFFERS {line}")
    return 0 if outcome.equal == outcome.taken_over == options.tries and not outcome.differing else 1


if __name__ == "__main__":
    sys.exit(main())
