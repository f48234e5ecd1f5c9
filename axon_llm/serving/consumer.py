"""Consuming from RabbitMQ: deliveries by callback, acknowledgements from any thread. Next: ``worker.py``."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pika
import pika.exceptions
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection

from axon_llm.serving.amqp import (
    DEAD,
    NOT_FOUND,
    RENEW_IDLE_S,
    SETTLE_S,
    Link,
    declare,
    is_there,
    jobs_queue,
    suspects_queue,
)
from axon_llm.serving.ports import Delivery
from axon_llm.serving.publisher import Publisher
from axon_llm.serving.settings import ServingSettings
from axon_llm.serving.wire import Job

_DELETED = "a queue was deleted: connecting anew, to declare it and to consume again"

log = logging.getLogger("axon.broker")


class _Subscription:
    """One queue as a consumer sees it, on one channel."""

    def __init__(self, channel: BlockingChannel, queue_name: str, prefetch: int, solo: bool) -> None:
        self.channel = channel
        self.queue_name = queue_name
        self.prefetch = prefetch
        self.solo = solo
        self.held: set[int] = set()
        self.consumer_tag = ""
        self._delivered = 0
        self._stalled = 0
        self._heard_at = time.monotonic()

    def delivered(self, tag: int) -> None:
        """Count a delivery."""
        self.held.add(tag)
        self._delivered += 1
        self._heard_at = time.monotonic()

    @property
    def idle(self) -> bool:
        """Whether nothing is held and nothing has come for long."""
        return bool(self.consumer_tag) and not self.held and time.monotonic() - self._heard_at > RENEW_IDLE_S

    def check(self) -> None:
        """Find out whether deliveries still come.

        Raises:
            AMQPError: nothing is delivered although there is something to deliver and room for it.
        """
        if not self.consumer_tag:
            return
        try:
            waiting = self.channel.queue_declare(self.queue_name, passive=True).method
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code == NOT_FOUND:
                log.warning(_DELETED)  # seen before the broker could say so
            raise
        stalled = waiting.message_count > 0 and len(self.held) < self.prefetch and not self._delivered
        self._stalled = self._stalled + 1 if stalled else 0
        self._delivered = 0
        if waiting.consumer_count == 0 or self._stalled >= 2:
            log.warning("%s delivers nothing to this consumer: connecting anew", self.queue_name)
            raise pika.exceptions.ConsumerCancelled()


class Consumer:
    """``ports.JobSource``.

    Hands deliveries of the queues of its models, and one at a time of their queues of suspects, to a callback.

    ``prefetch`` is the number of jobs of one model that may be with this worker at once; without models, those are
    dead letters.
    """

    def __init__(self, settings: ServingSettings, prefetch: int, models: Sequence[str]) -> None:
        self._settings = settings
        self._queues = [(jobs_queue(model), prefetch, False) for model in models]
        self._queues += [(suspects_queue(model), 1, True) for model in models]
        if not models:
            self._queues = [(DEAD, prefetch, False)]
        name = "consumer" if models else "reaper"
        self._link = Link(settings, name, self._on_connect, self._on_tick)
        self._on_delivery: Callable[[Delivery], None] | None = None
        self._subscriptions: dict[str, _Subscription] = {}  # by the queue's name
        self._connection: BlockingConnection | None = None
        self._consuming = True
        self._publisher = Publisher(settings)

    def start(self, on_delivery: Callable[[Delivery], None]) -> None:
        """Connect in the background and consume. ``on_delivery`` runs on the connection's thread and must not block."""
        self._on_delivery = on_delivery
        self._link.start()
        self._publisher.start()

    @property
    def connected(self) -> bool:
        """Whether deliveries can come now."""
        return self._link.connected.is_set()

    @property
    def publisher(self) -> Publisher:
        """The publisher that goes with this consumer."""
        return self._publisher

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until connected. False if that did not happen in time."""
        return self._link.connected.wait(timeout_s)

    def is_current(self, delivery: Delivery) -> bool:
        """Whether the connection the message came by still stands, so that it is still ours."""
        return delivery.generation == self._link.generation and self._link.connected.is_set()

    def ack(self, delivery: Delivery) -> None:
        """Forget the message. Void if the connection changed since."""
        self._settle(delivery, lambda channel: channel.basic_ack(delivery.tag))

    def reject(self, delivery: Delivery, *, requeue: bool) -> None:
        """Give the message back, or send it to the dead letters. Void if the connection changed since."""
        self._settle(delivery, lambda channel: channel.basic_nack(delivery.tag, requeue=requeue))

    def move_to_solo(self, job: Job) -> None:
        """Publish to the queue of suspects; returns when confirmed."""
        self._publisher.publish_and_wait(job, suspects_queue(job.model))

    def stop_consuming(self) -> None:
        """No new deliveries; those held stay held until acknowledged or rejected."""
        self._consuming = False
        done = threading.Event()

        def cancel() -> None:
            try:
                for subscription in self._subscriptions.values():
                    if subscription.channel.is_open and subscription.consumer_tag:
                        subscription.channel.basic_cancel(subscription.consumer_tag)
                        subscription.consumer_tag = ""
            finally:
                done.set()

        if self._link.call(cancel):
            done.wait(2.0)

    def close(self) -> None:
        """Carry out pending acks and rejections, then close the connections."""
        self._link.close()
        self._publisher.close_and_wait()

    def _settle(self, delivery: Delivery, how: Callable[[BlockingChannel], None]) -> None:
        def run() -> None:
            if delivery.generation != self._link.generation:
                return
            subscription = self._subscriptions[delivery.queue_name]
            subscription.held.discard(delivery.tag)
            if subscription.channel.is_open:
                how(subscription.channel)

        self._link.call(run)

    def _on_connect(self, connection: BlockingConnection, generation: int) -> None:
        self._connection = connection
        self._subscriptions.clear()
        gone = [name for name, _, _ in self._queues if not is_there(connection, name)]
        if gone:
            log.info("declaring %s in a moment", ", ".join(gone))
            connection.sleep(SETTLE_S)
        for name, prefetch, solo in self._queues:
            self._subscribe(name, prefetch, solo)

    def _subscribe(self, name: str, prefetch: int, solo: bool) -> None:
        assert self._connection is not None
        channel = self._connection.channel()
        declare(channel, self._settings, *([] if name == DEAD else [name]))
        channel.basic_qos(prefetch_count=prefetch)
        self._subscriptions[name] = subscription = _Subscription(channel, name, prefetch, solo)
        channel.add_on_cancel_callback(lambda _: self._connect_anew())  # the broker does so when the queue is deleted
        if self._consuming:
            receive = self._receiver(subscription, self._link.generation)
            subscription.consumer_tag = channel.basic_consume(name, receive)

    def _on_tick(self) -> None:
        for subscription in list(self._subscriptions.values()):
            subscription.check()
            if subscription.idle:
                subscription.channel.close()
                self._subscribe(subscription.queue_name, subscription.prefetch, subscription.solo)

    def _connect_anew(self) -> None:
        log.warning(_DELETED)
        assert self._connection is not None
        self._connection.call_later(0, self._connection.close)

    def _receiver(self, subscription: _Subscription, generation: int) -> Callable[..., None]:
        def receive(_: BlockingChannel, method: Any, __: Any, body: bytes) -> None:
            assert self._on_delivery is not None
            subscription.delivered(method.delivery_tag)
            self._on_delivery(
                Delivery(
                    body=body,
                    solo=subscription.solo,
                    redelivered=bool(method.redelivered),
                    generation=generation,
                    tag=method.delivery_tag,
                    queue_name=subscription.queue_name,
                )
            )

        return receive
