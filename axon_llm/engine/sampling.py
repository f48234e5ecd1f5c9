"""Choosing the next token of every slot at once, each by its own parameters.

The order of the transforms, each on what the previous one left:

1. repetition penalty (tokens of prompt and completion), frequency and presence penalty (tokens of the completion)
2. logit bias
3. greedy rows are done: the likeliest token
4. temperature
5. top-k, then top-p among what top-k left, then min-p; tokens as likely as the last one kept are kept too
6. a draw by inverse transform in the order of the vocabulary: of a block of it, then of a token of the block

Reported log-probabilities are those of the model itself, before all of this.

Random numbers come from seed and position alone: see ``chance.py``.

Legend: R rows (slots from ``first`` on) · V vocabulary · K candidates
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from axon_llm.engine.chance import BLOCK, as_int64, draw, uniform
from axon_llm.engine.params import SamplingParams
from axon_llm.engine.penalties import Biases, Penalties

GREEDY_BELOW = 1e-5  # a temperature at which float32 cannot tell sampling from greedy
FIRST_CANDIDATES = 256  # top-p looks at this many of the likeliest tokens first, and at more if they do not suffice

Likeliest = Callable[[Tensor], tuple[Tensor, Tensor]]  # scores [R, V] → the largest [R] and its token [R]

_NEUTRAL = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What came out of one call, as plain Python numbers, a row each.

    Attributes:
        tokens: the chosen token ids; -1 where the model's logits were not numbers.
        logprobs: log-probability of the chosen token; empty when no row asked.
        top_tokens: ids of the likeliest tokens, best first; empty when no row asked.
        top_logprobs: theirs.
    """

    tokens: list[int]
    logprobs: list[float]
    top_tokens: list[list[int]]
    top_logprobs: list[list[float]]

    def alternatives(self, row: int, count: int) -> tuple[tuple[int, float], ...]:
        """The ``count`` likeliest tokens of a row with their log-probabilities."""
        return tuple(zip(self.top_tokens[row][:count], self.top_logprobs[row][:count], strict=True))


def likeliest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row; the first of several equally likely.

    Args:
        scores: ``[R, V]`` float32.

    Returns:
        Its score ``[R]``, and the token id ``[R]`` int64: -1 where that score is not finite.
    """
    best, token = scores.max(dim=-1)
    return best, torch.where(best.isfinite(), token, -1)


def likeliest_of(model: nn.Module) -> Likeliest:
    """How the likeliest tokens of a model's scores are found: by its own kernel where it has one."""
    own: Likeliest = getattr(model, "likeliest", likeliest)
    return own


class Sampler:
    """The sampling parameters of all slots as tensors, and the draw.

    A parameter is written once, when a sequence takes a slot; a step reads slices. Slots without a sequence are greedy.
    Work as large as the vocabulary happens in memory that is kept: fresh megabytes from the system at every step would
    cost more than the arithmetic.

    Args:
        slots: how many.
        vocab_size: V.
        device: where the logits will be.
        likeliest: how the likeliest tokens are found.
    """

    def __init__(
        self,
        slots: int,
        vocab_size: int,
        device: torch.device | str | None = None,
        likeliest: Likeliest = likeliest,
    ) -> None:
        self._params: list[SamplingParams] = [_NEUTRAL] * slots
        self._vocab_size = vocab_size
        self._likeliest = likeliest
        self._inverse_temperature, self._top_p, self._log_min_p = torch.zeros(3, slots, 1, device=device)  # [slots, 1]
        self._greedy = torch.ones(slots, dtype=torch.bool, device=device)
        self._top_k = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self._seed = torch.zeros(slots, dtype=torch.int64, device=device)
        self._penalties = Penalties(slots, vocab_size, device)
        self._biases = Biases(slots, device)
        padded = -(-vocab_size // BLOCK) * BLOCK
        self._adjusted = torch.empty(slots, vocab_size, device=device)  # logits after penalties and biases
        self._scaled = torch.empty(slots, padded, device=device)  # then after temperature and filters
        self._ahead: Tensor | None = None  # the same two for several rows of one slot, made when first asked for
        for slot in range(slots):
            self.clear(slot)

    @torch.inference_mode()
    def set(
        self, slot: int, params: SamplingParams, seed: int, prompt: Sequence[int], generated: Sequence[int]
    ) -> None:
        """Give a slot to a sequence.

        Args:
            slot: which.
            params: how to choose its tokens.
            seed: of its random numbers (``params.seed`` may be ``None``; this may not).
            prompt: token ids that the repetition penalty counts as seen.
            generated: token ids of the completion so far, which every penalty counts.
        """
        self._params[slot] = params
        greedy = params.temperature < GREEDY_BELOW
        self._greedy[slot] = greedy
        self._inverse_temperature[slot] = 1.0 if greedy else 1.0 / params.temperature
        self._top_k[slot] = min(params.top_k or self._vocab_size, self._vocab_size)
        self._top_p[slot] = params.top_p
        self._log_min_p[slot] = math.log(params.min_p) if params.min_p else -math.inf
        self._seed[slot] = as_int64(seed)
        self._penalties.set(slot, params, prompt, generated)
        self._biases.set(slot, params.logit_bias)

    def clear(self, slot: int) -> None:
        """Take a slot back: greedy, no penalties, no biases."""
        self.set(slot, _NEUTRAL, 0, (), ())

    def has_penalties(self, slot: int) -> bool:
        """Whether the tokens chosen for a slot change how the next ones are chosen (penalties)."""
        return self._penalties.used(slice(slot, slot + 1))

    @torch.inference_mode()
    def sample(self, logits: Tensor, positions: Tensor, first: int = 0, *, ahead: bool = False) -> Sampled:
        """Choose a token for each row, and count it for the penalties.

        Args:
            logits: ``[R, V]`` float32; not changed.
            positions: the position each chosen token will take in its sequence, ``[R]`` int64.
            first: the slot of row 0; row i is slot ``first + i``.
            ahead: every row is slot ``first`` instead, at several positions; not for a slot that ``has_penalties``.
        """
        rows = slice(first, first + (1 if ahead else len(logits)))
        adjusted, scaled = self._memory(len(logits)) if ahead else (self._adjusted[rows], self._scaled[rows])
        params = self._params[rows]
        scores = logits
        if self._penalties.used(rows) or self._biases.used(rows):
            scores = adjusted.copy_(logits)
            self._penalties.apply(scores, rows)
            self._biases.apply(scores, rows)
        best, best_token = self._likeliest(scores)  # [R] each
        drawing = any(p.temperature >= GREEDY_BELOW for p in params)
        candidates = self._candidates(params) if drawing else 0
        while True:
            tokens, enough = best_token, None
            if drawing:
                self._scale(scores, best, rows, scaled)
                enough = self._filter(scaled, rows, candidates)
                drawn = draw(scaled.exp_(), uniform(self._seed[rows], positions))
                tokens = torch.where(self._greedy[rows] | (best_token < 0), best_token, drawn)
            sampled = self._read(logits, tokens, enough, params)
            if sampled is not None:
                break
            candidates *= 16
        self._penalties.count(tokens, rows)
        return sampled

    def _memory(self, rows: int) -> tuple[Tensor, Tensor]:
        """Kept memory for several rows of one slot."""
        if self._ahead is None or self._ahead.shape[1] < rows:
            self._ahead = self._scaled.new_empty(2, rows, self._scaled.shape[1])
        return self._ahead[0, :rows, : self._vocab_size], self._ahead[1, :rows]

    def _scale(self, scores: Tensor, best: Tensor, rows: slice, scaled: Tensor) -> None:
        """Subtract the best score and divide by temperature, into ``scaled``; the padding is -inf."""
        torch.sub(scores, best[:, None], out=scaled[:, : self._vocab_size])
        scaled[:, self._vocab_size :] = -torch.inf
        scaled.mul_(self._inverse_temperature[rows])

    def _candidates(self, params: Sequence[SamplingParams]) -> int:
        """How many of the likeliest tokens top-k and top-p look at first; 0 where neither filters."""
        largest_k = max(p.top_k if p.top_k < self._vocab_size else 0 for p in params)
        return max(largest_k, FIRST_CANDIDATES if any(p.top_p < 1 for p in params) else 0)

    def _filter(self, scaled: Tensor, rows: slice, candidates: int) -> Tensor | None:
        """Set to -inf what top-k, top-p and min-p leave out of ``scaled`` ``[R, V]``, whose maxima are 0.

        Returns:
            Whether the candidates were enough, a bool on the device; ``None`` where they cannot but be.
        """
        cutoff, enough = self._log_min_p[rows], None  # [R, 1]
        if candidates:
            top, enough = top_cutoff(scaled, self._top_k[rows], self._top_p[rows], candidates)
            cutoff = torch.maximum(cutoff, top)
        if candidates or any(p.min_p for p in self._params[rows]):
            scaled.masked_fill_(scaled < cutoff, -torch.inf)
        return enough

    def _read(
        self, logits: Tensor, tokens: Tensor, enough: Tensor | None, params: Sequence[SamplingParams]
    ) -> Sampled | None:
        """Everything the host wants to know, in the one read of a step; ``None`` if the candidates were not enough."""
        wanted = [p.logprobs for p in params if p.logprobs is not None]
        if not wanted and enough is None:
            return Sampled(tokens.tolist(), [], [], [])
        columns = [tokens[:, None].double()]  # float64 holds token ids and float32 numbers exactly
        if enough is not None:
            columns.append(enough.double().expand(len(tokens), 1))
        if wanted:
            total = logits.logsumexp(dim=-1, keepdim=True)  # [R, 1]
            top = logits.topk(min(max(wanted), self._vocab_size), dim=-1)
            columns += [(logits.gather(1, tokens.clamp(min=0)[:, None]) - total).double()]
            columns += [top.indices.double(), (top.values - total).double()]
        read: Any = torch.cat(columns, dim=1).tolist()
        if enough is not None and not all(row.pop(1) for row in read):
            return None
        chosen = [int(row[0]) for row in read]
        if not wanted:
            return Sampled(chosen, [], [], [])
        middle = 2 + top.indices.shape[1]
        return Sampled(
            chosen,
            [row[1] for row in read],
            [[int(token) for token in row[2:middle]] for row in read],
            [row[middle:] for row in read],
        )


def top_cutoff(scaled: Tensor, top_k: Tensor, top_p: Tensor, candidates: int) -> tuple[Tensor, Tensor | None]:
    """The score of the last token that top-k and top-p keep.

    Top-p keeps the likeliest of the k tokens until they hold ``top_p`` of the k tokens' probability together. Sorting a
    whole vocabulary to keep a few dozen tokens is dear; a short list of candidates nearly always suffices. Whether it
    did is said with the result, not asked here: on a GPU that would make the host wait.

    Args:
        scaled: scores, ``[R, V]``, the likeliest of each row at 0.
        top_k: ``[R, 1]`` int64; V keeps everything.
        top_p: ``[R, 1]``; 1 keeps everything.
        candidates: how many of the likeliest tokens to look at; not less than any k that filters.

    Returns:
        The score, ``[R, 1]``, -inf where nothing is cut; and a bool on the device, whether the candidates were enough
        for every row: if not, call again with more. ``None`` when all tokens were candidates.
    """
    vocab_size = scaled.shape[-1]
    total = scaled.logsumexp(dim=-1, keepdim=True).exp()  # [R, 1]
    top = scaled.topk(min(candidates, vocab_size), dim=-1).values  # [R, K], falling
    inside = torch.arange(top.shape[1], device=top.device) < top_k  # [R, K]
    weights = torch.where(inside, top.exp(), 0.0)
    some = top_k <= top.shape[1]  # [R, 1]: top-k is at work
    mass = top_p * torch.where(some, weights.sum(dim=-1, keepdim=True), total)
    before = weights.cumsum(dim=-1) - weights  # weight of the tokens likelier than this one
    keep = (inside & ((before < mass) | (top_p >= 1))).sum(dim=-1, keepdim=True).clamp(min=1)  # [R, 1]
    cutoff = torch.where(~some & (top_p >= 1), -torch.inf, top.gather(1, keep - 1))
    if top.shape[1] == vocab_size:
        return cutoff, None
    return cutoff, (some | (keep < top.shape[1]) | (top_p >= 1)).all()
