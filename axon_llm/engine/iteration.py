"""One scheduling iteration, carried out: what the scheduler decides, the runner computes and the sampler chooses.

It knows sequences by their completions, and tells what happened as events. It does not know who asked, or where the
events go: that is ``engine.py``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import torch

from axon_llm.engine.completion import Completion
from axon_llm.engine.events import FinishReason, TokenEvent
from axon_llm.engine.runner import Runner
from axon_llm.engine.sampling import Sampled, Sampler
from axon_llm.engine.scheduler import Scheduler
from axon_llm.engine.speculate import Drafter


class Iteration:
    """The sequences that wait and run, and the step that takes all of them one token further.

    Args:
        runner: the model's steps and the cache.
        sampler: with as many slots.
        scheduler: over the same slots.
        speculate: tokens to draft ahead while a single sequence decodes; 0 for none (see ``speculate.py``).

    Attributes:
        scheduler: as given.
        sequences: those that wait or run, by request id.
        counters: what happened so far; see ``EngineStats``.
    """

    def __init__(self, runner: Runner, sampler: Sampler, scheduler: Scheduler, speculate: int = 0) -> None:
        self._runner, self._sampler, self._speculate = runner, sampler, speculate
        self.scheduler = scheduler
        self.sequences: dict[str, Completion] = {}
        self.counters: Counter[str] = Counter()

    def add(self, sequence: Completion) -> None:
        """Put a sequence in line."""
        self.sequences[sequence.request.id] = sequence
        self.scheduler.waiting.append(sequence)

    @torch.inference_mode()
    def run(self) -> Iterator[TokenEvent]:
        """End what must end, admit, one decode step for all, one share of prefill; events as they happen."""
        self.counters["steps"] += 1
        yield from self._end_early()
        for sequence in self.scheduler.admit():
            self.counters["prompt_tokens"] += len(sequence.request.prompt)
            self.counters["cached_tokens"] += sequence.cached_tokens
        for sequence, left in self.scheduler.compact():
            self._sampler.clear(left)
            if sequence.decoding:
                self._set_sampler(sequence)
        yield from self._decode()
        yield from self._prefill()

    def _end_early(self) -> Iterator[TokenEvent]:
        """End what was cancelled, what is too late, and what turns out to be complete already."""
        now = time.time()
        for sequence in list(self.sequences.values()):
            deadline = sequence.request.deadline_unix_s
            if sequence.cancelled:
                yield self.end(sequence, "cancelled")
            elif deadline is not None and now > deadline:
                yield self.end(sequence, "error", "the deadline passed before the completion was finished")
            elif sequence.slot is None and (complete := sequence.complete):
                yield self.end(sequence, complete)

    def _decode(self) -> Iterator[TokenEvent]:
        batch = self.scheduler.batch()
        if batch is None:
            return
        self.counters["decode_steps"] += 1
        if self._speculate and len(batch.members) == 1:
            sequence = batch.members[0][1]
            if drafts := self._draft(sequence):
                yield from self._verify(sequence, drafts)
                return
        logits = self._runner.decode(batch.tokens, batch.positions, batch.length)
        for row, sequence in batch.members:
            assert sequence.slot is not None
            sequence.slot.tokens[batch.positions[row] :] = [batch.tokens[row]]
        yield from self._hand_out(self._sampler.sample(logits, self._runner.next_positions), batch.members)

    def _draft(self, sequence: Completion) -> list[int]:
        """Drafts for a sequence that decodes alone, no more than it and its slot have room for."""
        if sequence.drafter is None:
            sequence.drafter = Drafter(sequence.tokens, self._speculate)
        left = sequence.request.params.max_tokens - sequence.count - 1
        room = self._runner.cache.max_seq_len - len(sequence.tokens)
        return sequence.drafter.draft(sequence.tokens, min(left, room))

    def _verify(self, sequence: Completion, drafts: list[int]) -> Iterator[TokenEvent]:
        """Run the newest token and the drafts in one pass, and choose at each position for as long as drafts hold."""
        slot, drafter, sampler = sequence.slot, sequence.drafter, self._sampler
        assert slot is not None
        assert drafter is not None
        start, accepted = len(sequence.tokens) - 1, 0
        tokens = [*sequence.tokens, *drafts]
        logits = self._runner.verify(slot.index, tokens, start)  # [1 + drafts, V]
        at = self._runner.next_positions
        self.counters["draft_tokens"] += len(drafts)
        # All at once, unless what is chosen at one position changes how the next is chosen.
        chosen = None if sampler.has_penalties(slot.index) else sampler.sample(logits, at, slot.index, ahead=True)
        for index in range(len(drafts) + 1):
            slot.tokens[start + index :] = [tokens[start + index]]
            here = slice(index, index + 1)
            sampled = sampler.sample(logits[here], at[here], slot.index) if chosen is None else chosen
            yield from self._hand_out(sampled, [(0 if chosen is None else index, sequence)])
            if sequence.finish_reason or index == len(drafts) or sequence.tokens[-1] != drafts[index]:
                break
            accepted += 1
        self.counters["accepted_tokens"] += accepted
        drafter.record(len(drafts), accepted)

    def _prefill(self) -> Iterator[TokenEvent]:
        for sequence, start, end in self.scheduler.chunks():
            slot = sequence.slot
            assert slot is not None
            self.counters["prefill_chunks"] += 1
            logits = self._runner.prefill(slot.index, sequence.tokens, start, end)
            slot.tokens[start:] = sequence.tokens[start:end]
            if end == len(sequence.tokens):
                sequence.decoding = True
                self._set_sampler(sequence)
                sampled = self._sampler.sample(logits, self._runner.next_positions, slot.index)
                yield from self._hand_out(sampled, [(0, sequence)])

    def _set_sampler(self, sequence: Completion) -> None:
        assert sequence.slot is not None
        prompt = sequence.request.prompt
        self._sampler.set(
            sequence.slot.index, sequence.request.params, sequence.seed, prompt, sequence.tokens[len(prompt) :]
        )

    def _hand_out(self, sampled: Sampled, members: list[tuple[int, Completion]]) -> Iterator[TokenEvent]:
        """Give each member the token of its row."""
        for row, sequence in members:
            token = sampled.tokens[row]
            if token < 0:
                assert sequence.slot is not None
                self.scheduler.slot_table.forget(sequence.slot)
                yield self.end(sequence, "error", "the model's output is not a number")
                continue
            self.counters["generated_tokens"] += 1
            event = sequence.take(token, sampled, row)
            if event.finish_reason:
                self._retire(sequence, event.finish_reason)
            yield event

    def end(self, sequence: Completion, reason: FinishReason, error: str | None = None) -> TokenEvent:
        """End a sequence without a further token, and return its last event."""
        event = sequence.end(reason, error)
        self._retire(sequence, reason)
        return event

    def _retire(self, sequence: Completion, reason: FinishReason) -> None:
        self.scheduler.remove(sequence)
        if sequence.slot is not None:
            self._sampler.clear(sequence.slot.index)
        del self.sequences[sequence.request.id]
        self.counters[f"finished_{reason}"] += 1
