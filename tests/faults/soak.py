"""``python -m tests.faults.soak --minutes M``.

Random mixes of faults for as long as asked, with a report at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

from tests.faults.faults import ROWS
from tests.faults.run import run
from tests.faults.stack import Pace, Stack
from tests.faults.traffic import Verdict
from tests.integration.servers import missing_programs

FAULTS_PER_ROUND = 8


def main() -> int:
    """Run rounds until the time is up; exit code 1 if any job was not complete."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=42.0, help="42 = 14 mixes of 180 s")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="repeats a run's choice of faults")
    parser.add_argument("--real", action="store_true", help="the product's own time-outs, not the short ones")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the servers are stopped
    missing = missing_programs("redis-server", "rabbitmq-server")
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    rng = random.Random(options.seed)
    total, injected = Verdict(), Counter[str]()
    end, rounds = time.monotonic() + options.minutes * 60, 0
    print(f"seed {options.seed}, {options.minutes:g} minutes", flush=True)
    pace = Pace.real() if options.real else Pace.quick()
    with tempfile.TemporaryDirectory() as folder, Stack(Path(folder), pace, workers=3) as stack:
        while time.monotonic() < end:
            rounds += 1
            faults = rng.choices(ROWS, k=FAULTS_PER_ROUND)
            verdict = asyncio.run(run(stack, faults, seed=rng.getrandbits(32), jobs=40))
            injected.update(fault.name for fault in faults)
            for field in fields(Verdict):
                setattr(total, field.name, getattr(total, field.name) + getattr(verdict, field.name))
            print(
                f"round {rounds}: {verdict.complete} of {verdict.jobs} complete, {verdict.refused} refused, "
                f"{verdict.taken_over} taken over; {', '.join(fault.name for fault in faults)}",
                flush=True,
            )
            for fault in verdict.faults:
                print(f"  PROBLEM {fault}", flush=True)
        starts = sum(worker.starts for worker in stack.workers)
    print(f"\n{rounds} rounds, {sum(injected.values())} faults, {starts} worker starts")
    print(f"{total.complete} of {total.jobs} jobs complete; {total.lost} lost, {total.doubled} doubled, ", end="")
    print(
        f"{total.reordered} reordered, {total.wrong} wrong; {total.refused} refused, {total.resumes} resumes, ", end=""
    )
    print(f"{total.taken_over} taken over; {total.gone} forgotten with the last writes of a Redis that was set back")
    for name, count in injected.most_common():
        print(f"{count:5} × {name}")
    return 0 if total.ok else 1


if __name__ == "__main__":
    sys.exit(main())
