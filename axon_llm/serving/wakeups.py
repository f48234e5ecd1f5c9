"""One Pub/Sub connection for all streams of a process.

Wake-ups may be lost, doubled or late, and the connection may be cut at any time; a stream that has missed something
finds out from the sequence numbers and reads the log. What is kept for a slow stream is bounded: past that its buffer
is dropped and it reads the log. Belongs to one event loop. Next: ``session_store.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from types import TracebackType
from typing import Any

import redis.exceptions

BUFFERED_MESSAGES = 256
PING_S = 2.0
SILENCE_S = 7.0
_BACKOFF_S = (0.05, 1.0)

log = logging.getLogger("axon.streams")


class Subscription:
    """The live messages of one channel, for one stream. Use as an asynchronous context manager."""

    def __init__(self, hub: WakeUps, channel: str) -> None:
        self._hub = hub
        self._channel = channel
        self._messages: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self.confirmed = asyncio.Event()

    def push(self, message: bytes) -> None:
        """Hand a message over; drop all of them when the stream is too slow, it will read the log."""
        if len(self._messages) >= BUFFERED_MESSAGES:
            self._messages.clear()
        self._messages.append(message)
        self._wake.set()

    def nudge(self) -> None:
        """Make the stream look at the log."""
        self._wake.set()

    async def wait(self, timeout_s: float) -> list[bytes] | None:
        """Return the messages that came, an empty list for a nudge, None after ``timeout_s`` seconds of nothing."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return None
        self._wake.clear()
        messages = list(self._messages)
        self._messages.clear()
        return messages

    async def __aenter__(self) -> Subscription:
        await self._hub._add(self._channel, self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hub._remove(self._channel, self)


class WakeUps:
    """Subscribes to the channels that streams of this process listen to, and reconnects for as long as it takes."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._streams: dict[str, set[Subscription]] = {}
        self._confirmed: set[str] = set()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def subscribe(self, channel: str) -> Subscription:
        """Return a subscription to use with ``async with``."""
        return Subscription(self, channel)

    async def close(self) -> None:
        """Stop listening and wake every stream."""
        if self._task is not None:
            # Again and again: a cancellation that comes while the task is waiting for its reader to be cancelled looks
            # like the reader's, and is passed over there.
            while not self._task.done():
                self._task.cancel()
                await asyncio.wait({self._task}, timeout=0.1)
            self._task = None
        self._nudge_all()

    async def _add(self, channel: str, stream: Subscription) -> None:
        self._streams.setdefault(channel, set()).add(stream)
        if channel in self._confirmed:
            stream.confirmed.set()
        self._changed.set()
        if self._task is None:
            self._task = asyncio.create_task(self._listen(), name="axon-wake-ups")

    def _remove(self, channel: str, stream: Subscription) -> None:
        streams = self._streams.get(channel, set())
        streams.discard(stream)
        if not streams:
            self._streams.pop(channel, None)
            self._changed.set()

    def _nudge_all(self) -> None:
        for streams in self._streams.values():
            for stream in streams:
                stream.nudge()

    async def _listen(self) -> None:
        backoff_s = _BACKOFF_S[0]
        while True:
            started = time.monotonic()
            connection = self._client.connection_pool.make_connection()
            try:
                await connection.connect()
                await self._serve(connection)
            except Exception as error:  # whatever it is, without this task every stream would have to poll
                log.info("the subscription connection was lost (%s)", type(error).__name__)
            finally:
                self._confirmed.clear()
                with contextlib.suppress(redis.exceptions.RedisError, OSError):
                    await connection.disconnect(nowait=True)
            self._nudge_all()  # whatever was published meanwhile is in the logs
            if time.monotonic() - started > 5:
                backoff_s = _BACKOFF_S[0]
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, _BACKOFF_S[1])

    async def _serve(self, connection: Any) -> None:
        """Keep the connection subscribed to what is wanted. One task reads, this one writes."""
        reader = asyncio.create_task(self._read(connection))
        try:
            subscribed: set[str] = set()
            while True:
                self._changed.clear()
                wanted = set(self._streams)
                for command, channels in (("SUBSCRIBE", wanted - subscribed), ("UNSUBSCRIBE", subscribed - wanted)):
                    if channels:
                        await connection.send_command(command, *channels, check_health=False)
                self._confirmed &= wanted
                subscribed = wanted
                await connection.send_command("PING", check_health=False)
                changed = asyncio.create_task(self._changed.wait())
                try:
                    await asyncio.wait({reader, changed}, timeout=PING_S, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
                if reader.done():
                    reader.result()
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await reader

    async def _read(self, connection: Any) -> None:
        while True:
            # Answers to the pings come all the time: silence means that the connection is dead.
            reply = await connection.read_response(timeout=SILENCE_S)
            if reply is None:
                raise redis.exceptions.ConnectionError(f"nothing came for {SILENCE_S:g} s")
            if isinstance(reply, list) and reply[0] in (b"message", b"subscribe"):
                streams = self._streams.get(reply[1].decode(), set())
                if reply[0] == b"subscribe":
                    self._confirmed.add(reply[1].decode())
                for stream in streams:
                    if reply[0] == b"subscribe":
                        stream.confirmed.set()
                    else:
                        stream.push(reply[2])
