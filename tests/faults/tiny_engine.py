"""A deterministic engine without a model: the fault is what is tested, not the arithmetic.

Token ``i`` is a hash of (seed, i, the tokens before it), so a continuation is right only if it starts from the right
tokens. Ten token ids spell words, some of multi-byte characters. A prompt that begins with ``POISON`` kills the
process that decodes it.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from dataclasses import dataclass

from axon_llm.engine.events import Request, Timings, TokenEvent, Usage
from axon_llm.errors import RequestError
from axon_llm.serving.wire import Job, ModelCard

MODEL = "tiny-hash"
EOS = 0
VOCABULARY = ("", " alpha", " bravo", " čtyři", " delta", " écho", " 五", " golf", " hôtel", " 印度")
POISON = "POISON"
MAX_SEQ_LEN = 4096


def text_of(token: int) -> str:
    """Return the text of a token."""
    return VOCABULARY[token]


def spell(token: int) -> tuple[str, bytes]:
    """Return what a token is called, and its bytes."""
    return text_of(token), text_of(token).encode()


def encode(job: Job) -> tuple[int, ...]:
    """Return the prompt of a job as its bytes."""
    if job.prompt_tokens is not None:
        return job.prompt_tokens
    text = job.prompt if job.prompt is not None else "\n".join(m.content for m in job.messages or ())
    return tuple(text.encode())


def next_token(seed: int, prompt: tuple[int, ...], generated: tuple[int, ...]) -> int:
    """Return the one token that may follow."""
    told = f"{seed}|{prompt}|{len(generated)}|{generated}".encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=4).digest(), "big") % (len(VOCABULARY) - 1) + 1


def reference(job: Job) -> list[tuple[int, str]]:
    """Return the tokens and texts that the job must end up with, whatever happens on the way."""
    prompt, generated = encode(job), ()
    for _ in range(job.sampling.max_tokens):
        generated = (*generated, next_token(job.sampling.seed, prompt, generated))
    return [(token, text_of(token)) for token in generated]


def model_card() -> ModelCard:
    """Return what the worker announces."""
    return ModelCard(
        id=MODEL, created_unix_s=0, max_seq_len=MAX_SEQ_LEN, vocab_size=len(VOCABULARY), has_chat_template=True
    )


@dataclass(frozen=True)
class _Stats:
    running: int
    waiting: int
    slots: int
    cache_bytes: int = 0
    cache_bytes_in_use: int = 0


class TinyEngine:
    """Follows the contract of ``Engine``: submit, step, cancel, has_work, stats."""

    max_seq_len = MAX_SEQ_LEN

    def __init__(self, slots: int = 4, step_s: float = 0.0) -> None:
        self._slots = slots
        self._step_s = step_s
        self._requests: dict[str, tuple[Request, list[int]]] = {}
        self._cancelled: set[str] = set()

    def submit(self, request: Request) -> None:
        if len(request.prompt) + request.params.max_tokens > MAX_SEQ_LEN:
            raise RequestError("too long", code="context_length_exceeded", param="messages")
        self._requests[request.id] = (request, list(request.generated))

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)

    def has_work(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[TokenEvent]:
        if self._step_s:
            time.sleep(self._step_s)
        events = []
        for request_id in list(self._requests)[: self._slots]:
            request, generated = self._requests[request_id]
            if bytes(t % 256 for t in request.prompt[: len(POISON)]) == POISON.encode() and len(generated) >= 3:
                os.kill(os.getpid(), signal.SIGKILL)
            finish = None
            token: int | None = None
            if request_id in self._cancelled:
                finish = "cancelled"
            else:
                token = next_token(request.params.seed or 0, request.prompt, tuple(generated))
                generated.append(token)
                if len(generated) >= request.params.max_tokens:
                    finish = "length"
            events.append(
                TokenEvent(
                    request_id=request_id,
                    index=len(generated) - (token is not None),
                    token=token,
                    text="" if token is None else text_of(token),
                    finish_reason=finish,
                    usage=Usage(prompt_tokens=len(request.prompt), completion_tokens=len(generated))
                    if finish
                    else None,
                    timings=Timings(queue_s=0.0, ttft_s=0.0, tpot_s=0.0, total_s=0.0) if finish else None,
                )
            )
            if finish:
                del self._requests[request_id]
        self._cancelled &= set(self._requests)
        return events

    def stats(self) -> _Stats:
        running = min(len(self._requests), self._slots)
        return _Stats(running=running, waiting=len(self._requests) - running, slots=self._slots)
