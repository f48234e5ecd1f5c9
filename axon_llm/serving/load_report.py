"""What a load test found, as figures: the field names of ``vllm bench serve``, and whether an objective was met.

All latencies are the client's. TTFT: due → first text. TPOT: (last − first text) / (tokens − 1), one figure for each
request. ITL: each gap between two pieces of text. E2EL: due → end. Goodput: requests per second that met every limit of
the objective. Milliseconds where a name ends in ``_ms``.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from axon_llm.errors import UsageError
from axon_llm.serving.load import Run
from axon_llm.serving.load_client import Sample

PERCENTILES = (50, 90, 95, 99)
_LIMIT = re.compile(r"(ttft|tpot|e2el):(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Objective:
    """Limits in milliseconds that a request must keep to count as good; ``None`` where there is none."""

    ttft_ms: float | None = 500.0
    tpot_ms: float | None = 30.0
    e2el_ms: float | None = None

    @classmethod
    def parse(cls, limits: Sequence[str]) -> Objective:
        """From texts such as ``ttft:500``; none given, the default.

        Raises:
            UsageError: not of that form.
        """
        if not limits:
            return cls()
        found: dict[str, float | None] = {"ttft_ms": None, "tpot_ms": None, "e2el_ms": None}
        for text in limits:
            match = _LIMIT.fullmatch(text)
            if match is None:
                raise UsageError(f"{text!r} is no limit.", "Write ttft:500, tpot:30 or e2el:5000 (milliseconds).")
            found[f"{match[1]}_ms"] = float(match[2])
        return cls(**found)

    def kept_by(self, sample: Sample) -> bool:
        """Whether a request was answered within every limit."""
        if sample.error:
            return False
        measured = ((self.ttft_ms, sample.ttft_s), (self.tpot_ms, sample.tpot_s), (self.e2el_ms, sample.e2el_s))
        return all(limit is None or value is None or value * 1e3 <= limit for limit, value in measured)


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation, as numpy does; ``values`` need not be sorted. NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def report(run: Run, objective: Objective, *, base_url: str, detailed: bool = False) -> dict[str, Any]:
    """One run as a JSON-ready object.

    Args:
        run: what happened.
        objective: what counts as good.
        base_url: where it was measured.
        detailed: every request's figures too, in seconds.
    """
    good = [sample for sample in run.samples if not sample.error]
    output_tokens = sum(sample.output_tokens for sample in good)
    input_tokens = sum(sample.prompt_tokens for sample in good)
    kept = sum(map(objective.kept_by, run.samples))
    result: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "base_url": base_url,
        "endpoint": "/v1" + run.workload.path,
        "model_id": run.workload.model,
        "num_prompts": run.workload.num_prompts,
        "request_rate": "inf" if math.isinf(run.request_rate) else run.request_rate,
        "burstiness": run.burstiness,
        "max_concurrency": run.max_concurrency,
        "duration": run.duration_s,
        "completed": len(good),
        "failed": len(run.samples) - len(good),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "total_cached_tokens": sum(sample.cached_tokens for sample in good),
        "request_throughput": len(good) / run.duration_s,
        "request_goodput": kept / run.duration_s,
        "output_throughput": output_tokens / run.duration_s,
        "total_token_throughput": (input_tokens + output_tokens) / run.duration_s,
        "max_concurrent_requests": _most_at_once(run.samples),
        "goodput_fraction": kept / len(run.samples),
        "client_lag_ms": run.lag_s * 1e3,
    }
    result |= _figures("ttft", [sample.ttft_s for sample in good])
    result |= _figures("tpot", [sample.tpot_s for sample in good if sample.tpot_s is not None])
    result |= _figures("itl", [gap for sample in good for gap in sample.itls_s])
    result |= _figures("e2el", [sample.e2el_s for sample in good])
    result["objective"] = {
        f"p99_{name}_ms": {"limit": limit, "measured": result[f"p99_{name}_ms"], "met": _met(result, name, limit)}
        for name, limit in (("ttft", objective.ttft_ms), ("tpot", objective.tpot_ms), ("e2el", objective.e2el_ms))
        if limit is not None
    }
    result["errors"] = sorted({sample.error for sample in run.samples if sample.error})
    if detailed:
        result["input_lens"] = [sample.prompt_tokens for sample in run.samples]
        result["output_lens"] = [sample.output_tokens for sample in run.samples]
        result["start_times"] = [sample.due - run.began for sample in run.samples]
        result["ttfts"] = [sample.ttft_s if sample.chunks else None for sample in run.samples]
        result["itls"] = [sample.itls_s for sample in run.samples]
    return result


def _figures(name: str, values_s: Sequence[float]) -> dict[str, float | None]:
    values = [value * 1e3 for value in values_s]
    if not values:
        names = ("mean", "median", "std", *(f"p{percent}" for percent in PERCENTILES))
        return {f"{statistic}_{name}_ms": None for statistic in names}
    return {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": statistics.median(values),
        f"std_{name}_ms": statistics.pstdev(values),
        **{f"p{percent}_{name}_ms": percentile(values, percent) for percent in PERCENTILES},
    }


def _met(result: dict[str, Any], name: str, limit: float) -> bool:
    measured = result[f"p99_{name}_ms"]
    return result["failed"] == 0 and measured is not None and measured <= limit


def _most_at_once(samples: Sequence[Sample]) -> int:
    steps = sorted([(sample.due, 1) for sample in samples] + [(sample.ended, -1) for sample in samples])
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most
