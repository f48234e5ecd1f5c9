"""Reading a request's body: what kind it must be, how large, and how long it may take to come."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request

from axon_llm.serving.http_errors import ApiError, invalid
from axon_llm.serving.http_json import parse_object


async def read_object(request: Request, *, max_bytes: int, timeout_s: float) -> dict[str, Any]:
    """Reads one JSON object.

    Raises:
        ApiError: 415 not plain JSON · 413 longer than ``max_bytes`` · 408 not here within ``timeout_s`` · 400 not a
            JSON object, or a length said in two ways.
    """
    _check_headers(request, max_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {timeout_s:g} s.", code="request_timeout") from None
    except ClientDisconnect:
        raise invalid("The connection ended before the body did.", code="incomplete_body") from None
    request.state.body_is_read = True
    return parse_object(b"".join(chunks))


def body_is_read(request: Request) -> bool:
    """Whether nothing more of a request can come."""
    if getattr(request.state, "body_is_read", False):
        return True
    return request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers


def _check_headers(request: Request, max_bytes: int) -> None:
    headers = request.headers
    kinds = headers.getlist("content-type")
    kind, _, parameters = kinds[0].partition(";") if len(kinds) == 1 else ("", "", "")
    charset = parameters.strip().lower().replace('"', "")
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8", "charset=utf8"):
        raise ApiError(415, "The content type must be application/json, in UTF-8.", code="unsupported_media_type")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        # A compressed body is refused unread: inflating it would let a small request fill the memory.
        raise ApiError(415, "Compressed bodies are not accepted.", code="unsupported_media_type")
    lengths = headers.getlist("content-length")
    if lengths and "transfer-encoding" in headers:
        raise invalid("Content-Length and Transfer-Encoding contradict each other.", code="ambiguous_length")
    if lengths and lengths[0].isdecimal() and int(lengths[0][:20]) > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The body is larger than {max_bytes:,} bytes.", code="request_too_large")
