"""What uvicorn leaves open at the edge of a connection: endless, huge and folded heads, and errors in plain text.

Behind nginx none of this is reached; ``axon serve`` and tests without a gateway rely on it.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from axon_llm.serving.http_errors import ApiError

_FOLDED = re.compile(rb"\n[ \t]")


class StrictProtocol(H11Protocol):
    """HTTP/1.1 with limits of time and size on heads, no line folding, and OpenAI's error shape for what is malformed.

    A client that takes nothing is cut off, whatever it was sent. The time-outs are set on a subclass by
    ``strict_protocol``.
    """

    header_timeout_s = 10.0
    send_timeout_s = 60.0
    _unread_timer: asyncio.TimerHandle | None = None
    _head_timer: asyncio.TimerHandle | None = None
    _head = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A head is expected from now on."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # to be told of everything that the client has not taken
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is expected any more."""
        self._stop_timer()
        self._stop_unread_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client has not taken all. It may be slow, but not stand still: closing would wait for it."""
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._stop_unread_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Looks at a head before h11 unfolds it, and stops the clock once it is whole."""
        if self.conn.their_state is h11.IDLE:
            if self._head_timer is None:
                self._expect_head()  # the first bytes of another request on a kept connection
            self._head += data
            end = re.search(rb"\n\r?\n", self._head)
            head = self._head[: end.start() + 1] if end else self._head
            fault = ""
            if len(head) > (self.config.h11_max_incomplete_event_size or len(head)):
                fault = f"The head of the request is larger than {self.config.h11_max_incomplete_event_size:,} bytes."
            elif _FOLDED.search(head):
                fault = "A header is folded over several lines."
            if end or fault:
                self._head = b""
                self._stop_timer()
            if fault:
                self.send_400_response(fault)
                return
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP, and closes."""
        body = ApiError(400, msg, code="invalid_http").encoded()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE, h11.ERROR):
            head = (
                "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self.header_timeout_s, self._give_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _watch_unread(self) -> None:
        unread = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < unread:
                self._watch_unread()
            else:
                self.transport.abort()

        self._unread_timer = self.loop.call_later(self.send_timeout_s, look)

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


def strict_protocol(header_timeout_s: float, send_timeout_s: float) -> type[StrictProtocol]:
    """The protocol class with its time limits, as uvicorn wants it."""
    attributes: dict[str, Any] = {"header_timeout_s": header_timeout_s, "send_timeout_s": send_timeout_s}
    return type("StrictProtocol", (StrictProtocol,), attributes)
