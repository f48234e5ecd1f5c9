"""``/v1/models``, ``/health`` and ``/ready``. None of them waits for a worker."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from axon_llm.serving.http_capacity import unknown_model
from axon_llm.serving.http_service import Service
from axon_llm.serving.ports import StoreUnavailable
from axon_llm.serving.wire import ModelCard

READY_TIMEOUT_S = 2.0


async def list_models(service: Service, request: Request) -> ASGIApp:
    """``GET /v1/models``: what the workers announce at this moment."""
    await service.tenant(request)
    return JSONResponse({"object": "list", "data": [_shape(card) for card in await service.capacity.models()]})


async def show_model(service: Service, request: Request) -> ASGIApp:
    """``GET /v1/models/{model}``; hub names hold a slash, so the rest of the path is the name."""
    await service.tenant(request)
    name = request.path_params["model"]
    for card in await service.capacity.models():
        if card.id == name:
            return JSONResponse(_shape(card))
    raise unknown_model(name)


async def health(service: Service, request: Request) -> ASGIApp:
    """``GET /health``: this process lives and its event loop turns."""
    return JSONResponse({"status": "ok"})


async def ready(service: Service, request: Request) -> ASGIApp:
    """``GET /ready``: store and queue can be used and no end is near; 503 with the parts that fail."""
    parts = {"store": "ok", "queue": "ok" if service.queue.connected else "not connected"}
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await service.store.ping()
    except (StoreUnavailable, TimeoutError):
        parts["store"] = "does not answer"
    if service.stopping:
        parts["process"] = "stopping"
    ok = all(part == "ok" for part in parts.values())
    return JSONResponse({"status": "ok" if ok else "unavailable", **parts}, status_code=200 if ok else 503)


def _shape(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created_unix_s,
        "owned_by": card.owned_by,
        "max_model_len": card.max_seq_len,
    }
