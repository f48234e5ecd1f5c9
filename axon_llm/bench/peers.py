"""Other programs with weights of the same shape in the same minutes: what a peer is, and how we compare.

A ratio between two programs means something only if both ran in turn on the same machine with the same shape, depth
and threads. So each repetition of our rows is followed by one of theirs. Nothing here is needed to run a model; the
``bench`` extra installs it. Next: ``llama_cpp.py``, ``torch_peers.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Protocol

from axon_llm.bench.rows import Case, Row


class Peer(Protocol):
    """Something that can be measured case by case.

    Attributes:
        rates: tokens per second, a list for each case, in the order measured.
        version: name and version of the program; ``""`` while it is not known.
    """

    rates: dict[Case, list[float]]
    version: str

    def measure(self, case: Case) -> None:
        """Run one case once, or leave it out."""


def ratios(name: str, peer: Peer, rows: Sequence[Row]) -> list[dict[str, object]]:
    """What a peer reached and how we compare, row by row, as elements of ``axon bench --json``.

    The first repetition of each program is its warm-up and does not count. The ratio is the median of the ratios of
    the repetitions, which ran next to each other.
    """
    report: list[dict[str, object]] = []
    for row in rows:
        theirs = peer.rates.get(row.case, [])[1:]
        if theirs:
            pairs = [ours / other for ours, other in zip(row.rates, theirs, strict=False)]
            report.append(
                {
                    "peer": name,
                    "version": peer.version,
                    "test": row.case.name,
                    "tokens_per_s_median": median(theirs),
                    "ratio_median": median(pairs),
                    "ratio_min": min(pairs),
                    "ratio_max": max(pairs),
                }
            )
    return report
