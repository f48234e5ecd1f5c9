"""What goes into the engine and what comes out of it. Standard library only."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from axon_llm.engine.params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to complete.

    Attributes:
        id: unique among the requests the engine holds.
        prompt: token ids, at least one.
        params: how to choose tokens and when to stop.
        generated: tokens already produced for this request, here or elsewhere: the engine continues after them, with
            the random numbers, text and stop strings it would have had without the interruption.
        deadline_unix_s: the request ends with an error at the first step after this time; ``None`` for never.
        cache_scope: keys and values are reused only between requests of the same scope. With a scope per tenant, nobody
            learns from ``cached_tokens`` or from the time to the first token what another tenant has asked.
        submitted_at: ``time.monotonic()`` when the user submitted it; TTFT and queue time count from here.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    generated: tuple[int, ...] = ()
    deadline_unix_s: float | None = None
    cache_scope: str = ""
    submitted_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens a request took.

    Attributes:
        prompt_tokens: in the prompt.
        completion_tokens: generated, the stop token included.
        cached_tokens: of the prompt, taken from a resident slot's KV cache instead of prefilled.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where a request's time went, in seconds.

    Attributes:
        queue_s: submit → start of prefill.
        ttft_s: submit → first token (time to first token).
        tpot_s: (last − first token) / (tokens − 1) (time per output token); ``None`` with fewer than two tokens.
        total_s: submit → end.
    """

    queue_s: float
    ttft_s: float | None
    tpot_s: float | None
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One token of one request, or its end.

    Attributes:
        request_id: whose.
        index: place in the completion, from 0, counting tokens generated before an interruption.
        token: the token id; ``None`` on an event that only ends the request (cancelled, error).
        text: what this token adds to the text. Always valid UTF-8: bytes of an unfinished character, and text that may
            turn out to be the beginning of a stop string, are held back until a later event.
        logprob: natural-log probability of the token, where asked for.
        top_logprobs: (token id, logprob) of the likeliest tokens, best first, where asked for.
        finish_reason: on the last event why it ended, else ``None``.
        usage: on the last event.
        timings: on the last event.
        error: on an event with ``finish_reason="error"``, the reason in one line.
    """

    request_id: str
    index: int
    token: int | None
    text: str = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    error: str | None = None
