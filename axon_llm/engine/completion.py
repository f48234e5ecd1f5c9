"""One request on its way through the engine: its tokens, its text, its clock, and the events that tell of them.

The tokens here are those *known*; the tokens in the slot are those whose keys and values are in the cache. The
difference is the work that is left: more than one token means prefill, one means decode.
"""

from __future__ import annotations

import secrets
import time

from axon_llm.engine.events import FinishReason, Request, Timings, TokenEvent, Usage
from axon_llm.engine.sampling import Sampled
from axon_llm.engine.slots import Slot
from axon_llm.engine.speculate import Drafter
from axon_llm.engine.stop import TextStream
from axon_llm.tokenizer import StreamDetokenizer, Tokenizer


class Completion:
    """The state of one request.

    Args:
        request: what was asked. Tokens it has generated before are replayed into the text.
        seed: of its random numbers.
        text: fresh.
        stop_tokens: token ids that end it.

    Attributes:
        tokens: prompt and completion so far.
        slot: where its keys and values are, once it runs.
        decoding: its prompt has been prefilled; it takes part in decode steps.
        cached_tokens: prompt tokens that the slot held already.
        cancelled: somebody asked for its end.
        drafter: drafts its next tokens, where the engine speculates.
        finish_reason: why it ended; ``None`` while it lives.
    """

    @classmethod
    def of(cls, request: Request, tokenizer: Tokenizer) -> Completion:
        """The state that a request begins with: a seed if it has none, and what it stops at."""
        params = request.params
        seed = secrets.randbits(63) if params.seed is None else params.seed
        named = [token for stop in params.stop if (token := tokenizer.special_id(stop)) is not None]
        stop_tokens = frozenset({*params.stop_token_ids, *named})
        if not params.ignore_eos:
            stop_tokens |= tokenizer.eos_token_ids
        return cls(request, seed, TextStream(StreamDetokenizer(tokenizer), params.stop), stop_tokens)

    def __init__(self, request: Request, seed: int, text: TextStream, stop_tokens: frozenset[int]) -> None:
        self.request, self.seed = request, seed
        self.tokens = [*request.prompt, *request.generated]
        self.slot: Slot | None = None
        self.decoding = False
        self.cached_tokens = 0
        self.cancelled = False
        self.drafter: Drafter | None = None
        self.finish_reason: FinishReason | None = None
        self._text, self._stop_tokens = text, stop_tokens
        self._started_at: float | None = None
        self._first_token_at = self._last_token_at = 0.0
        self._new_tokens = 0
        for token in request.generated:
            if token not in stop_tokens:
                text.push(token)

    @property
    def count(self) -> int:
        """Tokens of the completion so far, those generated elsewhere included."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def complete(self) -> FinishReason | None:
        """Why nothing is left to generate, where that is so from the start: all of it had been generated elsewhere."""
        if self._text.stopped or not self._stop_tokens.isdisjoint(self.request.generated):
            return "stop"
        return "length" if self.count >= self.request.params.max_tokens else None

    def start(self, slot: Slot | None = None, cached: int = 0) -> None:
        """Its turn has come: take a slot that holds the first ``cached`` tokens (none, where there is no cache)."""
        self.slot = slot
        self.cached_tokens = min(cached, len(self.request.prompt))
        self._started_at = time.monotonic()

    def take(self, token: int, sampled: Sampled, row: int) -> TokenEvent:
        """Add a token that was chosen, and say so.

        Args:
            token: its id.
            sampled: where it came from, for log-probabilities.
            row: its row there.
        """
        index = self.count
        self.tokens.append(token)
        self._new_tokens += 1
        self._last_token_at = time.monotonic()
        if self._new_tokens == 1:
            self._first_token_at = self._last_token_at
        if token in self._stop_tokens:
            text, self.finish_reason = self._text.finish(), "stop"
        else:
            text = self._text.push(token)
            if not self._text.stopped and self.count == self.request.params.max_tokens:
                self.finish_reason = "length"
                text += self._text.finish()
            if self._text.stopped:
                self.finish_reason = "stop"
        wanted = self.request.params.logprobs
        return TokenEvent(
            request_id=self.request.id,
            index=index,
            token=token,
            text=text,
            logprob=None if wanted is None else sampled.logprobs[row],
            top_logprobs=() if wanted is None else sampled.alternatives(row, wanted),
            finish_reason=self.finish_reason,
            usage=self._usage() if self.finish_reason else None,
            timings=self._timings() if self.finish_reason else None,
        )

    def end(self, reason: FinishReason, error: str | None = None) -> TokenEvent:
        """End it without a further token, and say so; text that was held back comes out."""
        self.finish_reason = reason
        return TokenEvent(
            request_id=self.request.id,
            index=self.count,
            token=None,
            text="" if self._text.stopped else self._text.finish(),
            finish_reason=reason,
            usage=self._usage(),
            timings=self._timings(),
            error=error,
        )

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt), completion_tokens=self.count, cached_tokens=self.cached_tokens
        )

    def _timings(self) -> Timings:
        now, submitted = time.monotonic(), self.request.submitted_at
        gaps = self._new_tokens - 1
        return Timings(
            queue_s=(now if self._started_at is None else self._started_at) - submitted,
            ttft_s=self._first_token_at - submitted if self._new_tokens else None,
            tpot_s=(self._last_token_at - self._first_token_at) / gaps if gaps > 0 else None,
            total_s=now - submitted,
        )
