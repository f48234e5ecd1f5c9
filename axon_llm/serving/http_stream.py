"""From a job's token log to one HTTP answer, streamed or whole.

The status line waits for the first entry, so that an error before the first token is an HTTP error and not a broken
stream. A client that goes away is noticed at once, whether the stream is moving or not. Which worker writes the log,
and through which session manager the job came, does not matter here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.types import Receive, Scope, Send

from axon_llm.serving import sse
from axon_llm.serving.http_auth import STORE_RETRY_S
from axon_llm.serving.http_errors import ApiError, not_found, unavailable
from axon_llm.serving.http_service import Place, Service
from axon_llm.serving.openai_responses import Answer
from axon_llm.serving.ports import JobNotFound, StoreUnavailable
from axon_llm.serving.wire import JobRef, LogEntry, Terminal

_STREAM_HEADERS = {
    "content-type": sse.CONTENT_TYPE,
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}


class JobAnswer:
    """An ASGI response that follows one job.

    Args:
        service: the shared state.
        ref: the job.
        answer: the shapes to send.
        place: left when the answer is over.
        stream: server-sent events, else one JSON object.
        after: the last log entry the client has.
        with_ids: give every event its ``id``, for ``EventSource``.
        submitted: the request that is answered has made the job.
        finished: how the job ended, if the client has the last entry: nothing is to be read, only the end to be said.
        on_gone: called when the client leaves before the end, unless this process is stopping.
        deadline_unix_s: of the job, where it is known.
    """

    def __init__(
        self,
        service: Service,
        ref: JobRef,
        answer: Answer,
        place: Place,
        *,
        stream: bool,
        after: int = 0,
        with_ids: bool = False,
        submitted: bool = False,
        finished: Terminal | None = None,
        on_gone: Callable[[], None] | None = None,
        deadline_unix_s: float | None = None,
    ) -> None:
        self._service = service
        self._ref = ref
        self._answer = answer
        self._place = place
        self._stream = stream
        self._after = after
        self._with_ids = with_ids
        self._submitted = submitted
        self._finished = finished
        self._on_gone = on_gone
        self._deadline_unix_s = deadline_unix_s
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, while watching for the client's leaving."""
        with self._place:
            await self._answer_or_leave(receive, send)

    async def _answer_or_leave(self, receive: Receive, send: Send) -> None:
        reply = asyncio.ensure_future(self._reply(send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({reply, gone}, return_when=asyncio.FIRST_COMPLETED)
            if reply.done():
                reply.result()
            elif not self._service.stopping:
                self._left()
        except asyncio.CancelledError:
            if not self._service.stopping:
                raise
            if not self._started:
                message = f"This server is stopping; the job goes on as {self._ref.job_id}."
                raise unavailable(message, STORE_RETRY_S, "server_stopping") from None
        finally:
            for task in (reply, gone):
                task.cancel()
            await asyncio.gather(reply, gone, return_exceptions=True)

    def _left(self) -> None:
        self._service.metrics.disconnects.inc()
        if self._on_gone is not None:
            self._on_gone()

    async def _reply(self, send: Send) -> None:
        idle_s = self._service.settings.heartbeat_s
        if self._finished is not None:
            await self._start(send, _STREAM_HEADERS)
            await self._send_end(self._finished, send)
            return
        events = self._service.store.stream(
            self._ref, after=self._after, idle_s=idle_s, deadline_unix_s=self._deadline_unix_s
        )
        async with contextlib.aclosing(_translated(events, self._ref)) as entries:
            if self._stream:
                await self._send_events(entries, send)
            else:
                await self._send_whole(entries, send)

    async def _send_events(self, entries: AsyncIterator[LogEntry | None], send: Send) -> None:
        started = time.monotonic()
        terminal: Terminal | None = None
        try:
            async for entry in entries:
                if entry is None:
                    if self._started:
                        await send(_body(sse.HEARTBEAT))
                    continue
                terminal = entry.terminal
                if terminal is not None and terminal.error is not None:
                    raise failure(terminal)
                self._clock(entry, started)
                if not self._started:
                    await self._start(send, _STREAM_HEADERS)
                chunk = self._answer.chunk(entry)
                if chunk is not None:
                    await send(_body(sse.encode(chunk, entry.seq if self._with_ids else None)))
        except ApiError as error:
            if not self._started:
                raise
            await send(_body(sse.encode(error.body())))
            await send(_body(sse.DONE, more=False))
        else:
            if not self._started:
                await self._start(send, _STREAM_HEADERS)
            await self._send_end(terminal, send)

    async def _send_end(self, terminal: Terminal | None, send: Send) -> None:
        """What follows the last entry: the error or the usage where there is one, then the end."""
        if terminal is not None and terminal.error is not None:
            await send(_body(sse.encode(failure(terminal).body())))
        elif terminal is not None and (usage := self._answer.usage_chunk(terminal)) is not None:
            await send(_body(sse.encode(usage)))
        await send(_body(sse.DONE, more=False))

    async def _send_whole(self, entries: AsyncIterator[LogEntry | None], send: Send) -> None:
        started = time.monotonic()
        collected: list[LogEntry] = []
        terminal: Terminal | None = None
        async for entry in entries:
            if entry is not None:
                self._clock(entry, started)
                collected.append(entry)
                terminal = entry.terminal
        if terminal is None:
            raise not_found("job", self._ref.job_id)
        if terminal.error is not None:
            raise failure(terminal)
        body = json.dumps(self._answer.whole(collected, terminal)).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "cache-control": "no-store"}
        await self._start(send, headers)
        await send(_body(body, more=False))

    def _clock(self, entry: LogEntry, started: float) -> None:
        """Count the time to the first token for the request that made the job, not for one that follows it later."""
        failed = entry.terminal is not None and entry.terminal.error is not None
        if entry.seq == 1 and self._submitted and not failed:
            self._service.metrics.first_token_seconds.observe(time.monotonic() - started)

    async def _start(self, send: Send, headers: dict[str, str]) -> None:
        self._started = True
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        pairs.append((b"x-axon-job-id", self._ref.job_id.encode()))
        await send({"type": "http.response.start", "status": 200, "headers": pairs})


def failure(terminal: Terminal) -> ApiError:
    """The HTTP error for a job that failed."""
    assert terminal.error is not None
    error = terminal.error
    retry_s = STORE_RETRY_S if error.http_status in (429, 503) else None
    return ApiError(error.http_status, error.message, code=error.code, param=error.param, retry_after_s=retry_s)


async def _translated(events: AsyncIterator[LogEntry | None], ref: JobRef) -> AsyncGenerator[LogEntry | None, None]:
    """The store's entries, its errors turned into the client's; closing it closes the subscription."""
    try:
        async for entry in events:
            yield entry
    except JobNotFound:
        raise not_found("job", ref.job_id) from None
    except StoreUnavailable as error:
        raise unavailable("The token log cannot be read at the moment.", STORE_RETRY_S) from error
    finally:
        close: Callable[[], Awaitable[None]] | None = getattr(events, "aclose", None)
        if close is not None:
            await close()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(data: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}
