"""The rows of ``axon bench``: prefill and decode speeds of one model, named as llama-bench names them.

``pp512`` prefills 512 tokens; ``tg128`` decodes 128 tokens, one by one, from an empty cache; ``tg128 @ d2048`` the same
with 2,048 tokens in the cache before. All rows are measured in turn, several times over, so that a change of the
machine's speed meets all of them.

The cache's contents are random numbers: what is in it has no bearing on speed, except that zeros might.

A row is held against the machine's limit around it. Memory shared with others may be twice as fast in one second as in
the next, and a decode row lasts for seconds; so on a CPU it stops every quarter of a second for a probe of the limit,
and each stretch of steps is held against the probes at its two ends. The step after a probe finds its caches cold:
among a quarter of a second's steps that does not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, median, stdev

import torch
from torch import nn

from axon_llm.bench.ceiling import Ceilings, seconds
from axon_llm.config import ModelConfig
from axon_llm.engine.runner import Runner
from axon_llm.engine.sampling import likeliest_of
from axon_llm.fast import ops
from axon_llm.fast.int8 import Int8Linear
from axon_llm.fast.strips import Int4Strips, Int8Strips
from axon_llm.model import Transformer

STRETCH_S = 0.25  # seconds of decode between two probes on a CPU, at the least; a GPU's memory keeps its speed


@dataclass(frozen=True, slots=True)
class Case:
    """What a row measures.

    Attributes:
        kind: ``"pp"`` (prefill) or ``"tg"`` (decode).
        tokens: how many.
        depth: tokens in the cache before.
        batch: sequences decoding together.
    """

    kind: str
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """Such as ``tg128 @ d2048``."""
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")


@dataclass(slots=True)
class Row:
    """One case and its times.

    Attributes:
        case: what was measured.
        bytes_per_step: bytes of weights and cache that one decode step must read, on average over the row; 0 for
            prefill.
        flops: multiplications and additions of the whole prefill; 0 for decode.
        seconds: of each repetition, probes left out.
        shares: of each stretch between two probes, the share it reached of the bandwidth (decode) or of the matrix
            product's rate (prefill).
    """

    case: Case
    bytes_per_step: float
    flops: float
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition, all sequences together."""
        return [self.case.tokens * self.case.batch / s for s in self.seconds]

    def report(self, ceilings: Ceilings) -> dict[str, object]:
        """The row as an element of ``axon bench --json``."""
        typical = median(self.seconds)
        return {
            "test": self.case.name,
            "kind": self.case.kind,
            "tokens": self.case.tokens,
            "depth": self.case.depth,
            "batch": self.case.batch,
            "repetitions": len(self.seconds),
            "tokens_per_s_mean": mean(self.rates),
            "tokens_per_s_sd": stdev(self.rates) if len(self.rates) > 1 else 0.0,
            "tokens_per_s_median": median(self.rates),
            "tokens_per_s_min": min(self.rates),
            "tokens_per_s_max": max(self.rates),
            "ms_per_step": 1e3 * typical / (self.case.tokens if self.case.kind == "tg" else 1),
            "bytes_per_token": self.bytes_per_step / self.case.batch if self.case.kind == "tg" else None,
            "ceiling": ceilings.bandwidth if self.case.kind == "tg" else "matrix product",
            "share_of_ceiling": median(self.shares),
        }


def _multiplies_integers(module: nn.Module) -> bool:
    """A prefill multiplies by this linear's weights as integers; int4 by the matrix unit it does in bfloat16."""
    in_bfloat16 = isinstance(module, Int4Strips) and module.products == ops.Products.TILES
    return isinstance(module, Int8Linear | Int8Strips | Int4Strips) and not in_bfloat16


@torch.inference_mode()
def measure(
    model: Transformer,
    cases: Sequence[Case],
    *,
    weight_bytes: int,
    repetitions: int = 5,
    compile: bool = False,
    prefill_chunk: int | None = None,
    progress: Callable[[str], None] | None = None,
    after: Callable[[Case], None] | None = None,
) -> tuple[list[Row], Ceilings, Runner]:
    """Measure every case ``repetitions`` times, in turn, after one warm-up.

    Args:
        model: the decoder, with whatever parts replaced.
        cases: what to measure.
        weight_bytes: bytes of weights that a pass reads.
        repetitions: how often.
        compile: compile the decode step.
        prefill_chunk: tokens per prefill chunk; sized to the device when omitted.
        progress: called with the name of what is measured next.
        after: called after each repetition of a case, the warm-up included: measures a peer next to it.

    Returns:
        The rows, the machine's limits, and the runner, which knows how its steps were run.
    """
    config = model.config
    length = max(case.depth + case.tokens for case in cases)
    runner = Runner(
        model, slots=max(case.batch for case in cases), max_seq_len=length, prefill_chunk=prefill_chunk, compile=compile
    )
    runner.cache.k.normal_()
    runner.cache.v.normal_()
    int8 = any(_multiplies_integers(module) for module in model.modules())
    ceilings = Ceilings(runner.device, model.embed_tokens.weight.dtype, int8)
    rows = [
        Row(
            case,
            *(
                (step_bytes(config, case, weight_bytes, runner), 0.0)
                if case.kind == "tg"
                else (0.0, prefill_flops(config, case.tokens))
            ),
        )
        for case in cases
    ]
    for repetition in range(repetitions + 1):
        ceilings.probe_bandwidth()  # both, whatever the rows ask for: a report has both
        ceilings.probe_product()
        for row in rows:
            if progress is not None:
                progress(f"{row.case.name} × {row.case.batch} ({'warm-up' if repetition == 0 else repetition})")
            taken, shares = _repeat(row, runner, ceilings)
            if repetition:
                row.seconds.append(taken)
                row.shares += shares
            if after is not None:
                after(row.case)
    return rows, ceilings, runner


def _repeat(row: Row, runner: Runner, ceilings: Ceilings) -> tuple[float, list[float]]:
    """Run a case once: its seconds, without the probes, and each stretch's share of the limit around it."""
    case = row.case
    if case.kind == "pp":
        before = ceilings.probe_product()
        taken = seconds(lambda: _prefill(runner, case.tokens), runner.device)
        return taken, [2 * row.flops / (before + ceilings.probe_product()) / taken]
    tokens, done, taken, shares = _tokens(runner, case.batch), 0, 0.0, []
    on_cpu = runner.device.type == "cpu"
    before = ceilings.probe_bandwidth()
    while done < case.tokens:
        steps = min(case.tokens - done, math.ceil(STRETCH_S * before / row.bytes_per_step) if on_cpu else case.tokens)
        positions = range(case.depth + done, case.depth + done + steps)
        lasted = seconds(partial(_decode, runner, tokens, positions), runner.device)
        after = ceilings.probe_bandwidth()
        shares.append(2 * row.bytes_per_step * steps / (before + after) / lasted)
        done, taken, before = done + steps, taken + lasted, after
    return taken, shares


def step_bytes(config: ModelConfig, case: Case, weight_bytes: int, runner: Runner) -> float:
    """Bytes one decode step must read: the weights once, and each sequence's keys and values."""
    per_position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * runner.cache.k.dtype.itemsize
    return weight_bytes + case.batch * per_position * (case.depth + (case.tokens + 1) / 2)


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """Two operations per weight and token, and the causal half of attention; the output layer runs for one token."""
    per_token = config.num_parameters - config.vocab_size * config.hidden_size * (
        1 if config.tie_word_embeddings else 2
    )
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * tokens * tokens
    return 2.0 * per_token * tokens + attention + 2.0 * config.vocab_size * config.hidden_size


def _prefill(runner: Runner, count: int) -> None:
    tokens = _tokens(runner, count)
    chunk = runner.buckets.chunks.values[-1]
    for start in range(0, count, chunk):
        logits = runner.prefill(0, tokens, start, min(start + chunk, count))
    int(logits.argmax())


def _decode(runner: Runner, tokens: list[int], positions: Iterable[int]) -> None:
    """One step for each position, from ``tokens`` on, which become the newest."""
    likeliest = likeliest_of(runner.model)
    for position in positions:
        logits = runner.decode(tokens, [position] * len(tokens), runner.buckets.lengths.at_least(position + 1))
        tokens[:] = likeliest(logits)[1].tolist()  # the one read of a step, as in the engine


def _tokens(runner: Runner, count: int) -> list[int]:
    vocabulary = runner.model.config.vocab_size
    return [(7919 * index + 13) % vocabulary for index in range(count)]
