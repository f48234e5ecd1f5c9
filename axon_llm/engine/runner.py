"""Running the model: a chunk of a prompt into one slot, or one token for many slots, always in one of a few shapes.

The runner owns the cache and knows tokens, positions and slots. It does not know requests, sampling or text: it turns
tokens into logits. Where asked, the decode step is replaced by one that is compiled (``compiled.py``), and on a GPU by
one that is captured (``captured.py``): one for each bucketed shape, made when first needed or by ``warm_up``.

Legend: R rows (the first R slots) · T tokens of each · V vocabulary

Read next: ``scheduler.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from axon_llm.cache import KVCache
from axon_llm.engine.buckets import Buckets, doubling
from axon_llm.engine.captured import CapturedStep
from axon_llm.engine.compiled import CompiledStep
from axon_llm.engine.inputs import Inputs, Numbers
from axon_llm.model import Transformer

Step = Callable[[Tensor, Tensor], Tensor]  # tokens [R, T], positions [R, T] → logits [R, T, V]
LARGE_GPU = 100  # multiprocessors: A100, H100 and the like


def chunk_for(device: torch.device) -> int:
    """Prompt tokens that keep a device busy: more in one pass no longer makes each of them cheaper."""
    if device.type != "cuda":
        return 512
    large = torch.cuda.get_device_properties(device).multi_processor_count >= LARGE_GPU
    return 2048 if large else 1024


def _skips_what_is_hidden(block: nn.Module) -> bool:
    """A layer's attention, replaced by a fast one, skips what its mask hides of a bfloat16 cache."""
    return any(getattr(part, "skips_hidden", False) for part in block.modules())


class Runner:
    """A model, its cache, and the steps that run the one over the other.

    Args:
        model: the decoder, with whatever parts replaced by fast ones.
        slots: sequences that can be resident at once.
        max_seq_len: positions of each.
        dtype: of the cache; the model's when omitted.
        prefill_chunk: the largest prefill chunk in tokens; sized to the device when omitted.
        compile: compile the decode step.
        capture: capture the decode step as a CUDA graph; by default where the device is a GPU, compiled or not.
        max_drafts: drafts that ``verify`` is given at most; where steps are captured, it is captured for that many and
            the newest token.

    Attributes:
        cache: the KV cache.
        buckets: the shapes in use.
        next_positions: for each row of the logits last returned, the position that a token chosen from it takes,
            on the device; valid as long as they are.
        compiled: the decode step is compiled: asked for, and so far possible.
        captured: the decode step is captured: asked for, and so far possible.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int,
        max_seq_len: int,
        dtype: torch.dtype | None = None,
        prefill_chunk: int | None = None,
        compile: bool = False,
        capture: bool | None = None,
        max_drafts: int = 0,
    ) -> None:
        weight = model.embed_tokens.weight
        self.model, self.device = model, weight.device
        self.cache = KVCache(
            model.config, slots=slots, max_seq_len=max_seq_len, device=self.device, dtype=dtype or weight.dtype
        )
        self.compiled = compile
        self.captured = self.device.type == "cuda" if capture is None else capture
        self._verify_size = 1 + max_drafts if max_drafts and self.captured else 0
        self._graph_pool: Any = torch.cuda.graph_pool_handle() if self.captured else None
        self._steps: dict[tuple[int, int, int], Step] = {}  # by rows, tokens and length
        self._inputs: dict[tuple[int, int], Inputs] = {}  # by rows and tokens
        self._static = compile or self.captured  # a shape costs something to make
        self.buckets = Buckets.choose(
            slots=slots,
            max_seq_len=max_seq_len,
            prefill_chunk=prefill_chunk or chunk_for(self.device),
            static=self._static,
            tail_is_free=self.cache.k.dtype == torch.bfloat16 and all(map(_skips_what_is_hidden, model.layers)),
        )
        self.next_positions: Tensor

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: Sequence[int], start: int, end: int) -> Tensor:
        """Run a chunk of a sequence through the model, into its slot.

        The chunk is padded to a bucketed length. Padding writes nonsense after the chunk, where nothing looks before
        the real tokens have been written over it. Where padding would run past the end of the slot, the chunk begins
        earlier instead and computes a few tokens again.

        Args:
            slot: which.
            tokens: the whole sequence; positions below ``start`` are in the cache already.
            start: position of the first token to run.
            end: position after the last one; at most ``prefill_chunk`` tokens.

        Returns:
            Logits after the chunk's last token, ``[1, V]`` float32.
        """
        size = self.buckets.chunks.at_least(end - start)
        self.next_positions = torch.tensor([end], device=self.device)
        start = min(start, self.cache.max_seq_len - size)
        last = torch.tensor([end - start - 1], device=self.device)
        return self._run_chunk(slot, [*tokens[start:end], *[0] * (size - (end - start))], start, last)[0]

    @torch.inference_mode()
    def verify(self, slot: int, tokens: Sequence[int], start: int) -> Tensor:
        """Run a sequence's newest token and the drafts after it through the model, into its slot, in one pass.

        Where steps are captured and the slot is the first, this one is too, for always the same number of tokens:
        padded as a prefill is, or begun earlier.

        Args:
            slot: which.
            tokens: the whole sequence, drafts included; positions below ``start`` are in the cache already.
            start: position of the newest token.

        Returns:
            Logits of every position from ``start`` on, ``[len(tokens) - start, V]`` float32, valid until the next call.
        """
        first, size = min(start, self.cache.max_seq_len - self._verify_size), self._verify_size
        if slot or first < 0 or len(tokens) - start > size:
            self.next_positions = torch.arange(start + 1, len(tokens) + 1, device=self.device)
            return self._run_chunk(slot, tokens[start:], start, None)[0]
        chunk = [*tokens[first:], *[0] * (first + size - len(tokens))]
        length = self.buckets.lengths.at_least(first + size)
        logits = self._run_step([chunk], [range(first, first + size)], length)
        here = slice(start - first, len(tokens) - first)
        self.next_positions = self.next_positions[here]
        return logits[0, here]

    def _run_chunk(self, slot: int, chunk: Sequence[int], start: int, logits_at: Tensor | None) -> Tensor:
        """Logits ``[1, T or 1, V]`` of a chunk of one sequence."""
        end = start + len(chunk)
        logits: Tensor = self.model(
            torch.tensor([list(chunk)], device=self.device),
            torch.arange(start, end, device=self.device)[None],
            self.cache.slot(slot).view(length=self.buckets.prefill_lengths.at_least(end)),
            logits_at=logits_at,
        )
        return logits

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], positions: Sequence[int], length: int) -> Tensor:
        """Run one token for each of the first R slots.

        Args:
            tokens: the newest token of each row; R is one of ``buckets.rows``.
            positions: the position it takes.
            length: positions that attention reads, one of ``buckets.lengths``, above every position.

        Returns:
            Logits ``[R, V]`` float32, valid until the next call.
        """
        return self._run_step([[token] for token in tokens], [[position] for position in positions], length)[:, 0]

    def _run_step(self, tokens: Numbers, positions: Numbers, length: int) -> Tensor:
        """Logits ``[R, T, V]`` of T tokens in each of the first R slots, by the step of that shape."""
        shape = (len(tokens), len(tokens[0]))
        if shape not in self._inputs:
            self._inputs[shape] = Inputs(*shape, self.device)
        if (*shape, length) not in self._steps:
            self._steps[*shape, length] = self._make_step(self.cache.view(slots=shape[0], length=length))
        given, at, self.next_positions = self._inputs[shape].put(tokens, positions)
        return self._steps[*shape, length](given, at)

    def _make_step(self, view: KVCache) -> Step:
        step: Step = CompiledStep(self.model, view, self._stop_compiling) if self.compiled else self._plain(view)
        return CapturedStep(step, self._graph_pool, self._stop_capturing) if self.captured else step

    def _plain(self, view: KVCache) -> Step:
        def plain(tokens: Tensor, positions: Tensor) -> Tensor:
            logits: Tensor = self.model(tokens, positions, view)
            return logits

        return plain

    # What is impossible for one shape is so for the next: one failure, one warning.

    def _stop_compiling(self) -> None:
        self.compiled = False

    def _stop_capturing(self) -> None:
        self.captured = False

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        self.cache.k[:, target, :, :length] = self.cache.k[:, source, :, :length]
        self.cache.v[:, target, :, :length] = self.cache.v[:, source, :, :length]

    @torch.inference_mode()
    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` positions of two slots, a layer at a time."""
        for tensor in (self.cache.k, self.cache.v):
            for layer in tensor[:, :, :, :length]:  # [B, Hkv, length, D]
                kept = layer[one].clone()
                layer[one] = layer[other]
                layer[other] = kept

    @torch.inference_mode()
    def erase(self, slot: int) -> None:
        """Zero a slot: masked positions are multiplied by 0, which does not help against NaN."""
        self.cache.k[:, slot].zero_()
        self.cache.v[:, slot].zero_()

    @torch.inference_mode()
    def warm_up(self, longest: int | None = None, progress: Callable[[int, int], None] | None = None) -> None:
        """Run every shape once, so that no request waits for a compiler. What the cache held is lost.

        Args:
            longest: prepare for sequences of up to this many tokens only; for all that fit when omitted.
            progress: called after each shape with how many are done, and how many there are.
        """
        longest = self.buckets.lengths.at_least(min(longest or self.cache.max_seq_len, self.cache.max_seq_len))
        prefills = [(0, 1)]
        if self.device.type == "cuda":  # kernels are made for each chunk, and for how many programs share the positions
            chunks = self.buckets.chunks.values
            prefills = [(0, size) for size in chunks]
            prefills += [(end - chunks[0], end) for end in doubling(chunks[0], longest)]
        for start, end in prefills:
            self.prefill(0, [0] * end, start, end)
        lengths = [length for length in self.buckets.lengths.values if length <= longest]
        shapes = [(rows, 1, length) for length in lengths for rows in self.buckets.rows.values]
        if self._verify_size:
            shapes += [(1, self._verify_size, length) for length in lengths if length >= self._verify_size]
        if not self._static:  # one shape warms them all
            shapes = shapes[:1]
        for done, (rows, count, length) in enumerate(shapes, 1):
            self._run_step([[0] * count] * rows, [range(count)] * rows, length)
            if progress is not None:
                progress(done, len(shapes))
