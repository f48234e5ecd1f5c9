"""Faults while jobs flow.

Every accepted job complete, nothing lost, doubled or reordered; three mixes that cover every row.

The same rows one by one, as a table: ``python -m tests.faults.matrix``. For hours: ``python -m tests.faults.soak``.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.faults.faults import ROWS, Fault
from tests.faults.run import run
from tests.faults.stack import Pace, Stack
from tests.needs import need

SEEDS = (1, 2, 3)
FAULTS_PER_SEED = 16


def mix(seed: int) -> list[Fault]:
    """Return at least 16 faults; the mixes of all seeds together hold every row."""
    rows = list(ROWS)
    random.Random(0).shuffle(rows)
    share = len(SEEDS)
    own = rows[seed % share :: share]
    others = [row for row in rows if row not in own]
    chosen = own + random.Random(seed).sample(others, max(0, FAULTS_PER_SEED - len(own)))
    random.Random(seed).shuffle(chosen)
    return chosen


def test_the_mixes_cover_every_row() -> None:
    assert {row.name for seed in SEEDS for row in mix(seed)} == {row.name for row in ROWS}
    assert all(len(mix(seed)) >= FAULTS_PER_SEED for seed in SEEDS)


@pytest.mark.slow
@pytest.mark.timeout(900)  # about two minutes on an idle machine
@pytest.mark.parametrize("seed", SEEDS)
def test_every_accepted_job_is_answered_exactly_once_whatever_fails(seed: int, tmp_path: Path) -> None:
    need("redis-server", "rabbitmq-server")
    with Stack(tmp_path, Pace.quick()) as stack:
        verdict = asyncio.run(run(stack, mix(seed), seed=seed, jobs=100))
    print(verdict)
    assert verdict.faults == []
    assert verdict.jobs >= 100
    assert verdict.complete == verdict.jobs
    assert verdict.gone <= 10  # clients that follow a job when Redis is set back: at most all of them
