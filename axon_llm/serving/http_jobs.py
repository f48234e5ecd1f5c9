"""``/v1/jobs``: the state of a job, its events from any point on, and its cancellation.

A job's id is its completion's id. Any session manager can answer, whichever took the job. Reading a job's events never
cancels it: only the request that asked for the completion carries that weight.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from axon_llm.serving.http_auth import STORE_RETRY_S
from axon_llm.serving.http_errors import ApiError, invalid, not_found, unavailable
from axon_llm.serving.http_generate import CHAT_PREFIX
from axon_llm.serving.http_service import Service
from axon_llm.serving.http_stream import JobAnswer, failure
from axon_llm.serving.openai_responses import Answer, usage
from axon_llm.serving.ports import JobNotFound, StoreUnavailable
from axon_llm.serving.wire import IDENTIFIER, JobRef, JobStatus

MAX_SEQUENCE_DIGITS = 12


async def show(service: Service, request: Request) -> ASGIApp:
    """``GET /v1/jobs/{job_id}``."""
    status = await _status(service, request)
    return JSONResponse(_shape(status))


async def cancel(service: Service, request: Request) -> ASGIApp:
    """``POST /v1/jobs/{job_id}/cancel`` and ``DELETE /v1/jobs/{job_id}``: ends it soon; what was generated stays."""
    status = await _status(service, request)
    try:
        status = await service.store.cancel(status.ref)
    except JobNotFound:
        raise not_found("job", status.ref.job_id) from None
    except StoreUnavailable as error:
        raise _store_away() from error
    return JSONResponse(_shape(status))


async def events(service: Service, request: Request) -> ASGIApp:
    """``GET /v1/jobs/{job_id}/events``: the stream after the entry named by ``after`` or ``Last-Event-ID``."""
    status = await _status(service, request)
    after = _after(request, status)
    answer = Answer(
        status.ref.job_id,
        status.model,
        status.created_at_unix_s,
        chat=status.ref.job_id.startswith(CHAT_PREFIX),
        include_usage=request.query_params.get("include_usage") in ("1", "true"),
        resumed=after > 0,
    )
    finished = status.terminal if after == status.next_seq - 1 else None
    place = await service.place(status.ref.tenant, status.model)
    return JobAnswer(
        service,
        status.ref,
        answer,
        place,
        stream=True,
        after=after,
        with_ids=True,
        finished=finished,
        deadline_unix_s=status.deadline_unix_s,
    )


def _after(request: Request, status: JobStatus) -> int:
    given = request.query_params.getlist("after") or request.headers.getlist("last-event-id") or ["0"]
    text = given[0]
    if len(given) > 1 or not (text.isascii() and text.isdecimal() and len(text) <= MAX_SEQUENCE_DIGITS):
        raise invalid("`after` must be the sequence number of an entry: an integer, 0 or more.", "after")
    if int(text) >= status.next_seq:
        raise invalid(f"`after` is {int(text)}; the last entry is number {status.next_seq - 1}.", "after")
    return int(text)


async def _status(service: Service, request: Request) -> JobStatus:
    tenant = await service.tenant(request)
    job_id = request.path_params["job_id"]
    if not IDENTIFIER.match(job_id):
        raise not_found("job", "…")
    request.state.job_id = job_id
    try:
        ref: JobRef = await service.store.find(tenant, job_id)
        return await service.store.status(ref)
    except JobNotFound:
        raise not_found("job", job_id) from None
    except StoreUnavailable as error:
        raise _store_away() from error


def _store_away() -> ApiError:
    return unavailable("The store cannot be reached.", STORE_RETRY_S)


def _shape(status: JobStatus) -> dict[str, Any]:
    terminal = status.terminal
    shape: dict[str, Any] = {
        "id": status.ref.job_id,
        "object": "job",
        "model": status.model,
        "session_id": status.ref.session_id,
        "state": status.state,
        "created": int(status.created_at_unix_s),
        "deadline": int(status.deadline_unix_s),
        "last_sequence": status.next_seq - 1,
        "attempts": status.attempts,
        "cancel_requested": status.cancel_requested,
        "finish_reason": terminal.finish_reason if terminal else None,
        "usage": usage(terminal.usage) if terminal and terminal.usage else None,
        "error": failure(terminal).body()["error"] if terminal and terminal.error else None,
    }
    if terminal and terminal.timings:
        shape["timings"] = terminal.timings.model_dump(exclude_none=True)
    return shape
