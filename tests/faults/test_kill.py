"""kill -9 in the middle of a sampled answer, with the real engine and the shipped model.

More tries: ``python -m tests.faults.kill``.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.faults import kill
from tests.faults.stack import Pace, Stack
from tests.needs import need

TRIES = 3


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_an_answer_whose_worker_is_killed_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    need("redis-server", "rabbitmq-server")
    decoder = kill.load("axon-tiny")
    with Stack(tmp_path, Pace.quick(), worker_command=kill.worker_command("axon-tiny")) as stack:
        outcome = asyncio.run(kill.run(stack, decoder, tries=TRIES, seed=7))
    print(outcome)
    assert outcome.differing == []
    assert outcome.equal == outcome.taken_over == TRIES
