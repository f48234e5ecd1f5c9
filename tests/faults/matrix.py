"""``python -m tests.faults.matrix``: every row of the fault matrix by itself, as a table.

Columns: how often the fault was injected, jobs accepted, complete (client == log == reference, one end, one history
commit), lost, doubled, reordered, wrong, 503 answers, jobs that another worker took over, seconds. Exit code 1 if
anything but complete.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.faults import ROWS
from tests.faults.run import run
from tests.faults.stack import Pace, Stack
from tests.integration.servers import missing_programs

HEAD = "| Fault | Expected | × | Jobs | Complete | Lost | Doubled | Reordered | Wrong | 503 | Taken over | s |"
RULE = "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"


def main() -> int:
    """Run the rows, print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.matrix", description=__doc__)
    parser.add_argument("--jobs", type=int, default=100, help="jobs per row, at least")
    parser.add_argument("--times", type=int, default=3, help="how often each fault is injected")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--real", action="store_true", help="the product's own time-outs, not the short ones")
    parser.add_argument("--rows", nargs="*", default=[], help="only rows whose name contains one of these")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the servers are stopped
    missing = missing_programs("redis-server", "rabbitmq-server")
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    rows = [row for row in ROWS if not options.rows or any(part in row.name for part in options.rows)]
    pace = Pace.real() if options.real else Pace.quick()
    totals, problems = [0] * 8, []
    print(HEAD, RULE, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder, Stack(Path(folder), pace) as stack:
        for number, row in enumerate(rows):
            began = time.monotonic()
            verdict = asyncio.run(
                run(stack, [row] * options.times, seed=options.seed * 1000 + number, jobs=options.jobs)
            )
            counts = [
                verdict.jobs,
                verdict.complete,
                verdict.lost,
                verdict.doubled,
                verdict.reordered,
                verdict.wrong,
                verdict.refused,
                verdict.taken_over,
            ]
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            cells = " | ".join(map(str, counts))
            seconds = time.monotonic() - began
            print(f"| {row.name} | {row.expected} | {options.times} | {cells} | {seconds:.0f} |", flush=True)
            if verdict.gone:
                print(f"{row.name}: {verdict.gone} jobs forgotten with the last writes, not counted", file=sys.stderr)
            problems += [f"{row.name}: {fault}" for fault in verdict.faults]
    print(f"| **all** | | {options.times * len(rows)} | {' | '.join(map(str, totals))} | |")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
