"""The session manager's HTTP application: routes, and what surrounds every one of them.

Around each request: a trace id (the client's, if it is one), errors in OpenAI's shape, one line in the log, and
metrics. The log line names the route, ids and figures; never a body, a key or a query. Read ``http_generate.py`` next.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from axon_llm.serving import http_jobs, http_models, http_sessions
from axon_llm.serving.http_auth import STORE_RETRY_S, Gateway, check
from axon_llm.serving.http_body import body_is_read
from axon_llm.serving.http_errors import ApiError, unavailable
from axon_llm.serving.http_generate import generate
from axon_llm.serving.http_service import Service
from axon_llm.serving.ports import QueueUnavailable, StoreUnavailable

TRACE_HEADER = "x-request-id"
METHODS = ("GET", "HEAD", "POST", "DELETE")
# Hexadecimal, as UUIDs and nginx have it: it ends in logs, where nothing belongs that a user may have typed.
_TRACE_ID = re.compile(r"[0-9a-fA-F][0-9a-fA-F-]{7,63}")

log = logging.getLogger("axon.http")

Handler = Callable[[Service, Request], Awaitable[ASGIApp]]


def build_app(service: Service) -> ASGIApp:
    """The application over one store, one queue and one way to know tenants."""

    def route(path: str, handler: Handler, *methods: str) -> Route:
        async def endpoint(request: Request) -> ASGIApp:
            return await handler(service, request)

        return Route(path, endpoint, methods=list(methods or ("GET",)))

    routes = [
        route("/v1/chat/completions", partial(generate, chat=True), "POST"),
        route("/v1/completions", partial(generate, chat=False), "POST"),
        route("/v1/models", http_models.list_models),
        route("/v1/models/{model:path}", http_models.show_model),
        route("/v1/jobs/{job_id}", http_jobs.show),
        route("/v1/jobs/{job_id}", http_jobs.cancel, "DELETE"),
        route("/v1/jobs/{job_id}/cancel", http_jobs.cancel, "POST"),
        route("/v1/jobs/{job_id}/events", http_jobs.events),
        route("/v1/sessions/{session_id}", http_sessions.show),
        route("/v1/sessions/{session_id}", http_sessions.delete, "DELETE"),
        route("/health", http_models.health),
        route("/ready", http_models.ready),
    ]
    identify, keys = service.identify, service.keys
    if isinstance(identify, Gateway) and keys is not None:
        gateway = identify

        async def auth(request: Request) -> Response:
            return await check(request, gateway, keys)

        routes.append(Route("/internal/auth", auth, methods=["GET"]))
    handlers: dict[Any, Any] = {
        ApiError: partial(_refuse, service),
        HTTPException: partial(_refuse_unrouted, service),
        StoreUnavailable: partial(_refuse_unavailable, service),
        QueueUnavailable: partial(_refuse_unavailable, service),
        Exception: partial(_refuse_crashed, service),
    }
    return _Surroundings(Starlette(routes=routes, exception_handlers=handlers), service)


async def _refuse(service: Service, request: Request, error: ApiError) -> Response:
    service.metrics.refused.labels(error.code).inc()
    headers = error.headers()
    if not body_is_read(request):
        headers["connection"] = "close"  # the rest of it is not wanted, and might never come
    return Response(error.encoded(), error.status, headers, media_type="application/json")


async def _refuse_unrouted(service: Service, request: Request, error: HTTPException) -> Response:
    if error.status_code == 404:
        refusal = ApiError(404, "There is nothing at this path.", code="unknown_path")
    elif error.status_code == 405:
        refusal = ApiError(405, f"{request.method} is not possible here.", code="method_not_allowed")
    else:
        refusal = ApiError(error.status_code, error.detail, code="http_error")
    response = await _refuse(service, request, refusal)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _refuse_unavailable(service: Service, request: Request, error: Exception) -> Response:
    return await _refuse(service, request, unavailable("A part of the service cannot be reached.", STORE_RETRY_S))


async def _refuse_crashed(service: Service, request: Request, error: Exception) -> Response:
    message = "Something went wrong here; the log has more under this request id."
    return await _refuse(service, request, ApiError(500, message, code="internal_error"))


class _Surroundings:
    """Trace id, security headers, the answer to a crash, the access log and metrics, around the application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes one request through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["trace_id"] = _trace_id(scope)
        started = time.monotonic()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[TRACE_HEADER] = state["trace_id"]
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            # The client has its 500 by now, or a broken stream. The traceback names code, not data.
            log.exception("request %s failed", state["trace_id"])
        finally:
            self._note(scope, status, time.monotonic() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        # A method that the path does not know may be anything; a label of its own each would fill the memory.
        method = scope["method"] if scope["method"] in METHODS and route != "unknown" else "-"
        state = scope["state"]
        metrics = self._service.metrics
        metrics.requests.labels(route, method, status or "none").inc()
        metrics.request_seconds.labels(route).observe(seconds)
        if route in ("/health", "/ready", "/internal/auth"):
            return
        log.info(
            "%s %s %s %.1fms tenant=%s job=%s trace=%s",
            method,
            route,
            status or "none",
            seconds * 1e3,
            state.get("tenant", "-"),
            state.get("job_id", "-"),
            state["trace_id"],
        )


def _trace_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == TRACE_HEADER.encode():
            text = value.decode("latin-1")
            if _TRACE_ID.fullmatch(text):
                return str(text)
    return secrets.token_hex(16)
