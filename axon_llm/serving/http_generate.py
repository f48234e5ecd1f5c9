"""``POST /v1/chat/completions`` and ``/v1/completions``: a request becomes a job, and the job's log the answer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import time
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from axon_llm.serving.http_auth import STORE_RETRY_S
from axon_llm.serving.http_body import read_object
from axon_llm.serving.http_errors import ApiError, conflict, invalid, unavailable
from axon_llm.serving.http_service import Service
from axon_llm.serving.http_stream import JobAnswer
from axon_llm.serving.openai_requests import Generation, read_generation
from axon_llm.serving.openai_responses import Answer
from axon_llm.serving.ports import (
    IdempotencyConflict,
    JobNotFound,
    QueueFull,
    QueueUnavailable,
    StoreUnavailable,
    TurnConflict,
)
from axon_llm.serving.wire import IDENTIFIER, Job, JobRef, Message, ModelCard, Sampling

SESSION_HEADER = "x-session-id"
IDEMPOTENCY_HEADER = "idempotency-key"
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
CHAT_PREFIX, TEXT_PREFIX = "chatcmpl-", "cmpl-"


async def generate(service: Service, request: Request, *, chat: bool) -> ASGIApp:
    """Validates, submits and returns the response that follows the job."""
    tenant = await service.tenant(request)
    settings = service.settings
    body = await read_object(request, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    generation = _with_session(read_generation(body, chat=chat), request)
    idempotency_key = _idempotency_key(request)
    card = await service.capacity.model(generation.model)
    if card is not None:
        generation = replace(generation, sampling={**card.generation_defaults, **generation.sampling})
        check_fits(generation, card)
    place = await service.place(tenant, generation.model)
    try:
        submitted = await _submit(service, request, tenant, generation, idempotency_key, body)
    except BaseException as error:
        place.leave()
        if isinstance(error, StoreUnavailable):
            raise unavailable("The store cannot be reached; try again.", STORE_RETRY_S) from error
        raise
    ref, created_unix_s, deadline_unix_s, fresh = submitted
    answer = Answer(ref.job_id, generation.model, created_unix_s, chat=chat, include_usage=generation.include_usage)
    keep = generation.on_disconnect == "continue" or (generation.on_disconnect is None and idempotency_key is not None)
    return JobAnswer(
        service,
        ref,
        answer,
        place,
        stream=generation.stream,
        submitted=fresh,
        on_gone=None if keep else lambda: service.spawn(service.cancel(ref)),
        deadline_unix_s=deadline_unix_s,
    )


def check_fits(generation: Generation, card: ModelCard) -> None:
    """Refuses what can be seen not to fit the model without counting the text's tokens; the worker counts those."""
    limit = generation.sampling.get("max_tokens", 1)
    length = len(generation.prompt) if isinstance(generation.prompt, tuple) else 1
    if length + limit > card.max_seq_len:
        raise invalid(
            f"The prompt ({length:,} tokens or more) and max_tokens ({limit:,}) exceed the context of "
            f"`{card.id}`, {card.max_seq_len:,} tokens.",
            "max_tokens" if length < card.max_seq_len else "prompt",
            "context_length_exceeded",
        )
    if generation.chat and not card.has_chat_template:
        raise invalid(f"`{card.id}` has no chat template; use /v1/completions.", "messages", "no_chat_template")
    if isinstance(generation.prompt, tuple) and max(generation.prompt) >= card.vocab_size:
        raise invalid(f"A token id is outside the vocabulary of {card.vocab_size:,} tokens.", "prompt")
    for name in ("logit_bias", "stop_token_ids"):
        if any(token >= card.vocab_size for token in generation.sampling[name]):
            raise invalid(f"A token id in `{name}` is outside the vocabulary of {card.vocab_size:,} tokens.", name)


async def _submit(
    service: Service,
    request: Request,
    tenant: str,
    generation: Generation,
    idempotency_key: str | None,
    body: dict[str, Any],
) -> tuple[JobRef, float, float, bool]:
    """Stores and publishes the job, or finds the one an earlier request with the same key made.

    Returns:
        Where it lives, when it was made and its deadline, in seconds since 1970; whether it was made now.
    """
    job_id = (CHAT_PREFIX if generation.chat else TEXT_PREFIX) + secrets.token_hex(16)
    if idempotency_key is not None:
        try:
            reservation = await service.store.reserve(tenant, idempotency_key, _digest(request, body), job_id)
        except IdempotencyConflict:
            raise conflict(
                "This idempotency key was used with another request.", "idempotency_conflict", IDEMPOTENCY_HEADER
            ) from None
        job_id = reservation.job_id
        if not reservation.fresh:
            try:
                status = await service.store.status(await service.store.find(tenant, job_id))
                return status.ref, status.created_at_unix_s, status.deadline_unix_s, False
            except JobNotFound:
                pass  # Reserved and never submitted: whoever reserved it died, or has not got there yet. Do it here.
    await _refuse_hopeless(service, generation.model)
    job = await _job(service, request, tenant, generation, job_id)
    try:
        fresh = await service.store.submit(job)
    except TurnConflict as error:
        await _forget(service, tenant, idempotency_key, job_id)
        raise conflict(error.message, "session_conflict", "session_id") from None
    except StoreUnavailable:
        if idempotency_key is None:  # else the client's retry finds it
            service.spawn(service.cancel(job.ref, may_come=True))
        raise
    if fresh:
        await _publish(service, job, tenant, idempotency_key)
    request.state.job_id = job_id
    return job.ref, job.created_at_unix_s, job.deadline_unix_s, fresh


async def _publish(service: Service, job: Job, tenant: str, idempotency_key: str | None) -> None:
    try:
        await service.queue.publish(job)
    except (QueueFull, QueueUnavailable) as error:
        # The job is in the outbox and would be published later; nobody would wait for it by then.
        await service.cancel(job.ref)
        await _forget(service, tenant, idempotency_key, job.job_id)
        code = "queue_full" if isinstance(error, QueueFull) else "queue_unavailable"
        wait_s = await service.capacity.retry_after_s(job.model)
        raise unavailable("The queue takes no more jobs at the moment; try again.", wait_s, code) from error
    service.metrics.jobs.inc()
    # Only a hint to the sweeper, which finds out by itself that the job is being worked on.
    with contextlib.suppress(StoreUnavailable):
        await service.store.published(job.ref)


async def _refuse_hopeless(service: Service, model: str) -> None:
    """Refuses at once what would pass its deadline in the queue, at the rate measured."""
    waiting_s = await service.capacity.waiting_s(model)
    if waiting_s is not None and waiting_s > service.settings.job_deadline_s:
        wait_s = await service.capacity.retry_after_s(model)
        raise unavailable("The queue is longer than the deadline of a job; try again later.", wait_s, "overloaded")


async def _forget(service: Service, tenant: str, idempotency_key: str | None, job_id: str) -> None:
    if idempotency_key is not None:
        await service.store.unreserve(tenant, idempotency_key, job_id)


async def _job(service: Service, request: Request, tenant: str, generation: Generation, job_id: str) -> Job:
    sampling = dict(generation.sampling)
    shrink = "max_tokens" not in sampling
    if shrink:
        sampling["max_tokens"] = service.settings.default_max_tokens
    now = time.time()
    fields: dict[str, Any] = {}
    if generation.chat:
        new = tuple(Message(**message) for message in generation.messages)
        old: tuple[Message, ...] = ()
        if generation.session_id is not None:
            turns = await service.store.history(tenant, generation.session_id)
            old = tuple(message for turn in turns for message in turn.messages)
            fields |= {"session_id": generation.session_id, "turn": len(turns), "new_messages": len(new)}
        fields["messages"] = old + new
    elif isinstance(generation.prompt, str):
        fields["prompt"] = generation.prompt
    else:
        fields["prompt_tokens"] = generation.prompt
    return Job(
        job_id=job_id,
        tenant=tenant,
        model=generation.model,
        sampling=Sampling(**sampling),
        shrink_to_fit=shrink,
        deadline_unix_s=now + service.settings.job_deadline_s,
        created_at_unix_s=now,
        trace_id=request.state.trace_id,
        **fields,
    )


def _with_session(generation: Generation, request: Request) -> Generation:
    """The session may also be named in a header; two names must agree."""
    named = request.headers.getlist(SESSION_HEADER)
    if not named:
        session_id = generation.session_id
    else:
        session_id = named[0]
        if len(named) > 1 or not IDENTIFIER.match(session_id) or generation.session_id not in (None, session_id):
            raise invalid(
                f"`{SESSION_HEADER}` must be given once, agree with `session_id`, and have 1 to 128 of the characters "
                "A-Z a-z 0-9 _ . - beginning with a letter or digit.",
                "session_id",
            )
    if session_id is not None and not generation.chat:
        raise invalid("Sessions are for chats; a text completion has none.", "session_id", "unsupported_parameter")
    return replace(generation, session_id=session_id)


def _idempotency_key(request: Request) -> str | None:
    values = request.headers.getlist(IDEMPOTENCY_HEADER)
    if not values:
        return None
    if len(values) > 1 or not _IDEMPOTENCY_KEY.fullmatch(values[0]):
        raise ApiError(
            400, "The idempotency key must have 1 to 255 printable ASCII characters.", code="invalid_idempotency_key"
        )
    # What a client typed is no part of a key in the store; its hash is as good, and has a known alphabet.
    return hashlib.sha256(values[0].encode()).hexdigest()


def _digest(request: Request, body: dict[str, Any]) -> str:
    """What must not change between two requests with one key: the route, the session, and the body's meaning."""
    canonical = [request.url.path, request.headers.get(SESSION_HEADER), body]
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()
