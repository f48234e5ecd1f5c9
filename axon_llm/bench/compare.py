"""Cache on against cache off: the same greedy tokens, and what each of them costs.

The two runs go in step, one token each in turn, so that whatever else the machine does disturbs both alike. Linears and
attention kernels are the same; the only difference is whether keys and values are kept or computed again. (Asked to
compile, only the cached step is: without a cache every token has another shape.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from axon_llm.cache import KVCache
from axon_llm.engine.runner import Runner
from axon_llm.errors import AxonError, RequestError
from axon_llm.model import Transformer

# Logits; two sums in different order differ by about this much: bfloat16 keeps 8 bits, float16 11, float32 24.
NEAR_TIES = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-4}
BINS = 16
LATE = 9  # tokens whose median stands for "the last token"


@dataclass(frozen=True, slots=True)
class Choice:
    """One greedy choice: the token, and by how much it beat the second best (in logits)."""

    token: int
    margin: float


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two runs.

    Attributes:
        choices: per generated token.
        seconds: per generated token; the first is the time to first token (the whole prompt).
    """

    choices: list[Choice]
    seconds: list[float]

    @property
    def tokens(self) -> list[int]:
        """The generated tokens."""
        return [choice.token for choice in self.choices]

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.seconds[0]

    @property
    def late_s(self) -> float:
        """Time of the last tokens: the median of a few, since one may have been disturbed."""
        return median(self.seconds[-LATE:])

    @property
    def total_s(self) -> float:
        """From the prompt to the last token."""
        return sum(self.seconds)

    @property
    def tpot_s(self) -> float | None:
        """Median time per output token after the first; ``None`` with fewer than two tokens."""
        return median(self.seconds[1:]) if len(self.seconds) > 1 else None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Where the two runs first chose differently, and how close each choice was."""

    index: int
    cached: Choice
    uncached: Choice
    tolerance: float

    @property
    def near_tie(self) -> bool:
        """Whether rounding is enough to explain the difference: in neither run was it a clear choice."""
        return max(self.cached.margin, self.uncached.margin) < self.tolerance


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome.

    Attributes:
        prompt_tokens: length of the prompt.
        cached: the run with the cache.
        uncached: the run without.
        cache_bytes_formula: bytes by the formula.
        cache_bytes_allocated: bytes of the tensors' storage.
        tolerance: margin below which a choice is a near-tie.
    """

    prompt_tokens: int
    cached: Side
    uncached: Side
    cache_bytes_formula: int
    cache_bytes_allocated: int
    tolerance: float = NEAR_TIES[torch.bfloat16]

    @property
    def mismatch(self) -> Mismatch | None:
        """The first difference, or ``None``."""
        for index, (one, other) in enumerate(zip(self.cached.choices, self.uncached.choices, strict=True)):
            if one.token != other.token:
                return Mismatch(index, one, other, self.tolerance)
        return None

    @property
    def near_ties(self) -> int:
        """Choices in which the two best logits were closer than rounding in this dtype can tell apart."""
        return sum(choice.margin < self.tolerance for choice in self.uncached.choices)

    @property
    def positions(self) -> list[int]:
        """Tokens in the sequence when each token was generated (the first: the prompt)."""
        return [self.prompt_tokens + index for index in range(len(self.cached.seconds))]

    def exponent(self, side: Side) -> float | None:
        """The power of the context length with which a token's time grows; see :func:`growth_exponent`."""
        return growth_exponent(self.positions[1:], side.seconds[1:])

    @property
    def speedup(self) -> float:
        """Total time without the cache over total time with it."""
        return self.uncached.total_s / self.cached.total_s


@torch.inference_mode()
def compare(
    model: Transformer,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    compile: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Generate ``max_tokens`` greedily, with the cache and without it.

    Args:
        model: the decoder, with whatever parts replaced by fast ones: both runs use the same.
        prompt: token ids.
        max_tokens: how many to generate.
        compile: compile the cached decode step.
        progress: called with the number of tokens both runs have generated.

    Raises:
        RequestError: the context is too short.
        AxonError: the model's output is not a number.
    """
    length = len(prompt) + max_tokens
    if length > model.config.max_position_embeddings:
        raise RequestError(
            f"{len(prompt)} prompt tokens and {max_tokens} more do not fit the context of "
            f"{model.config.max_position_embeddings}",
            code="context_length_exceeded",
        )
    runner = Runner(model, slots=1, max_seq_len=length, compile=compile)
    if compile:
        runner.warm_up()
    _warm_up(model, runner, prompt)
    cached, uncached = Side([], []), Side([], [])
    on, off = list(prompt), list(prompt)
    for step in range(max_tokens):
        _timed(cached, on, lambda: _cached_step(runner, on, prefill=step == 0))  # noqa: B023 - called at once
        _timed(uncached, off, lambda: _uncached_step(model, off))
        if progress is not None:
            progress(step + 1)
    formula = KVCache.bytes_for(model.config, slots=1, max_seq_len=length, dtype=runner.cache.k.dtype)
    allocated = sum(t.untyped_storage().nbytes() for t in (runner.cache.k, runner.cache.v))
    tolerance = NEAR_TIES.get(model.embed_tokens.weight.dtype, NEAR_TIES[torch.bfloat16])
    return Comparison(len(prompt), cached, uncached, formula, allocated, tolerance)


def _warm_up(model: Transformer, runner: Runner, prompt: Sequence[int]) -> None:
    """Touch memory and let every kernel choose itself once, for both runs alike."""
    for _ in range(2):
        runner.prefill(0, prompt, 0, min(len(prompt), runner.buckets.chunks.values[-1]))
        runner.decode([prompt[0]], [0], runner.buckets.lengths.values[0])
        _uncached_step(model, prompt)


def _timed(side: Side, tokens: list[int], step: Callable[[], Tensor]) -> None:
    """Run one step, including the choice of the token, and write down what it took."""
    start = time.perf_counter()
    logits = step()
    token = int(logits.argmax(dim=-1))  # the first of equals, which topk does not promise; waits for the device
    side.seconds.append(time.perf_counter() - start)
    best = logits.float().topk(2, dim=-1).values[0]
    if not best.isfinite().all():
        raise AxonError("the model's output is not a number", "Its weights may be damaged.")
    side.choices.append(Choice(token, float(best[0] - best[1])))
    tokens.append(token)


def _cached_step(runner: Runner, tokens: list[int], *, prefill: bool) -> Tensor:
    """The prompt in chunks, or the newest token alone."""
    if not prefill:
        position = len(tokens) - 1
        return runner.decode(tokens[-1:], [position], runner.buckets.lengths.at_least(len(tokens)))
    chunk = runner.buckets.chunks.values[-1]
    for start in range(0, len(tokens), chunk):
        logits = runner.prefill(0, tokens, start, min(start + chunk, len(tokens)))
    return logits


def _uncached_step(model: Transformer, tokens: Sequence[int]) -> Tensor:
    """The whole sequence, every time."""
    device = model.embed_tokens.weight.device
    last = torch.tensor([len(tokens) - 1], device=device)
    positions = torch.arange(len(tokens), device=device)[None]
    logits: Tensor = model(torch.tensor([list(tokens)], device=device), positions, None, logits_at=last)
    return logits[:, 0]


def growth_exponent(positions: Sequence[int], seconds: Sequence[float]) -> float | None:
    """The exponent p of the best fit ``seconds ∝ position^p``: 0 is constant per token, 1 linear.

    Least squares on logarithms, over medians of up to 16 bins of equal width, so that a few disturbed steps and the
    uneven spacing of logarithms do not decide.

    Returns:
        ``None`` with fewer than 16 tokens or less than a doubling of the context: too little to fit.
    """
    if len(positions) < BINS or positions[-1] < 2 * positions[0]:
        return None
    edges = [round(i * len(positions) / BINS) for i in range(BINS + 1)]
    points = [(math.log(median(positions[a:b])), math.log(median(seconds[a:b]))) for a, b in pairwise(edges)]
    mean_x, mean_y = (sum(point[i] for point in points) / len(points) for i in (0, 1))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
