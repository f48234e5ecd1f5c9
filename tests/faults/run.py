"""One run: jobs flow, faults happen one after the other, the checker looks at everything.

Shared by the test and the commands.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from tests.faults.faults import Fault, NotFelt
from tests.faults.stack import Stack
from tests.faults.traffic import Traffic, Verdict, check


async def run(stack: Stack, faults: Sequence[Fault], *, seed: int, jobs: int, finish_s: float = 90.0) -> Verdict:
    """Let at least ``jobs`` jobs flow while the faults happen; return the checker's verdict over all of them."""
    traffic = Traffic(stack, seed)
    began: list[tuple[Fault, list[int]]] = []  # with how much each worker had logged by then
    missed = []
    try:
        await traffic.start(jobs)
        for fault in faults:
            await asyncio.sleep(traffic.rng.uniform(0.2, 0.8))
            began.append((fault, [len(worker.log()) for worker in stack.workers]))
            try:
                await fault.inject(stack, traffic)
            except NotFelt as error:
                missed.append(f"{fault.name}: not felt, {error}")
                stack.heal()
        stack.heal()
        stuck = ""
        try:
            await traffic.finish(finish_s)
        except TimeoutError as error:
            stuck = str(error)
        verdict = await check(traffic, patience_s=30.0)
        if stuck:
            verdict.faults.append(stuck)
        verdict.faults += missed
        for fault, written in began:
            logged = "".join(worker.log(length) for worker, length in zip(stack.workers, written, strict=True))
            if not re.search(fault.felt, logged):
                verdict.faults.append(f"{fault.name}: not felt, no worker logged `{fault.felt}`")
        return verdict
    finally:
        await traffic.close()
