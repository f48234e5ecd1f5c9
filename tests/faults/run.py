"""One run: jobs flow, faults happen one after the other, the checker looks at everything.

Shared by the test and the commands.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from tests.faults.faults import Fault
from tests.faults.stack import Stack
from tests.faults.traffic import Traffic, Verdict, check


async def run(stack: Stack, faults: Sequence[Fault], *, seed: int, jobs: int, finish_s: float = 90.0) -> Verdict:
    """Let at least ``jobs`` jobs flow while the faults happen; return the checker's verdict over all of them."""
    traffic = Traffic(stack, seed)
    written = [len(worker.log()) for worker in stack.workers]
    try:
        await traffic.start(jobs)
        for fault in faults:
            await asyncio.sleep(traffic.rng.uniform(0.2, 0.8))
            await fault.inject(stack, traffic)
        stack.heal()
        stuck = ""
        try:
            await traffic.finish(finish_s)
        except TimeoutError as error:
            stuck = str(error)
        verdict = await check(traffic, patience_s=30.0)
        if stuck:
            verdict.faults.append(stuck)
        if any(fault.refuses for fault in faults) and not verdict.refused:
            verdict.faults.append("nothing was refused: the fault was not felt")
        logged = "".join(worker.log(length) for worker, length in zip(stack.workers, written, strict=True))
        for name, felt in {(fault.name, fault.felt) for fault in faults}:
            if not re.search(felt, logged):
                verdict.faults.append(f"{name}: not felt, no worker logged `{felt}`")
        return verdict
    finally:
        await traffic.close()
