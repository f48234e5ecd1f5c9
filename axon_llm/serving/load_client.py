"""One streamed completion over HTTP, timed: what a load test does many times at once.

A connection of its own for each request, as separate users have. Only the standard library and h11. Knows nothing of
schedules and reports. Next: ``load.py``.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import h11

from axon_llm.errors import ServiceUnavailable, UsageError

_READ_BYTES = 65536


@dataclass(frozen=True)
class Target:
    """An OpenAI-compatible server.

    Args:
        base_url: up to and including ``/v1``.
        api_key: sent as a bearer token, where given.
    """

    base_url: str
    api_key: str = field(default="", repr=False)

    @classmethod
    def of(cls, url: str, api_key: str = "") -> Target:
        """From what a user typed: ``/v1`` may be left out.

        Raises:
            UsageError: not an http or https URL, or a key that no header can carry; the key itself is not shown.
        """
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            (parts.hostname or "").encode("idna")  # as the look-up of the name does; a label may be too long
        except ValueError:  # a bracket that is not closed, a port beyond 65535
            sound = False
        if not sound or not _is_plain(url):
            raise UsageError(f"{url!r} is not an http:// or https:// URL.", "Such as http://127.0.0.1:8000.")
        if api_key and not _is_plain(api_key):
            place = next(index for index, character in enumerate(api_key, 1) if not _is_plain(character))
            raise UsageError(f"Character {place} of the API key is not printable ASCII.", "Was it copied whole?")
        path = parts.path.rstrip("/")
        return cls(f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}", api_key)


@dataclass
class Sample:
    """One request as its client saw it; moments are ``time.monotonic()`` seconds.

    Attributes:
        due: when it was to be sent; latencies count from here, so that a late client does not flatter the server.
        chunks: when each piece of text came.
        ended: when the stream was complete, or failed.
        prompt_tokens: from the server's usage; 0 where it sent none.
        output_tokens: likewise; the number of chunks where it sent none.
        cached_tokens: of the prompt, found in the cache.
        error: why it failed; empty where it did not.
    """

    due: float
    chunks: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Due → first text."""
        return self.chunks[0] - self.due

    @property
    def tpot_s(self) -> float | None:
        """(Last − first text) / (tokens − 1); ``None`` with fewer than two tokens."""
        return (self.chunks[-1] - self.chunks[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itls_s(self) -> list[float]:
        """Each gap between two pieces of text."""
        return [later - earlier for earlier, later in zip(self.chunks, self.chunks[1:], strict=False)]

    @property
    def e2el_s(self) -> float:
        """Due → end of the stream."""
        return self.ended - self.due


async def measure(target: Target, path: str, body: dict[str, Any], due: float, timeout_s: float) -> Sample:
    """Sends one streamed request and times it. Never raises for what a server can do wrong: the sample says it."""
    sample = Sample(due)
    try:
        async with asyncio.timeout(timeout_s):
            async for line in _lines(target, "POST", path, body):
                _take(sample, line)
    except TimeoutError:
        sample.error = f"no end within {timeout_s:g} s"
    except (OSError, h11.ProtocolError, _RefusedError) as error:
        sample.error = str(error) or type(error).__name__
    sample.ended = time.monotonic()
    if not sample.error and not sample.chunks:
        sample.error = "the answer held no text"
    sample.output_tokens = sample.output_tokens or len(sample.chunks)
    return sample


async def first_model(target: Target) -> str:
    """The name of the first model that the server lists.

    Raises:
        ServiceUnavailable: it cannot be reached, refuses, or lists none.
    """
    try:
        async with asyncio.timeout(10):
            text = b"".join([line async for line in _lines(target, "GET", "/models", None)])
        return str(json.loads(text)["data"][0]["id"])
    except (OSError, TimeoutError, h11.ProtocolError, _RefusedError) as error:
        raise ServiceUnavailable(
            f"{target.base_url} does not list its models: {str(error) or type(error).__name__}."
        ) from error
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ServiceUnavailable(f"{target.base_url} lists no model.", "Is a worker running?") from None


class _RefusedError(Exception):
    """The server answered with an error, with what cannot be read, or not at all."""


def _is_plain(text: str) -> bool:
    """Whether a request's head may hold it: printable ASCII without spaces."""
    return all("!" <= character <= "~" for character in text)


def _take(sample: Sample, line: bytes) -> None:
    now = time.monotonic()
    if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
        return
    try:
        chunk = json.loads(line[5:])
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or a thousand brackets deep
        chunk = None
    choices = (chunk.get("choices") or []) if isinstance(chunk, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise _RefusedError(f"not a chunk of a completion: {_beginning(line)}")
    if error := chunk.get("error"):  # some servers write "error": null into every chunk
        raise _RefusedError(_message_of(error) or "error in the stream")
    for choice in choices:
        if choice.get("text") or _within(choice, "delta").get("content"):
            sample.chunks.append(now)
    if usage := _within(chunk, "usage"):
        sample.prompt_tokens = _count(usage, "prompt_tokens")
        sample.output_tokens = _count(usage, "completion_tokens")
        sample.cached_tokens = _count(_within(usage, "prompt_tokens_details"), "cached_tokens")


def _within(holder: dict[str, Any], name: str) -> dict[str, Any]:
    """The object of that name; an empty one where there is none."""
    found = holder.get(name)
    return found if isinstance(found, dict) else {}


def _count(usage: dict[str, Any], name: str) -> int:
    """A number of tokens; 0 where the server sent none."""
    found = usage.get(name)
    return found if type(found) is int and found > 0 else 0


def _message_of(error: Any) -> str:
    """What an ``error`` says: OpenAI's object with a ``message``, or the text itself."""
    return str(error.get("message") or "") if isinstance(error, dict) else str(error)


def _beginning(text: bytes) -> str:
    return text[:200].decode(errors="replace")


async def _lines(target: Target, method: str, path: str, body: dict[str, Any] | None) -> AsyncIterator[bytes]:
    """The lines of the answer's body as they come."""
    url = urlsplit(target.base_url)
    secure = ssl.create_default_context() if url.scheme == "https" else None
    reader, writer = await asyncio.open_connection(url.hostname, url.port or (443 if secure else 80), ssl=secure)
    try:
        connection = h11.Connection(h11.CLIENT)
        data = json.dumps(body).encode() if body is not None else b""
        headers = [("host", url.netloc), ("content-length", str(len(data))), ("connection", "close")]
        if body is not None:
            headers.append(("content-type", "application/json"))
        if target.api_key:
            headers.append(("authorization", f"Bearer {target.api_key}"))
        request = h11.Request(method=method, target=url.path + path, headers=headers)
        writer.write(
            (connection.send(request) or b"")
            + (connection.send(h11.Data(data=data)) or b"")
            + (connection.send(h11.EndOfMessage()) or b"")
        )
        status, pending = 0, b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(_READ_BYTES)
                if not data and connection.their_state is h11.SEND_RESPONSE:
                    raise _RefusedError("the connection ended before an answer began")
                connection.receive_data(data)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                pending += bytes(event.data)
                if status == 200:  # the body of a refusal is read whole
                    *lines, pending = pending.split(b"\n")
                    for line in lines:
                        yield line
            elif isinstance(event, h11.EndOfMessage):
                break
        if status != 200:
            raise _RefusedError(f"HTTP {status}: {_message(pending)}")
        if pending:
            yield pending
    finally:
        writer.close()


def _message(body: bytes) -> str:
    try:
        return _message_of(json.loads(body)["error"]) or _beginning(body)
    except (ValueError, LookupError, TypeError, RecursionError):
        return _beginning(body)
