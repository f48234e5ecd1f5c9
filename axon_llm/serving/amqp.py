"""RabbitMQ's queues, and the thread that owns a connection to it.

A pika connection belongs to one thread. ``Link`` is that thread: it connects, keeps heartbeats, reconnects with
back-off and runs what other threads hand it. Every connection has a generation number; acknowledgements of an earlier
one are void, as its messages are with the broker again. This file, ``broker.py`` and ``consumer.py`` are the only
ones that know pika. Next: ``broker.py``.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import ssl
import threading
import time
from collections.abc import Callable
from hashlib import sha256

import pika
import pika.exceptions
from pika.adapters.blocking_connection import BlockingChannel, BlockingConnection

from axon_llm.serving.ports import QueueUnavailable
from axon_llm.serving.settings import ServingSettings

DEAD = "axon.dead"
DEAD_LETTERS = "axon.dlx"
# A queue that is declared again within a moment of its deletion is half connected to its old consumers (RabbitMQ 3.10:
# within 20 ms always, after 50 ms never): they are not told, and it hands them messages that never arrive. So whoever
# finds a queue gone waits for so long before declaring it, and idle consumers begin anew now and then.
SETTLE_S = 1.0
RENEW_IDLE_S = 60.0
NOT_FOUND = 404
_BACKOFF_S = (0.1, 5.0)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.:/@\-]{1,200}")

log = logging.getLogger("axon.broker")

LOST = (pika.exceptions.AMQPError, OSError, ssl.SSLError)


def jobs_queue(model: str) -> str:
    """Return the queue of the jobs for one model, from which only workers that serve it take."""
    return f"axon.jobs.{_name(model)}"


def suspects_queue(model: str) -> str:
    """Return the queue of one model's suspects: jobs that may be killing their workers, and so run alone."""
    return f"axon.solo.{_name(model)}"


def _name(model: str) -> str:
    """Return a model's name as part of a queue's: itself where it can be, as people look at queues; else its hash."""
    return model if _PLAIN_NAME.fullmatch(model) else f"sha256-{sha256(model.encode()).hexdigest()}"


def declare(channel: BlockingChannel, settings: ServingSettings, *queue_names: str) -> None:
    """Declare the dead letters and the queues of jobs that are named.

    The one place that knows their arguments; others would be answered 406.
    """
    channel.exchange_declare(DEAD_LETTERS, exchange_type="fanout", durable=True)
    channel.queue_declare(DEAD, durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind(DEAD, DEAD_LETTERS)
    for name in queue_names:
        channel.queue_declare(
            name,
            durable=True,
            arguments={
                "x-queue-type": "quorum",
                "x-delivery-limit": settings.delivery_limit,
                "x-max-length": settings.queue_max_length,
                "x-overflow": "reject-publish",  # at-least-once dead-lettering needs it
                "x-dead-letter-exchange": DEAD_LETTERS,
                "x-dead-letter-strategy": "at-least-once",
            },
        )


def is_there(connection: BlockingConnection, name: str) -> bool:
    """Whether a queue is declared, on a channel of its own: a broker that says no closes it."""
    channel = connection.channel()
    try:
        channel.queue_declare(name, passive=True)
    except pika.exceptions.ChannelClosedByBroker as error:
        if error.reply_code != NOT_FOUND:
            raise
        return False
    channel.close()
    return True


def parameters(settings: ServingSettings) -> pika.URLParameters:
    """Return how to connect, with short time-outs: a hung broker must be noticed, not waited for."""
    result = pika.URLParameters(settings.amqp_url.get_secret_value())
    result.heartbeat = settings.broker_heartbeat_s
    result.blocked_connection_timeout = settings.publish_timeout_s
    result.socket_timeout = settings.publish_timeout_s
    result.stack_timeout = settings.publish_timeout_s + 1
    result.connection_attempts = 1
    if settings.tls_ca_file is not None and result.ssl_options is not None:
        context = ssl.create_default_context(cafile=str(settings.tls_ca_file))
        result.ssl_options = pika.SSLOptions(context, result.host)
    return result


def reach(settings: ServingSettings, timeout_s: float, *queue_names: str) -> None:
    """Connect once and declare the dead letters and the queues that are named, trying for ``timeout_s`` seconds.

    Raises:
        QueueUnavailable: in vain; says whether the broker refused the login.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            connection = BlockingConnection(parameters(settings))
            declare(connection.channel(), settings, *queue_names)
            connection.close()
            return
        except LOST as error:
            refused = isinstance(error, pika.exceptions.ProbableAuthenticationError)
            if refused or time.monotonic() > end:
                reason = "refused the login" if refused else "cannot be reached"
                raise QueueUnavailable(
                    f"the broker {reason} ({type(error).__name__})", hint="check AXON_AMQP_URL"
                ) from None
        time.sleep(0.2)


class Link:
    """A thread that owns one connection and never gives up connecting.

    ``on_connect(connection, generation)`` runs on that thread after every connect, ``on_tick()`` every heartbeat
    interval; if one raises an error of pika's, the link reconnects.
    """

    def __init__(
        self,
        settings: ServingSettings,
        name: str,
        on_connect: Callable[[BlockingConnection, int], None],
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._name = name
        self._on_connect = on_connect
        self._on_tick = on_tick
        self._connection: BlockingConnection | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.generation = 0
        self.connected = threading.Event()

    def start(self) -> None:
        """Begin to connect, in the background."""
        self._thread = threading.Thread(target=self._run, name=f"axon-{self._name}", daemon=True)
        self._thread.start()

    def call(self, what: Callable[[], None]) -> bool:
        """Have the thread run something on its connection. False if there is none now."""
        with self._lock:
            connection = self._connection
            if connection is None:
                return False
            try:
                connection.add_callback_threadsafe(what)
            except pika.exceptions.ConnectionWrongStateError:
                return False
            return True

    def close(self, timeout_s: float = 5.0) -> None:
        """Run what was handed over so far, close the connection, end the thread."""
        self._stopping.set()
        self.call(lambda: None)  # wakes the thread
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        backoff_s = _BACKOFF_S[0]
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self._serve(BlockingConnection(parameters(self._settings)))
            except LOST as error:
                if not self._stopping.is_set():
                    log.warning("%s: broker connection lost or refused (%s)", self._name, type(error).__name__)
            except Exception:  # whatever it is, a process without this thread would be deaf for good
                log.exception("%s: unexpected error, connecting anew", self._name)
            finally:
                self._drop()
            if time.monotonic() - started > 10:
                backoff_s = _BACKOFF_S[0]
            self._stopping.wait(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, _BACKOFF_S[1])

    def _serve(self, connection: BlockingConnection) -> None:
        self.generation += 1
        try:
            self._on_connect(connection, self.generation)
            with self._lock:
                self._connection = connection
            self.connected.set()
            next_tick = time.monotonic() + self._settings.broker_heartbeat_s
            while not self._stopping.is_set():
                if not connection.is_open:  # lost within a callback, which has dealt with the error
                    raise pika.exceptions.ConnectionClosed(0, "lost")
                connection.process_data_events(time_limit=1.0)
                if time.monotonic() >= next_tick:
                    self._on_tick()
                    next_tick = time.monotonic() + self._settings.broker_heartbeat_s
            connection.process_data_events(time_limit=0)
        finally:
            self._drop()
            if connection.is_open:
                with contextlib.suppress(*LOST):
                    connection.close()

    def _drop(self) -> None:
        with self._lock:
            self._connection = None
        self.connected.clear()
