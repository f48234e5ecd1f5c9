"""A worker without a model: it answers what the last user message tells it to, over any store and queue.

What is tested with it is everything around the worker; ``axon worker`` itself has tests of its own. The words:

    count N           N tokens "w0 w1 …", then the end
    slow N            the same, 50 ms apart
    hold              nothing, until cancelled
    first then hold   one token, then nothing, until cancelled
    fail STATUS CODE  a terminal error before any token
    break             two tokens, then a terminal error
    repeat            the content of the first user message, word by word
    anything else     one token: a digest of the whole conversation
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator

from axon_llm.serving.ports import Delivery, Emit, JobSource, StoreUnavailable, WorkerStore
from axon_llm.serving.wire import (
    ErrorInfo,
    Job,
    LogEntry,
    Message,
    ModelCard,
    Terminal,
    TimingInfo,
    TopLogprob,
    Turn,
    UsageInfo,
    WorkerCard,
    decode,
)

MODEL = "axon-tiny"
CONTEXT = 2048
CARD = ModelCard(id=MODEL, created_unix_s=1_700_000_000, max_seq_len=CONTEXT, vocab_size=1000, has_chat_template=True)


class ScriptedWorker:
    """Serves jobs, one thread for each, until ``stop``."""

    def __init__(self, store: WorkerStore, source: JobSource, name: str = "scripted", card: ModelCard = CARD) -> None:
        self._store = store
        self._source = source
        self._name = name
        self._card = card
        self.model = card.id
        self._lock = threading.Lock()  # a worker store belongs to one thread at a time
        self._stopping = threading.Event()
        self.jobs: list[Job] = []

    def start(self) -> None:
        self.announce()
        threading.Thread(target=self._announcing, daemon=True).start()
        self._source.start(self._take)

    def announce(self) -> None:
        card = WorkerCard(
            worker_id=self._name,
            models=(self._card,),
            slots=4,
            running=0,
            waiting=0,
            mean_job_s=0.5,
            started_at_unix_s=time.time(),
        )
        with self._lock:
            self._store.announce(card, 10.0)

    def stop(self) -> None:
        self._stopping.set()
        self._source.stop_consuming()
        with self._lock:
            self._store.withdraw(self._name)
        self._source.close()

    def _announcing(self) -> None:
        while not self._stopping.wait(2.0):
            with contextlib.suppress(StoreUnavailable):  # a test may have taken Redis away; the next one counts
                self.announce()

    def _take(self, delivery: Delivery) -> None:
        threading.Thread(target=self._serve, args=(delivery,), daemon=True).start()

    def _serve(self, delivery: Delivery) -> None:
        job = decode(Job, delivery.body)
        self.jobs.append(job)
        with self._lock:
            claim = self._store.claim(job, self._name, redelivered=delivery.redelivered)
        if claim.outcome == "run":
            seq = len(claim.entries)
            for text, pause_s in script(job):
                time.sleep(pause_s)
                if self._stopping.is_set():
                    return
                seq += 1
                entry = entry_of(job, seq, text)
                with self._lock:
                    result = self._store.emit([emit_of(job, claim.fence, entry)])[0]
                if result.cancel_requested and entry.terminal is None:
                    end = Terminal(finish_reason="cancelled", usage=UsageInfo(prompt_tokens=1, completion_tokens=seq))
                    with self._lock:
                        last = LogEntry(seq=seq + 1, terminal=end)
                        self._store.emit([Emit(job.ref, claim.fence, (last,))])
                    break
                if entry.terminal is not None:
                    break
            else:
                self._hold(job, claim.fence, seq)
        self._source.ack(delivery)

    def _hold(self, job: Job, fence: int, seq: int) -> None:
        while not self._stopping.wait(0.02):
            with self._lock:
                result = self._store.emit([Emit(job.ref, fence, ())])[0]
            if result.cancel_requested or result.outcome != "ok":
                with self._lock:
                    last = LogEntry(seq=seq + 1, terminal=Terminal(finish_reason="cancelled"))
                    self._store.emit([Emit(job.ref, fence, (last,))])
                return


def script(job: Job) -> Iterator[tuple[str | Terminal, float]]:
    """Texts and the pauses before them; ends with a ``Terminal`` unless the job is to hang."""
    request = words(job)
    match request.split():
        case ["count", number]:
            yield from ((f"w{i} ", 0.0) for i in range(int(number)))
        case ["slow", number]:
            yield from ((f"w{i} ", 0.05) for i in range(int(number)))
        case ["hold"]:
            return
        case ["first", "then", "hold"]:
            yield "first ", 0.0
            return
        case ["fail", status, code]:
            error = ErrorInfo(type="x", code=code, message=f"told to fail with {code}", http_status=int(status))
            yield Terminal(finish_reason="error", error=error), 0.0
        case ["break"]:
            yield "one ", 0.0
            yield "two ", 0.0
            error = ErrorInfo(type="server_error", code="broken", message="told to break", http_status=500)
            yield Terminal(finish_reason="error", error=error), 0.0
        case ["repeat"]:
            first = next(m.content for m in job.messages or () if m.role == "user")
            yield from ((word + " ", 0.0) for word in first.split())
        case _:
            yield digest(job), 0.0
    usage = UsageInfo(prompt_tokens=prompt_tokens(job), completion_tokens=1, cached_tokens=prompt_tokens(job) // 2)
    yield Terminal(finish_reason="stop", usage=usage, timings=TimingInfo(ttft_s=0.01, total_s=0.02)), 0.0


def words(job: Job) -> str:
    if job.messages is not None:
        return job.messages[-1].content
    return job.prompt or ""


def digest(job: Job) -> str:
    """What an answer to this conversation is, so that a test can tell which conversation was answered."""
    parts = [f"{m.role}={m.content}" for m in job.messages or ()] or [job.prompt or repr(job.prompt_tokens)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def prompt_tokens(job: Job) -> int:
    return sum(len(m.content.split()) for m in job.messages or ()) or len((job.prompt or "").split())


def entry_of(job: Job, seq: int, text: str | Terminal) -> LogEntry:
    if isinstance(text, Terminal):
        # Like an engine's end-of-sequence token: counted, and without text; an error has no token at all.
        usage = text.usage and text.usage.model_copy(update={"completion_tokens": seq})
        token = None if text.error else 2
        return LogEntry(seq=seq, token=token, terminal=text.model_copy(update={"usage": usage}))
    terminal = None
    if seq == job.sampling.max_tokens:
        usage = UsageInfo(prompt_tokens=prompt_tokens(job), completion_tokens=seq, cached_tokens=0)
        terminal = Terminal(finish_reason="length", usage=usage)
    if job.sampling.logprobs is None:
        return LogEntry(seq=seq, token=seq, text=text, terminal=terminal)
    top = (TopLogprob(token=seq, logprob=-0.5, text=text), TopLogprob(token=0, logprob=-1.5, text="other"))
    return LogEntry(
        seq=seq, token=seq, text=text, logprob=-0.5, top_logprobs=top[: job.sampling.logprobs], terminal=terminal
    )


def emit_of(job: Job, fence: int, entry: LogEntry) -> Emit:
    turn = None
    if entry.terminal and entry.terminal.finish_reason in ("stop", "length") and job.session_id is not None:
        said = [text for text, _ in script(job) if isinstance(text, str)][: job.sampling.max_tokens]
        new = (job.messages or ())[-job.new_messages :]
        answer = Message(role="assistant", content="".join(said))
        turn = Turn(turn=job.turn or 0, job_id=job.job_id, messages=(*new, answer), committed_at_unix_s=time.time())
    return Emit(job.ref, fence, (entry,), turn)
