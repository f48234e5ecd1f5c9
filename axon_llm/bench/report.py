"""One run of the bench as one JSON object: what was measured, on what, and whether it ran as it was asked to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from axon_llm.bench.hardware import environment
from axon_llm.bench.peers import Peer, ratios
from axon_llm.bench.rows import Case, measure
from axon_llm.fast import describe
from axon_llm.model import Transformer


def measured(
    name: str,
    model: Transformer,
    cases: Sequence[Case],
    *,
    quantize: str | None = None,
    repetitions: int = 5,
    compile: bool = False,
    peers: Mapping[str, Peer] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a model, and peers next to it.

    Args:
        name: what the model was loaded by.
        model: the decoder, with whatever parts replaced.
        cases: what to measure.
        quantize: as the model was.
        repetitions: how often each case is measured.
        compile: compile the decode step.
        peers: by name, measured in turn.
        progress: called with the name of what is measured next.

    Returns:
        The report, schema ``axon.bench/1``. ``compile`` is what was asked for; ``compiled`` and ``captured`` (as a CUDA
        graph) are what the decode steps were, every one of them.
    """
    peers = peers or {}
    linears = describe(model)

    def measure_peers(case: Case) -> None:
        for peer in peers.values():
            peer.measure(case)

    rows, ceilings, runner = measure(
        model,
        cases,
        weight_bytes=int(linears["linear_bytes"]),
        repetitions=repetitions,
        compile=compile,
        progress=progress,
        after=measure_peers,
    )
    weight = model.embed_tokens.weight
    return {
        "schema": "axon.bench/1",
        "model": name,
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "quantize": quantize,
        "compile": compile,
        "compiled": runner.compiled,
        "captured": runner.captured,
        "linears": linears,
        **environment(weight.device),
        "read_gb_per_s": ceilings.read_bytes_per_s / 1e9,
        "sum_gb_per_s": ceilings.summed_bytes_per_s / 1e9,
        "matmul_tflop_per_s": ceilings.flops_per_s / 1e12,
        "rows": [row.report(ceilings) for row in rows],
        "peers": [entry for peer_name, peer in peers.items() for entry in ratios(peer_name, peer, rows)],
    }
