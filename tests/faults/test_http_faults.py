"""The rows of the fault matrix that need the whole front.

Nginx and two session managers, with the tiny engine behind them.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.faults.http_faults import HTTP_ROWS, run
from tests.faults.http_stack import HttpStack
from tests.faults.stack import Pace
from tests.needs import need


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_what_clients_see_over_http_is_the_reference_whatever_fails(tmp_path: Path) -> None:
    need("redis-server", "rabbitmq-server", "nginx")
    with HttpStack(tmp_path, Pace.quick()) as stack:
        verdict = asyncio.run(run(stack, [row[1] for row in HTTP_ROWS], seed=1, jobs=40))
    print(verdict)
    assert verdict.problems == []
    assert verdict.complete == verdict.jobs >= 40
    assert verdict.resumes > 0
