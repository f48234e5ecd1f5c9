"""``/v1/sessions/{session_id}``: what a session remembers, and forgetting it. Sessions begin by being used."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from axon_llm.serving.http_auth import STORE_RETRY_S
from axon_llm.serving.http_errors import conflict, invalid, not_found, unavailable
from axon_llm.serving.http_service import Service
from axon_llm.serving.ports import StoreUnavailable, TurnConflict
from axon_llm.serving.wire import IDENTIFIER, Turn


async def show(service: Service, request: Request) -> ASGIApp:
    """``GET``: the committed turns, oldest first."""
    tenant, session_id = await _named(service, request)
    try:
        turns = await service.store.history(tenant, session_id)
    except StoreUnavailable as error:
        raise unavailable("The store cannot be reached.", STORE_RETRY_S) from error
    if not turns:
        raise not_found("session", session_id)
    return JSONResponse({"id": session_id, "object": "session", "turns": [_shape(turn) for turn in turns]})


async def delete(service: Service, request: Request) -> ASGIApp:
    """``DELETE``: forgets the history; 409 while a turn is running."""
    tenant, session_id = await _named(service, request)
    try:
        known = await service.store.delete_session(tenant, session_id)
    except TurnConflict:
        raise conflict(
            "A turn of this session is running; cancel it first.", "session_conflict", "session_id"
        ) from None
    except StoreUnavailable as error:
        raise unavailable("The store cannot be reached.", STORE_RETRY_S) from error
    if not known:
        raise not_found("session", session_id)
    return JSONResponse({"id": session_id, "object": "session.deleted", "deleted": True})


async def _named(service: Service, request: Request) -> tuple[str, str]:
    tenant = await service.tenant(request)
    session_id = request.path_params["session_id"]
    if not IDENTIFIER.match(session_id):
        raise invalid(
            "A session id has 1 to 128 of the characters A-Z a-z 0-9 _ . - and begins with a letter or digit.",
            "session_id",
        )
    return tenant, session_id


def _shape(turn: Turn) -> dict[str, Any]:
    return {
        "turn": turn.turn,
        "job_id": turn.job_id,
        "created": int(turn.committed_at_unix_s),
        "messages": [message.model_dump(exclude_none=True) for message in turn.messages],
    }
