"""The messages between session manager, broker, Redis and workers: wire schema version 1.

Everything that crosses a process boundary is one of these models, as JSON. Decoding is strict: wrong types, NaN and
infinities, a missing seed or another schema version are refused with ``WireError``. Fields that are unknown are passed
over, because a newer version may have sent them while an upgrade is under way: what it adds must be of a kind that
may be ignored, else the schema version changes. The file knows nothing of the broker, Redis, HTTP or the engine.

``Job`` travels through RabbitMQ and is kept in Redis · ``LogEntry`` is one element of a job's token log, its last one
carrying ``Terminal`` · ``Turn`` is what a session remembers · ``WorkerCard`` is how a worker announces its model.
Next: ``ports.py``.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from axon_llm.errors import AxonError

SCHEMA_VERSION = 1
MAX_SEED = 2**63 - 1
IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}\Z")

Role = Literal["system", "user", "assistant", "tool", "developer"]
FinishReason = Literal["stop", "length", "cancelled", "error"]
JobState = Literal["queued", "running", "released", "suspect", "done"]


class WireError(AxonError):
    """Bytes that are not a message of this schema. The message names the field, never its content."""


def check_identifier(value: str) -> str:
    """Return ``value`` if it may be part of a Redis key (no braces, colons, spaces or control characters).

    Raises:
        ValueError: otherwise; the value itself is not repeated.
    """
    if not IDENTIFIER.match(value):
        raise ValueError("must be 1 to 128 of the characters A-Z a-z 0-9 _ . - and begin with a letter or digit")
    return value


Identifier = Annotated[str, AfterValidator(check_identifier)]


class _Message(BaseModel):
    """Strict and immutable: what every wire model shares."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Message(_Message):
    """One chat message."""

    role: Role
    content: str
    name: str | None = None


class Sampling(_Message):
    """Sampling parameters, every one filled in; the session manager chooses the seed when the client did not.

    Ranges are those of ``axon_llm.engine.params.SamplingParams``; the worker builds that from this.
    """

    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]


class JobRef(_Message):
    """Where a job lives: the tenant it belongs to, its session if any, and its id."""

    tenant: Identifier
    job_id: Identifier
    session_id: Identifier | None = None


class Job(_Message):
    """One accepted request, as it travels through the broker.

    Exactly one of ``messages`` (chat; the whole conversation, history included), ``prompt`` (text) and
    ``prompt_tokens`` is set. ``new_messages`` says how many of the last messages belong to this turn; with the answer
    they become the session's next ``Turn``. ``turn`` is the number of turns already committed, so a submission that
    read an outdated history is refused. ``deadline_unix_s`` and ``created_at_unix_s`` are seconds since 1970 on the
    session manager's clock.
    """

    schema_version: Literal[1] = 1
    job_id: Identifier
    tenant: Identifier
    session_id: Identifier | None = None
    turn: Annotated[int, Field(ge=0)] | None = None
    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: tuple[Message, ...] | None = None
    new_messages: Annotated[int, Field(ge=0)] = 0
    prompt: str | None = None
    prompt_tokens: tuple[int, ...] | None = None
    sampling: Sampling
    shrink_to_fit: bool = False
    deadline_unix_s: Annotated[float, Field(gt=0)]
    created_at_unix_s: Annotated[float, Field(gt=0)]
    trace_id: Identifier

    @model_validator(mode="after")
    def _one_prompt_and_a_whole_session(self) -> Job:
        if sum(part is not None for part in (self.messages, self.prompt, self.prompt_tokens)) != 1:
            raise ValueError("exactly one of messages, prompt and prompt_tokens must be given")
        if self.messages is not None and not self.messages:
            raise ValueError("messages must not be empty")
        if (self.session_id is None) != (self.turn is None):
            raise ValueError("session_id and turn go together")
        if self.new_messages > len(self.messages or ()):
            raise ValueError("new_messages counts more messages than there are")
        if self.session_id is not None and not self.new_messages:
            raise ValueError("a job of a session needs at least one new message")
        return self

    @property
    def ref(self) -> JobRef:
        """Where this job lives."""
        return JobRef(tenant=self.tenant, job_id=self.job_id, session_id=self.session_id)


class UsageInfo(_Message):
    """Token counts of a finished job, over every attempt."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class TimingInfo(_Message):
    """Seconds: submitted → a slot of the cache, submitted → first token, mean gap between tokens, submitted → end."""

    queue_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    total_s: float | None = None


class ErrorInfo(_Message):
    """Why a job failed, in the terms of OpenAI's error object. Never holds what the user typed."""

    type: str
    code: str
    message: str
    http_status: Annotated[int, Field(ge=400, le=599)]
    param: str | None = None


class Terminal(_Message):
    """How a job ended.

    ``error`` is set exactly when ``finish_reason`` is ``"error"``; ``attempts`` counts claims by workers.
    """

    finish_reason: FinishReason
    usage: UsageInfo | None = None
    timings: TimingInfo | None = None
    error: ErrorInfo | None = None
    attempts: int = 1

    @model_validator(mode="after")
    def _an_error_has_a_reason(self) -> Terminal:
        if (self.finish_reason == "error") != (self.error is not None):
            raise ValueError("error goes with finish_reason 'error', and only with it")
        return self


class TopLogprob(_Message):
    """One alternative at a position. ``bytes`` are what it would add to the text, where that is not its ``text``."""

    token: int
    logprob: float
    text: str = ""
    bytes: tuple[int, ...] | None = None


class LogEntry(_Message):
    """One element of a job's token log.

    ``seq`` counts 1, 2, 3 … without gaps; entry ``seq`` holds completion token ``seq - 1``. ``token`` is None only on
    a last entry that ended the job without a token (cancelled, failed). ``text`` may be empty (bytes of an unfinished
    character, a possible stop string) or hold what was held back before; ``token_text`` is the token's own text, or
    the name of a special token, and set where log-probabilities were asked for; ``token_bytes`` are the bytes it stands
    for, where they are not that text: a part of a character, none. ``terminal`` is set on the last entry and on no
    other.
    """

    seq: Annotated[int, Field(ge=1)]
    token: int | None = None
    text: str = ""
    logprob: float | None = None
    token_text: str | None = None
    token_bytes: tuple[int, ...] | None = None
    top_logprobs: tuple[TopLogprob, ...] = ()
    terminal: Terminal | None = None


class Turn(_Message):
    """One committed turn of a session: the new messages and the assistant's answer, in order."""

    turn: int
    job_id: Identifier
    messages: tuple[Message, ...]
    committed_at_unix_s: float


class JobStatus(_Message):
    """What is known of a job.

    ``next_seq - 1`` entries are in its log; ``terminal`` is set when ``state`` is ``"done"``.
    """

    ref: JobRef
    model: str
    state: JobState
    next_seq: int
    attempts: int
    created_at_unix_s: float
    deadline_unix_s: float
    cancel_requested: bool = False
    trace_id: str = ""
    terminal: Terminal | None = None


class ModelCard(_Message):
    """One model as a worker serves it; what ``GET /v1/models`` is made of, and what a request is checked against.

    ``generation_defaults`` are the sampling parameters that the model's authors recommend: they fill in what a request
    leaves open.
    """

    id: str
    created_unix_s: int
    max_seq_len: int
    vocab_size: int
    has_chat_template: bool
    owned_by: str = "axon"
    dtype: str = ""
    parameters: int | None = None
    generation_defaults: dict[str, int | float] = {}


class WorkerCard(_Message):
    """A worker's announcement, renewed every few seconds and gone by itself when the worker is.

    ``jobs_per_s`` and ``tokens_per_s`` are measured over the last minute (0 when idle); ``mean_job_s`` over the last
    jobs, None before the first. ``Retry-After`` is computed from them.
    """

    worker_id: Identifier
    models: tuple[ModelCard, ...]
    slots: int
    running: int
    waiting: int
    draining: bool = False
    jobs_per_s: float = 0.0
    tokens_per_s: float = 0.0
    mean_job_s: float | None = None
    started_at_unix_s: float


MessageT = TypeVar("MessageT", bound=BaseModel)


def encode(message: BaseModel) -> bytes:
    """Return the message as compact UTF-8 JSON; fields at their default are left out, except the schema version."""
    data = message.model_dump_json(exclude_defaults=True)
    if isinstance(message, Job):
        data = f'{{"schema_version":{SCHEMA_VERSION},' + data[1:]
    return data.encode()


def decode(kind: type[MessageT], data: bytes | str) -> MessageT:
    """Read one message of the given kind, passing over fields that this version does not know.

    Raises:
        WireError: the bytes are not JSON, or not this message; names the fields at fault, never their values.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'message'}: {fault['msg']}"
            for fault in error.errors(include_url=False, include_context=False, include_input=False)[:3]
        )
        raise WireError(f"not a {kind.__name__} of schema version {SCHEMA_VERSION}: {faults}") from None
    except (ValueError, RecursionError) as error:
        raise WireError(f"not a {kind.__name__}: {type(error).__name__}") from None
