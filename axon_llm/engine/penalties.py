"""What is added to or taken from the logits of single tokens: penalties for tokens seen before, and biases.

Both touch few of the vocabulary's entries: the tokens a sequence holds, the tokens a bias names. So each slot keeps a
list of ids, and a step reads and writes those entries alone. The tables are made when the first sequence asks for them;
a server whose users never do pays nothing.

Legend: R rows · N listed ids · V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from axon_llm.engine.params import SamplingParams


class Penalties:
    """Repetition, frequency and presence penalties of all slots.

    Args:
        slots: how many.
        vocab_size: V.
        device: where the logits will be.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str | None = None) -> None:
        self._shape, self._device = (slots, vocab_size), device
        self._used = [False] * slots
        self._lengths = [0] * slots  # ids listed
        self._tables: _Tables | None = None

    def set(self, slot: int, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """Start a slot's tables for a sequence; a sequence without penalties only switches them off."""
        factors = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        uses = factors != (1.0, 0.0, 0.0)
        if not uses and not self._used[slot]:
            return
        if self._tables is None:
            self._tables = _Tables(*self._shape, self._device)
        ids = [*prompt, *generated] if uses else []
        self._used[slot], self._lengths[slot] = uses, len(ids)
        self._tables.set(slot, factors, ids, len(prompt), room=len(prompt) + params.max_tokens, counting=uses)

    def used(self, rows: slice) -> bool:
        """Whether any of these slots has a penalty."""
        return any(self._used[rows])

    def apply(self, scores: Tensor, rows: slice) -> None:
        """Change ``scores`` ``[R, V]`` by the penalties of their slots.

        Repetition as in Keskar et al., 2019 ("CTRL") and transformers: a positive logit is divided, a negative one
        multiplied. Frequency and presence as in OpenAI's interface: subtracted, per occurrence and once.
        """
        if self._tables is None or not self.used(rows):
            return
        tables = self._tables
        ids = tables.ids[rows, : max(self._lengths[rows])]  # [R, N]; an id listed twice is given the same value twice
        counts = tables.counts[rows].gather(1, ids)
        repetition, frequency, presence = tables.factors[rows, :, None].unbind(1)  # [R, 1] each
        old = scores.gather(1, ids)
        new = torch.where(old > 0, old / repetition, old * repetition)
        scores.scatter_(1, ids, new - frequency * counts - presence * (counts > 0))

    def count(self, tokens: Tensor, rows: slice) -> None:
        """Remember the tokens ``[R]`` just chosen, in slots that have a penalty."""
        if self._tables is None or not self.used(rows):
            return
        self._tables.append(tokens.clamp(min=0), rows)
        self._lengths[rows] = [n + used for n, used in zip(self._lengths[rows], self._used[rows], strict=True)]


class _Tables:
    """The numbers behind it.

    Attributes:
        factors: repetition, frequency and presence penalty, ``[slots, 3]``; neutral without a sequence.
        counts: how often the completion holds each token, ``[slots, V]``.
        ids: the tokens of prompt and completion in order, then the first of them over and over, ``[slots, room]``.
        end: how many of them are real, ``[slots]``.
        counting: 1 where a sequence with a penalty lives, else 0, ``[slots]``.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str | None) -> None:
        self.factors = torch.tensor([[1.0, 0.0, 0.0]], device=device).repeat(slots, 1)
        self.counts = torch.zeros(slots, vocab_size, device=device)
        self.ids = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self.end = torch.zeros(slots, dtype=torch.int64, device=device)
        self.counting = torch.zeros(slots, dtype=torch.int64, device=device)

    def set(
        self, slot: int, factors: Sequence[float], ids: Sequence[int], prompt_length: int, room: int, counting: bool
    ) -> None:
        device = self.counts.device
        if room > self.ids.shape[1]:
            self.ids = torch.cat((self.ids, self.ids[:, :1].repeat(1, room - self.ids.shape[1])), dim=1)
        known = torch.tensor(ids, dtype=torch.int64, device=device)
        self.factors[slot] = torch.tensor(factors, device=device)
        self.counts[slot] = torch.bincount(known[prompt_length:], minlength=self.counts.shape[1])
        self.ids[slot] = ids[0] if ids else 0
        self.ids[slot, : len(ids)] = known
        self.end[slot] = len(ids)
        self.counting[slot] = int(counting)

    def append(self, tokens: Tensor, rows: slice) -> None:
        """List the tokens ``[R]``; rows that do not count write theirs where nobody looks."""
        counting, end = self.counting[rows], self.end[rows]
        self.counts[rows].scatter_add_(1, tokens[:, None], counting[:, None].float())
        self.ids[rows].scatter_(1, end.clamp(max=self.ids.shape[1] - 1)[:, None], tokens[:, None])
        end += counting


class Biases:
    """``logit_bias`` of all slots.

    Args:
        slots: how many.
        device: where the logits will be.
    """

    def __init__(self, slots: int, device: torch.device | str | None = None) -> None:
        self._lengths = [0] * slots
        self._ids = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self._values = torch.zeros(slots, 1, device=device)

    def set(self, slot: int, bias: Mapping[int, float]) -> None:
        """Replace a slot's biases."""
        if not bias and not self._lengths[slot]:
            return
        self._lengths[slot] = len(bias)
        if (missing := len(bias) - self._ids.shape[1]) > 0:
            self._ids = torch.nn.functional.pad(self._ids, (0, missing))
            self._values = torch.nn.functional.pad(self._values, (0, missing))
        self._ids[slot], self._values[slot] = 0, 0.0
        self._ids[slot, : len(bias)] = torch.tensor(list(bias), dtype=torch.int64, device=self._ids.device)
        self._values[slot, : len(bias)] = torch.tensor(list(bias.values()), device=self._ids.device)

    def used(self, rows: slice) -> bool:
        """Whether any of these slots has a bias."""
        return any(self._lengths[rows])

    def apply(self, scores: Tensor, rows: slice) -> None:
        """Add their biases to ``scores`` ``[R, V]``; those of a single slot to every row."""
        if self.used(rows):
            ids, values = self._ids[rows], self._values[rows]
            scores.scatter_add_(1, ids.expand(len(scores), -1), values.expand(len(scores), -1))
