"""Sees to it that no accepted job is forgotten: reads the dead letters, and looks after jobs that nobody holds.

A dead letter gets its terminal error, else its user would wait for ever. A job that was submitted but never confirmed
is published again; one that was confirmed but is with no worker is too, once the queue does not seem to hold it (it
was purged or deleted); one past its deadline is ended. Publishing once too often is harmless: the claim tells a
duplicate. Any number of reapers may run; one in every worker and session manager is fine. Next: ``lua/look.lua``.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from axon_llm.serving.broker import Consumer
from axon_llm.serving.held_job import deadline_exceeded
from axon_llm.serving.ports import Delivery, DueJob, QueueFull, QueueUnavailable, StoreUnavailable
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.token_log import TokenLog
from axon_llm.serving.wire import ErrorInfo, Job, JobRef, Terminal, WireError, decode

PREFETCH = 20
LONG_WAIT_LOOKS = 3  # with the usual grace it is looked at after 10, 30, 70 and 150 s: that one

log = logging.getLogger("axon.reaper")


class Reaper:
    """One thread for the work, one for its broker connection; both daemons."""

    def __init__(self, settings: ServingSettings) -> None:
        self._settings = settings
        self._store = TokenLog(settings)
        self._consumer = Consumer(settings, PREFETCH, models=())
        self._inbox: queue.SimpleQueue[Delivery | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="axon-reaper", daemon=True)

    def start(self) -> None:
        """Begin, in the background."""
        self._consumer.start(self._inbox.put)
        self._thread.start()

    def close(self) -> None:
        """Stop. What is unfinished another reaper will do."""
        self._stop.set()
        self._inbox.put(None)
        self._thread.join(5)
        self._consumer.close()
        self._store.close()

    def _run(self) -> None:
        every_s = min(2.0, self._settings.outbox_grace_s / 4)
        next_sweep = time.monotonic() + every_s
        while not self._stop.is_set():
            try:
                delivery = self._inbox.get(timeout=max(0.0, next_sweep - time.monotonic()))
            except queue.Empty:
                delivery = None
            if delivery is not None and not self._done(self._bury, delivery):
                self._inbox.put(delivery)
            if time.monotonic() >= next_sweep and not self._stop.is_set():
                self._done(self._sweep)
                next_sweep = time.monotonic() + every_s

    def _done(self, work: Callable[..., None], *arguments: Any) -> bool:
        """Whether work could be done. Whatever went wrong, it is tried again: without this thread users would wait."""
        try:
            work(*arguments)
            return True
        except (StoreUnavailable, QueueUnavailable, QueueFull) as error:
            log.warning("%s", error)
            self._stop.wait(0.5)
        except Exception:  # a permission that is missing, a fault of ours
            log.exception("looking after jobs failed")
            self._stop.wait(2.0)
        return False

    def _bury(self, delivery: Delivery) -> None:
        """Write the terminal error of a dead letter, if it is a job somebody may wait for."""
        ref = _whose(delivery.body)
        if ref is None:
            log.warning("a dead letter of %d bytes belongs to no job", len(delivery.body))
        else:
            error = ErrorInfo(
                type="server_error",
                code="delivery_failed",
                message="The job could not be delivered to a worker.",
                http_status=500,
            )
            if self._store.fail(ref, Terminal(finish_reason="error", error=error), unless_leased=True):
                log.warning("job %s: ended, it was a dead letter", ref.job_id)
        self._consumer.ack(delivery)

    def _sweep(self) -> None:
        if not self._consumer.publisher.connected:
            return  # jobs could be taken from the schedule but not be published
        for due in self._store.due():
            self._done(self._look_after, due)

    def _look_after(self, due: DueJob) -> None:
        if due.expired:
            terminal = Terminal(finish_reason="error", error=deadline_exceeded(), attempts=0)
            if self._store.fail(due.job.ref, terminal, unless_leased=True):
                log.warning("job %s: ended, it was past its deadline and with no worker", due.job.job_id)
        elif self._is_lost(due):
            self._consumer.publisher.publish_and_wait(due.job)
            self._store.published(due)
            log.warning("job %s: published again after %.0f s with no worker", due.job.job_id, due.waited_s)

    def _is_lost(self, due: DueJob) -> bool:
        """Whether a job that nobody holds seems not to be in the queue either.

        Long waiting is a reason once: a queue may be that long, and would grow by what is put into it again and again.
        """
        if not due.confirmed or (due.looks >= LONG_WAIT_LOOKS and not due.published_again):
            return True
        return self._consumer.publisher.depth_and_wait(due.job.model) == 0


def _whose(body: bytes) -> JobRef | None:
    """Return whose job a message is, or was meant to be."""
    try:
        return decode(Job, body).ref
    except WireError:
        pass
    try:
        data: Any = json.loads(body)
        fields = {name: data[name] for name in ("tenant", "job_id", "session_id") if data.get(name) is not None}
        return decode(JobRef, json.dumps(fields))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, WireError):
        return None
