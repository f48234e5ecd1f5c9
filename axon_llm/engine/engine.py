"""The engine: requests in, token events out, one scheduling iteration per call of ``step``.

It checks requests, hands each one's events to whoever follows it, and leaves the work to ``iteration.py``. It belongs
to one thread, never blocks on anything but the model, and knows nothing of queues, HTTP or terminals.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from axon_llm.cache import KVCache
from axon_llm.engine.admission import validate
from axon_llm.engine.completion import Completion
from axon_llm.engine.events import Request, TokenEvent
from axon_llm.engine.iteration import Iteration
from axon_llm.engine.params import SamplingParams
from axon_llm.engine.runner import Runner, chunk_for
from axon_llm.engine.sampling import Sampler, likeliest_of
from axon_llm.engine.scheduler import Scheduler
from axon_llm.engine.slots import SlotTable
from axon_llm.engine.stats import EngineStats
from axon_llm.errors import UsageError
from axon_llm.model import Transformer
from axon_llm.tokenizer import Tokenizer


class Engine:
    """Continuous batching over one model and one static KV cache.

    Args:
        model: the decoder, with whatever parts replaced by fast ones.
        tokenizer: of the same checkpoint.
        slots: sequences that can run at once.
        max_seq_len: positions per slot; the model's own limit when omitted.
        cache_dtype: element type of the cache; the model's when omitted.
        compile: compile the decode step, a graph per bucketed shape; on CUDA it is captured, compiled or not.
        prefill_chunk: prompt tokens per step while nobody is decoding; sized to the device when omitted.
        interleave_chunk: prompt tokens per step while somebody is: bounds what a new prompt delays others by. A quarter
            of what the device's size asks for when omitted.
        speculate: draft this many tokens ahead while one sequence decodes alone, and verify them in one pass; 0 for
            not. Changes no answer but where rounding decides (see ``speculate.py``).

    Attributes:
        model: as given.
        tokenizer: as given.
        runner: the model's steps and the cache.

    Raises:
        UsageError: ``max_seq_len`` is not positive, or above the model's own limit.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        slots: int = 1,
        max_seq_len: int | None = None,
        cache_dtype: torch.dtype | None = None,
        compile: bool = False,
        prefill_chunk: int | None = None,
        interleave_chunk: int | None = None,
        speculate: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        limit = model.config.max_position_embeddings
        max_seq_len = limit if max_seq_len is None else max_seq_len
        if not 1 <= max_seq_len <= limit:
            raise UsageError(f"max_seq_len must be from 1 to {limit}, the model's context, not {max_seq_len}")
        self.runner = Runner(
            model,
            slots=slots,
            max_seq_len=max_seq_len,
            dtype=cache_dtype,
            prefill_chunk=prefill_chunk,
            compile=compile,
            max_drafts=speculate,
        )
        sampler = Sampler(slots, model.config.vocab_size, self.runner.device, likeliest_of(model))
        scheduler = Scheduler(
            SlotTable(slots, self.runner),
            self.runner.buckets,
            prefill_chunk=prefill_chunk or chunk_for(self.runner.device),
            interleave_chunk=interleave_chunk or chunk_for(self.runner.device) // 4,
        )
        self._iteration = Iteration(self.runner, sampler, scheduler, speculate)
        self._streams: dict[str, deque[TokenEvent]] = {}  # events of requests that generate() follows
        self._undelivered: list[TokenEvent] = []  # events of all others

    @property
    def cache(self) -> KVCache:
        """The KV cache."""
        return self.runner.cache

    @property
    def max_seq_len(self) -> int:
        """Most tokens of prompt and completion together."""
        return self.runner.cache.max_seq_len

    def submit(self, request: Request) -> None:
        """Put a request in line. It waits for a free slot behind those submitted before it.

        Raises:
            RequestError: it can never be served; nothing was changed.
        """
        self._validate(request)
        self._iteration.add(Completion.of(request, self.tokenizer))

    def cancel(self, request_id: str) -> None:
        """Ask for a request's end; its last event comes from the next ``step``.

        An unknown id is ignored: the request may have ended by itself a moment ago.
        """
        if request_id in self._iteration.sequences:
            self._iteration.sequences[request_id].cancelled = True

    def has_work(self) -> bool:
        """Whether ``step`` has something to do or to deliver."""
        return bool(self._iteration.sequences or self._undelivered)

    def step(self) -> list[TokenEvent]:
        """One scheduling iteration: end what must end, admit, one decode step for all, one share of prefill.

        Returns:
            The events it caused, in order; those of a request that ``generate`` follows go there instead. Should it
            raise, the events of before are not lost: the next call returns them.
        """
        self._advance()
        events, self._undelivered = self._undelivered, []
        return events

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        generated: Sequence[int] = (),
        deadline_unix_s: float | None = None,
    ) -> Iterator[TokenEvent]:
        """Generate a completion, yielding an event for each token. Closing the iterator cancels the request.

        Several may be open at once: they share the decode steps.

        Args:
            prompt: text, or token ids.
            params: how to choose tokens and when to stop.
            request_id: to find it by; made up when omitted.
            generated: tokens generated before, after which to continue.
            deadline_unix_s: end with an error at the first step after this time.

        Raises:
            RequestError: it can never be served. Raised here, not when the iterator is first used, although the request
                gets in line only then.
        """
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        request = Request(
            id=request_id or secrets.token_hex(8),
            prompt=tuple(tokens),
            params=params or SamplingParams(),
            generated=tuple(generated),
            deadline_unix_s=deadline_unix_s,
        )
        self._validate(request)
        return self._follow(request)

    def warm_up(self, longest: int | None = None, progress: Callable[[int, int], None] | None = None) -> None:
        """Prepare every shape, so that no request waits for a compiler. What slots remember is lost.

        Args:
            longest: prepare for sequences of up to this many tokens only; for all that fit when omitted.
            progress: called after each shape with how many are done, and how many there are.

        Raises:
            UsageError: requests are running or waiting.
        """
        if self._iteration.sequences:
            raise UsageError("an engine is warmed up before requests come, or when none is left")
        self._iteration.scheduler.slot_table.forget_all()
        self.runner.warm_up(longest, progress)

    def stats(self) -> EngineStats:
        """What the engine holds now, and has done so far."""
        return EngineStats.of(self._iteration.scheduler, self.runner.cache, self._iteration.counters)

    def _validate(self, request: Request) -> None:
        validate(request, self.model.config.vocab_size, self.max_seq_len, known=self._iteration.sequences)

    def _advance(self) -> None:
        for event in self._iteration.run():
            self._streams.get(event.request_id, self._undelivered).append(event)

    def _follow(self, request: Request) -> Iterator[TokenEvent]:
        self.submit(request)
        stream: deque[TokenEvent] = deque()
        self._streams[request.id] = stream
        finished = False
        try:
            while not finished:
                while not stream:
                    self._advance()
                event = stream.popleft()
                finished = event.finish_reason is not None
                yield event
        finally:
            if self._streams.get(request.id) is stream:  # an id that has ended may be another's by now
                del self._streams[request.id]
                if not finished and request.id in self._iteration.sequences:  # the reader went away before the end
                    self._iteration.end(self._iteration.sequences[request.id], "cancelled")
