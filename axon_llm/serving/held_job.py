"""One job as a worker holds it: the message, the right to write, and every entry made or found so far.

All entries stay in memory until the job ends, so that a store that forgot some can be given them again. Knows nothing
of the broker or Redis. Next: ``worker.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from axon_llm.engine.events import Request, TokenEvent
from axon_llm.engine.params import SamplingParams
from axon_llm.serving.ports import Claim, Delivery, Emit
from axon_llm.serving.wire import (
    ErrorInfo,
    Job,
    LogEntry,
    Message,
    Terminal,
    TimingInfo,
    TopLogprob,
    Turn,
    UsageInfo,
)


@dataclass
class HeldJob:
    """A job that this worker decodes.

    Attributes:
        delivery: the message to acknowledge at the end; a later one replaces it when the job is adopted.
        fence: proof that this worker is the job's writer.
        stored: entries that are known to be in the store.
        abort: the error to end with once the engine has let go of the sequence.
    """

    job: Job
    delivery: Delivery
    fence: int
    attempt: int
    engine_id: str
    claimed_at: float
    entries: list[LogEntry] = field(default_factory=list)
    stored: int = 0
    renewed_at: float = 0.0
    cancelling: bool = False
    abort: ErrorInfo | None = None
    last_token_at: float | None = None

    @classmethod
    def of(cls, job: Job, delivery: Delivery, claim: Claim) -> HeldJob:
        """Take a job into hand after a successful claim."""
        now = time.monotonic()
        return cls(
            job=job,
            delivery=delivery,
            fence=claim.fence,
            attempt=claim.attempt,
            engine_id=f"{job.job_id}#{claim.fence}",
            claimed_at=now,
            entries=list(claim.entries),
            stored=len(claim.entries),
            renewed_at=now,
        )

    def adopt(self, claim: Claim, delivery: Delivery) -> bool:
        """Go on with what is held here after a new claim, if the log is the beginning of that.

        Returns:
            Whether it is. If not, nothing was changed: whoever held the job meanwhile has written something else.
        """
        log = [(entry.token, entry.text) for entry in claim.entries]
        if log != [(entry.token, entry.text) for entry in self.entries[: len(log)]]:
            return False
        self.delivery, self.fence, self.stored = delivery, claim.fence, len(log)
        self.attempt = max(self.attempt, claim.attempt)  # a store that has lost the job counts anew
        return True

    @property
    def ended(self) -> bool:
        """Whether the terminal entry exists, stored or not."""
        return bool(self.entries) and self.entries[-1].terminal is not None

    @property
    def past_deadline(self) -> bool:
        """Whether the job's time is up."""
        return time.time() > self.job.deadline_unix_s

    def request(self, prompt: tuple[int, ...], room: int) -> Request:
        """Return what the engine is asked: the prompt, and the tokens that are in the log already.

        ``room`` is the most tokens a sequence may have; a job that may shrink asks for no more than fits.
        """
        sampling = self.job.sampling
        max_tokens = sampling.max_tokens
        if self.job.shrink_to_fit:
            max_tokens = max(1, min(max_tokens, room - len(prompt)))
        return Request(
            id=self.engine_id,
            prompt=prompt,
            params=SamplingParams(**(sampling.model_dump() | {"max_tokens": max_tokens})),
            generated=tuple(entry.token for entry in self.entries if entry.token is not None),
            cache_scope=self.job.tenant,  # how much of a prompt was cached must tell nobody what others asked
            submitted_at=time.monotonic() - max(0.0, time.time() - self.job.created_at_unix_s),
        )

    def add(self, event: TokenEvent, spell: Callable[[int], tuple[str, bytes]]) -> None:
        """Turn an event of the engine into the next log entry; ``spell`` is that of ``Worker``."""
        terminal = None
        if event.finish_reason is not None:
            terminal = self._terminal(event)
        text, data = None, None
        if event.logprob is not None and event.token is not None:
            text, data = _spelling(event.token, spell)
        top = []
        for token, logprob in event.top_logprobs:
            name, own = _spelling(token, spell)
            top.append(TopLogprob(token=token, logprob=logprob, text=name, bytes=own))
        self.entries.append(
            LogEntry(
                seq=len(self.entries) + 1,
                token=event.token,
                text=event.text,
                logprob=event.logprob,
                token_text=text,
                token_bytes=data,
                top_logprobs=tuple(top),
                terminal=terminal,
            )
        )

    def end(self, terminal: Terminal) -> None:
        """End without the engine."""
        self.entries.append(LogEntry(seq=len(self.entries) + 1, terminal=terminal))

    def pending(self) -> Emit:
        """Return what the store has not got yet, with the turn to commit if the job is at its end."""
        return Emit(ref=self.job.ref, fence=self.fence, entries=tuple(self.entries[self.stored :]), turn=self._turn())

    def _turn(self) -> Turn | None:
        job = self.job
        terminal = self.entries[-1].terminal if self.entries else None
        if job.session_id is None or terminal is None or terminal.finish_reason not in ("stop", "length"):
            return None
        assert job.turn is not None
        assert job.messages is not None
        answer = Message(role="assistant", content="".join(entry.text for entry in self.entries))
        return Turn(
            turn=job.turn,
            job_id=job.job_id,
            messages=(*job.messages[len(job.messages) - job.new_messages :], answer),
            committed_at_unix_s=time.time(),
        )

    def _terminal(self, event: TokenEvent) -> Terminal:
        usage, timings = event.usage, event.timings
        error, reason = None, event.finish_reason
        assert reason is not None
        if reason == "error" or (reason == "cancelled" and self.abort is not None):
            reason = "error"
            error = self.abort or ErrorInfo(
                type="server_error",
                code="engine_error",
                message=event.error or "The engine gave up on this job.",
                http_status=500,
            )
        return Terminal(
            finish_reason=reason,
            attempts=self.attempt,
            error=error,
            usage=None
            if usage is None
            else UsageInfo(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
            ),
            timings=None
            if timings is None
            else TimingInfo(
                queue_s=timings.queue_s, ttft_s=timings.ttft_s, tpot_s=timings.tpot_s, total_s=timings.total_s
            ),
        )


def deadline_exceeded() -> ErrorInfo:
    """Return the error of a job that ran out of time."""
    return ErrorInfo(
        type="timeout_error",
        code="deadline_exceeded",
        message="The job was not finished before its deadline.",
        http_status=504,
    )


def _spelling(token: int, spell: Callable[[int], tuple[str, bytes]]) -> tuple[str, tuple[int, ...] | None]:
    """What a token is called, and its bytes where they are not that."""
    text, data = spell(token)
    return text, None if text.encode() == data else tuple(data)
