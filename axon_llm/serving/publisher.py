"""Publishing to RabbitMQ with confirmation. Next: ``consumer.py``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pika
import pika.exceptions
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection

from axon_llm.serving.amqp import LOST, SETTLE_S, Link, declare, jobs_queue
from axon_llm.serving.ports import QueueFull, QueueUnavailable
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.wire import Job, encode


class Publisher:
    """``ports.JobQueue``: publishes with confirms and ``mandatory``, one message after the other.

    A confirm costs the broker one write to its disk (about a millisecond). Callers await futures; they may come from an
    event loop (``publish``) or from any thread (``publish_and_wait``).
    """

    def __init__(self, settings: ServingSettings) -> None:
        self._settings = settings
        self._link = Link(settings, "publisher", self._on_connect, self._on_tick)
        self._channel: BlockingChannel | None = None
        self._connection: BlockingConnection | None = None
        self._blocked = False
        self._silent = False  # something was asked of the broker and no answer came in time

    def start(self) -> None:
        """Begin to connect, in the background."""
        self._link.start()

    @property
    def connected(self) -> bool:
        """Whether the broker can be published to now, as far as is known without asking."""
        return self._link.connected.is_set() and not self._blocked and not self._silent

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until connected. False if that did not happen in time."""
        return self._link.connected.wait(timeout_s)

    async def publish(self, job: Job) -> None:
        """Return when the broker has confirmed that it keeps the job; see ``ports.JobQueue``."""
        await self._await(self._hand_over(lambda: self._publish(jobs_queue(job.model), job)))

    async def depth(self, model: str) -> int:
        """Return the number of jobs that wait in the queue of a model."""
        return int(await self._await(self._hand_over(lambda: self._depth(jobs_queue(model)))))

    def publish_and_wait(self, job: Job, queue_name: str | None = None) -> None:
        """As ``publish``, for a thread, and into another queue if one is named."""
        self._wait(self._hand_over(lambda: self._publish(queue_name or jobs_queue(job.model), job)))

    def depth_and_wait(self, model: str) -> int:
        """As ``depth``, for a thread."""
        return int(self._wait(self._hand_over(lambda: self._depth(jobs_queue(model)))))

    async def close(self) -> None:
        """Close the connection and stop the thread."""
        await asyncio.to_thread(self._link.close)

    def close_and_wait(self) -> None:
        """As ``close``, for a thread."""
        self._link.close()

    def _hand_over(self, what: Callable[[], Any]) -> Future[Any]:
        result: Future[Any] = Future()
        given_up_at = time.monotonic() + self._settings.publish_timeout_s

        def run() -> None:
            if time.monotonic() > given_up_at or not result.set_running_or_notify_cancel():
                return  # nobody waits for it any more
            try:
                answer = what()
                self._silent = False
                result.set_result(answer)
            except (QueueFull, QueueUnavailable) as error:
                result.set_exception(error)
            except LOST as error:
                result.set_exception(QueueUnavailable(f"the broker did not confirm ({type(error).__name__})"))
            except BaseException as error:
                result.set_exception(error)
                raise

        if self._blocked:
            raise QueueUnavailable("the broker accepts nothing now: it is short of memory or disk")
        if not self._link.call(run):
            raise QueueUnavailable("the broker cannot be reached", hint="check AXON_AMQP_URL")
        return result

    async def _await(self, result: Future[Any]) -> Any:
        try:
            async with asyncio.timeout(self._settings.publish_timeout_s):
                return await asyncio.wrap_future(result)
        except TimeoutError:
            self._silent = True
            raise QueueUnavailable("the broker did not confirm in time") from None

    def _wait(self, result: Future[Any]) -> Any:
        try:
            return result.result(self._settings.publish_timeout_s)
        except TimeoutError:
            result.cancel()
            self._silent = True
            raise QueueUnavailable("the broker did not confirm in time") from None

    def _on_connect(self, connection: BlockingConnection, generation: int) -> None:
        self._blocked = self._silent = False
        connection.add_on_connection_blocked_callback(self._set_blocked)
        connection.add_on_connection_unblocked_callback(self._set_unblocked)
        self._connection = connection
        self._open()

    def _open(self) -> BlockingChannel:
        assert self._connection is not None
        self._channel = channel = self._connection.channel()
        declare(channel, self._settings)
        channel.confirm_delivery()
        return channel

    def _on_tick(self) -> None:
        """Ask a broker that was silent whether it is back: nobody may be publishing while this process is not ready."""
        if self._silent:
            declare(self._channel if self._channel and self._channel.is_open else self._open(), self._settings)
            self._silent = False

    def _set_blocked(self, *_: object) -> None:
        self._blocked = True

    def _set_unblocked(self, *_: object) -> None:
        self._blocked = False

    def _publish(self, queue_name: str, job: Job) -> None:
        properties = pika.BasicProperties(  # type: ignore[no-untyped-call]
            delivery_mode=pika.DeliveryMode.Persistent,
            content_type="application/json",
            message_id=job.job_id,
            correlation_id=job.trace_id,
        )
        body = encode(job)
        for again in (True, False):
            channel = self._channel
            if channel is None or channel.is_closed:
                channel = self._open()
            try:
                channel.basic_publish("", queue_name, body, properties, mandatory=True)
                return
            except pika.exceptions.NackError:
                raise QueueFull("the queue is full", hint="try again later, or start more workers") from None
            except pika.exceptions.UnroutableError:
                if not again:
                    raise QueueUnavailable("the queue does not exist and could not be declared") from None
                # Deleted, or no worker has ever served the model. Which of them cannot be known, so it settles first.
                self._settle()
                declare(channel, self._settings, queue_name)

    def _depth(self, queue_name: str) -> int:
        channel = self._channel
        if channel is None or channel.is_closed:
            channel = self._open()
        try:
            return int(channel.queue_declare(queue_name, passive=True).method.message_count)
        except pika.exceptions.ChannelClosedByBroker:
            self._settle()
            self._open()  # the refusal closed the channel; whoever publishes next declares the queue
            return 0

    def _settle(self) -> None:
        assert self._connection is not None
        self._connection.sleep(SETTLE_S)
