"""Two servers under the same load: what one of them adds to the latency of the other.

In alternating blocks, so that a change of the machine's pace meets both. Next: ``load.py``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from axon_llm.serving.load import Workload, run_load
from axon_llm.serving.load_client import Sample, Target, first_model
from axon_llm.serving.load_report import percentile

BLOCKS = 10


async def compare(
    here: Target,
    against: Target,
    workload: Workload,
    *,
    model: str | None = None,
    request_rate: float = math.inf,
    max_concurrency: int | None = None,
    burstiness: float = 1.0,
    warm_ups: int = 2,
) -> dict[str, Any]:
    """The same load on both; without ``model``, each server is asked for the first that it lists.

    Returns:
        for p50 and p99 of TTFT and TPOT, in milliseconds: ``here``, ``against``, and what the first ``added``; ``None``
        where a side answered nothing.

    Raises:
        ServiceUnavailable: one of them does not list its models.
    """
    blocks = min(BLOCKS, workload.num_prompts)
    servers = [(server, model or await first_model(server)) for server in (here, against)]
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    for block in range(-1 if warm_ups else 0, blocks):
        for side, (server, served) in enumerate(servers):
            number = math.ceil(workload.num_prompts / blocks) if block >= 0 else warm_ups
            part = replace(workload, model=served, num_prompts=number, seed=workload.seed + block)
            run = await run_load(
                server, part, request_rate=request_rate, max_concurrency=max_concurrency, burstiness=burstiness
            )
            if block >= 0:
                samples[side].extend(run.samples)
    result: dict[str, Any] = {
        "base_url": here.base_url,
        "against": against.base_url,
        "completed": [sum(not sample.error for sample in side) for side in samples],
        "failed": [sum(bool(sample.error) for sample in side) for side in samples],
    }
    good = [[sample for sample in side if not sample.error] for side in samples]
    for name in ("ttft", "tpot"):
        values = [[1e3 * v for s in side if (v := getattr(s, f"{name}_s")) is not None] for side in good]
        for percent in (50, 99):
            mine, its = (percentile(side, percent) if side else None for side in values)
            added = mine - its if mine is not None and its is not None else None
            result[f"p{percent}_{name}_ms"] = {"here": mine, "against": its, "added": added}
    return result
