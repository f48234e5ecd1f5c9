"""The worker: takes jobs from the queue, decodes them, writes every token to its log.

One thread, the caller's, owns the engine and the store and does everything below; the job source (RabbitMQ) lives on
another and only puts deliveries into a queue. Each turn of the loop takes what was delivered, makes one step of the
engine, and sends what came out in one round trip. A message is acknowledged when its job's last entry is stored, and
not before: whatever dies, the message comes back to some worker, the claim tells it how far the log goes, and it
continues from there. Next: ``intake.py``, ``held_job.py``, ``token_log.py``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from axon_llm.engine.events import TokenEvent
from axon_llm.errors import RequestError
from axon_llm.serving.announcer import Announcer
from axon_llm.serving.held_job import HeldJob, deadline_exceeded
from axon_llm.serving.intake import Intake, Item
from axon_llm.serving.metrics import Health, WorkerMetrics
from axon_llm.serving.ports import (
    Claim,
    Delivery,
    Emit,
    EmitResult,
    JobSource,
    QueueFull,
    QueueUnavailable,
    StoreUnavailable,
    WorkerStore,
)
from axon_llm.serving.served_model import DecodingEngine
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.wire import ErrorInfo, Job, ModelCard, Terminal, WireError, decode

IDLE_S = 0.2
RENEW_S = 1.0
_BACKOFF_S = (0.05, 1.0)

log = logging.getLogger("axon.worker")


class Worker:
    """Decodes jobs until told to stop.

    Args:
        settings: time-outs and limits.
        engine: belongs to the thread that calls ``run``, as does ``store``.
        encode: the tokens of a job's prompt; raises ``RequestError`` if it has none.
        spell: what a token is called, and the bytes it adds to a text, for log-probabilities.
        models: what to announce. Other models have other queues; a job for one that comes all the same fails.
        worker_id: unique to this process.
    """

    def __init__(
        self,
        settings: ServingSettings,
        engine: DecodingEngine,
        store: WorkerStore,
        source: JobSource,
        *,
        encode: Callable[[Job], tuple[int, ...]],
        spell: Callable[[int], tuple[str, bytes]],
        models: tuple[ModelCard, ...],
        worker_id: str,
        metrics: WorkerMetrics | None = None,
        health: Health | None = None,
    ) -> None:
        self._settings, self._engine, self._store, self._source = settings, engine, store, source
        self._encode, self._spell = encode, spell
        self._models = {model.id for model in models}
        self._worker_id = worker_id
        self._metrics = metrics or WorkerMetrics()
        self._health = health or Health()
        self._announcer = Announcer(store, worker_id, models, engine.stats().slots)
        self._stop = threading.Event()
        self._intake = Intake()
        self._held: dict[tuple[str, str], HeldJob] = {}
        self._by_engine_id: dict[str, HeldJob] = {}
        self._store_down_until = 0.0
        self._store_backoff_s = 0.0

    def stop(self) -> None:
        """Ask ``run`` to hand everything back and return. Safe from any thread and from signal handlers."""
        self._stop.set()
        self._intake.wake()

    def run(self) -> None:
        """Work until ``stop``.

        An error of the engine propagates: the process ends, and its jobs go to other workers.
        """
        self._source.start(self._intake.put)
        log.info("worker %s: %d slots, serving", self._worker_id, self._engine.stats().slots)
        while not self._stop.is_set():
            self._turn()
        self._drain()

    # -------------------------------------------------------------------------------------------------------- the loop

    def _turn(self) -> None:
        store_up = time.monotonic() >= self._store_down_until
        busy = self._engine.has_work() and store_up
        self._receive(0.0 if busy or (self._intake.waiting and store_up) else IDLE_S)
        if store_up:
            self._claim_waiting()
            self._watch_deadlines()
            if self._engine.has_work():
                self._take(self._engine.step())
            self._send()
            self._announce()
        self._show()

    def _receive(self, wait_s: float) -> None:
        """Sort what was delivered, waiting for the first if there is nothing else to do."""
        for delivery in self._intake.arrived(wait_s):
            self._sort(delivery)

    def _sort(self, delivery: Delivery) -> None:
        try:
            job = decode(Job, delivery.body)
        except WireError as error:
            log.warning("a message of %d bytes is no job: %s", len(delivery.body), error)
            self._metrics.rejected.inc()
            self._source.reject(delivery, requeue=False)
            return
        self._line_up(delivery, job)

    def _line_up(self, delivery: Delivery, job: Job) -> None:
        held = self._held.get((job.tenant, job.job_id))
        if held is not None and self._source.is_current(held.delivery):
            self._metrics.duplicates.inc()
            self._source.ack(delivery)
        elif delivery.solo and held is None:
            self._intake.suspects.append((delivery, job))
        else:
            self._intake.waiting.append((delivery, job))

    def _claim_waiting(self) -> None:
        for delivery, job in self._intake.unparked():
            self._line_up(delivery, job)
        waiting, suspects = self._intake.waiting, self._intake.suspects
        # A suspect waits until nobody is here whom it could take down with it, and keeps others out meanwhile.
        alone = bool(suspects) or any(held.delivery.solo for held in self._held.values())
        later: deque[Item] = deque()
        try:
            while waiting:
                delivery, job = waiting.popleft()
                held = self._held.get((job.tenant, job.job_id))
                if alone and held is None:
                    later.append((delivery, job))
                    continue
                try:
                    self._claim(delivery, job, held)
                except StoreUnavailable:
                    later.append((delivery, job))
                    raise
            if suspects and not self._held:
                self._claim(*suspects[0], None)
                suspects.popleft()
        except StoreUnavailable as error:
            self._store_failed(error)
        finally:
            waiting.extendleft(reversed(later))

    def _claim(self, delivery: Delivery, job: Job, held: HeldJob | None) -> None:
        if not self._source.is_current(delivery):
            return  # the connection it came by is gone; the broker will deliver it again
        if held is not None and self._source.is_current(held.delivery):
            self._metrics.duplicates.inc()
            self._source.ack(delivery)
            return
        claim = self._store.claim(job, self._worker_id, redelivered=delivery.redelivered, solo=delivery.solo)
        self._store_backoff_s = 0.0
        if claim.outcome == "run" and held is None:
            self._begin(HeldJob.of(job, delivery, claim), claim.cancel_requested)
        elif claim.outcome == "run" and held is not None:
            if self._go_on(held, claim, delivery):
                self._metrics.adopted.inc()
                log.info("job %s: adopted again at token %d", job.job_id, len(held.entries))
        elif claim.outcome == "busy":
            self._intake.park(delivery, job, max(claim.retry_after_s, 0.1))
        elif claim.outcome == "suspect":
            self._move(delivery, job)
        else:  # duplicate, done, failed: nothing is left to do with this message
            if claim.outcome == "duplicate":
                self._metrics.duplicates.inc()
            if claim.outcome == "failed":
                self._metrics.failures.labels("too_many_attempts").inc()
                log.warning("job %s: given up after %d attempts", job.job_id, claim.attempt)
            self._source.ack(delivery)
        if held is not None and claim.outcome != "run":
            self._drop(held)

    def _go_on(self, held: HeldJob, claim: Claim, delivery: Delivery) -> bool:
        """Continue a held job under a new claim; whether with what is held, or anew from a log that says otherwise."""
        if held.adopt(claim, delivery):
            return True
        self._drop(held)  # somebody else has gone on in other words, and users have seen those
        self._begin(HeldJob.of(held.job, delivery, claim), claim.cancel_requested)
        return False

    def _begin(self, held: HeldJob, cancel: bool) -> None:
        job = held.job
        self._held[job.tenant, job.job_id] = held
        self._by_engine_id[held.engine_id] = held
        if held.entries:
            self._metrics.resumes.inc()
        else:
            self._metrics.queue_s.observe(max(0.0, time.time() - job.created_at_unix_s))
        log.info(
            "job %s: claimed, attempt %d, from token %d, trace %s",
            job.job_id,
            held.attempt,
            len(held.entries),
            job.trace_id,
        )
        if cancel:
            held.end(Terminal(finish_reason="cancelled", attempts=held.attempt))
            return
        if held.past_deadline:
            self._fail(held, deadline_exceeded())
            return
        if job.model not in self._models:
            self._fail(held, _refusal("model_not_found", "This worker does not serve the model.", "model", 404))
            return
        try:
            request = held.request(self._encode(job), self._engine.max_seq_len)
            self._engine.submit(request)
        except RequestError as error:
            self._fail(held, _refusal(error.code, error.message, error.param, 400))
        except Exception:  # a fault of ours that a prompt has found: it would end one worker after another
            log.exception("job %s: cannot be begun", job.job_id)
            self._fail(
                held,
                ErrorInfo(
                    type="server_error",
                    code="internal_error",
                    message="The job cannot be begun: a fault of the worker, whose log has more.",
                    http_status=500,
                ),
            )

    def _fail(self, held: HeldJob, error: ErrorInfo) -> None:
        held.end(Terminal(finish_reason="error", error=error, attempts=held.attempt))

    def _move(self, delivery: Delivery, job: Job) -> None:
        """Move a job that may be killing its workers to the queue where it runs alone."""
        try:
            self._source.move_to_solo(job)
        except (QueueUnavailable, QueueFull) as error:
            log.warning("job %s: cannot be moved to the solo queue: %s", job.job_id, error)
            self._intake.park(delivery, job, 1.0)
            return
        self._metrics.suspects.inc()
        log.warning("job %s: moved to the solo queue, workers died while they worked on it", job.job_id)
        self._source.ack(delivery)

    def _watch_deadlines(self) -> None:
        for held in self._held.values():
            if held.past_deadline and not held.ended and held.abort is None:
                held.abort = deadline_exceeded()
                self._engine.cancel(held.engine_id)

    def _take(self, events: list[TokenEvent]) -> None:
        now = time.monotonic()
        for event in events:
            held = self._by_engine_id.get(event.request_id)
            if held is None:
                continue  # dropped: another worker has it
            held.add(event, self._spell)
            if event.token is not None:
                self._metrics.generated_tokens.inc()
                if held.last_token_at is not None:
                    self._metrics.itl_s.observe(now - held.last_token_at)
                elif event.index == 0:
                    self._metrics.ttft_s.observe(max(0.0, time.time() - held.job.created_at_unix_s))
                held.last_token_at = now

    # ------------------------------------------------------------------------------------------------- out to the store

    def _send(self) -> None:
        """Write what is new, renew the leases of those that had nothing new for a while, and act on the answers."""
        now = time.monotonic()
        due = [
            held for held in self._held.values() if held.stored < len(held.entries) or now - held.renewed_at >= RENEW_S
        ]
        if not due:
            return
        emits = [held.pending() for held in due]
        try:
            results = self._store.emit(emits)
            for held, emit, result in zip(due, emits, results, strict=True):
                self._settle(held, emit, result, now)
        except StoreUnavailable as error:
            self._store_failed(error)
            return
        self._metrics.emit_s.observe(time.monotonic() - now)
        self._store_backoff_s = 0.0

    def _settle(self, held: HeldJob, emit: Emit, result: EmitResult, now: float) -> None:
        if result.outcome == "ok":
            held.renewed_at = now
            if emit.entries:
                held.stored = emit.entries[-1].seq
            if held.ended and held.stored == len(held.entries):
                self._finish(held)
            elif result.cancel_requested and not held.cancelling and not held.ended:
                held.cancelling = True
                self._engine.cancel(held.engine_id)
        elif result.outcome == "gap":
            self._metrics.backfills.inc()
            held.stored = result.next_seq - 1
        elif result.outcome == "missing":
            self._claim_lost(held)
        else:
            self._metrics.fenced.inc()
            log.warning("job %s: %s, dropped at token %d", held.job.job_id, result.outcome, len(held.entries))
            self._drop(held)
            self._source.ack(held.delivery)

    def _claim_lost(self, held: HeldJob) -> None:
        """The store has lost the job: claim it anew; what was stored before is sent again."""
        claim = self._store.claim(held.job, self._worker_id, solo=held.delivery.solo)
        if claim.outcome != "run":
            self._drop(held)
            self._source.ack(held.delivery)
        elif self._go_on(held, claim, held.delivery):
            self._metrics.backfills.inc()

    def _finish(self, held: HeldJob) -> None:
        terminal = held.entries[-1].terminal
        assert terminal is not None
        self._drop(held)
        self._source.ack(held.delivery)
        took_s = time.monotonic() - held.claimed_at
        self._metrics.job_ended(terminal, took_s)
        self._announcer.ended(took_s, len(held.entries))
        log.info(
            "job %s: ended (%s%s) after %d entries, %.2f s here",
            held.job.job_id,
            terminal.finish_reason,
            f", {terminal.error.code}" if terminal.error else "",
            len(held.entries),
            took_s,
        )

    def _drop(self, held: HeldJob) -> None:
        self._held.pop((held.job.tenant, held.job.job_id), None)
        if self._by_engine_id.pop(held.engine_id, None) is not None:
            self._engine.cancel(held.engine_id)

    def _store_failed(self, error: StoreUnavailable) -> None:
        """Stop decoding for a moment: nobody could see the tokens."""
        if not self._store_backoff_s:
            log.warning("%s", error)
        self._metrics.store_errors.inc()
        self._store_backoff_s = min(max(self._store_backoff_s * 2, _BACKOFF_S[0]), _BACKOFF_S[1])
        self._store_down_until = time.monotonic() + self._store_backoff_s

    def _announce(self, draining: bool = False) -> None:
        stats = self._engine.stats()
        waiting = stats.waiting + len(self._intake)
        try:
            if self._announcer.announce(running=stats.running, waiting=waiting, draining=draining):
                self._store_backoff_s = 0.0
        except StoreUnavailable as error:
            self._store_failed(error)

    def _show(self) -> None:
        stats = self._engine.stats()
        self._metrics.show(stats, waiting=stats.waiting + len(self._intake))
        self._health.beat()
        store_up = self._store_backoff_s == 0
        self._health.ready = self._source.connected and store_up
        if not store_up:
            self._health.reason = "Redis is not available"
        elif not self._source.connected:
            self._health.reason = "the broker is not connected"

    # ---------------------------------------------------------------------------------------------------------- ending

    def _drain(self) -> None:
        """Hand every unfinished job back, so that another worker continues it at once."""
        self._health.ready, self._health.reason = False, "draining"
        self._source.stop_consuming()
        self._receive(0.0)
        self._send()
        handed_back = len(self._held)
        try:
            for held in self._held.values():
                self._store.release(held.job.ref, held.fence)
            self._store.withdraw(self._worker_id)
        except StoreUnavailable as error:
            # The next claims will wait for the lease and count as take-overs; nothing is lost.
            log.warning("draining without Redis: %s", error)
        for delivery in (*(held.delivery for held in self._held.values()), *self._intake.deliveries()):
            self._source.reject(delivery, requeue=True)
        self._metrics.returned.inc(handed_back)
        for held in list(self._held.values()):
            self._drop(held)
        self._source.close()
        self._store.close()
        log.info("worker %s: drained, %d unfinished jobs handed back", self._worker_id, handed_back)


def _refusal(code: str, message: str, param: str | None, http_status: int) -> ErrorInfo:
    return ErrorInfo(type="invalid_request_error", code=code, message=message, http_status=http_status, param=param)
