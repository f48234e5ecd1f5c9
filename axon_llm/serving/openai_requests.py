"""What clients may send to the OpenAI-compatible routes, checked field by field.

Types are strict (``"5"`` and ``true`` are not integers) and every name is known: a parameter that Axon does not
implement is refused by name rather than ignored, unless its value asks for nothing. The result of either request is a
``Generation``, which knows nothing of HTTP. Read ``openai_fields.py`` for fields that come in several
shapes, and ``http_generate.py`` next: it turns a ``Generation`` into a job.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from axon_llm.serving.http_errors import ApiError, invalid
from axon_llm.serving.openai_fields import one_prompt, stop_strings, text_content, token_bias
from axon_llm.serving.wire import MAX_SEED, Identifier

MAX_TOKENS = 1_000_000
MAX_MESSAGES = 4096

# Parameters of OpenAI's API that Axon does not implement, with the values that ask for nothing and are let through.
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
}
# Parameters that never change the answer: taken, and of no effect.
_IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")
_MESSAGE_EXTRAS = ("refusal", "tool_calls", "function_call", "audio", "annotations")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One validated request for text.

    Attributes:
        chat: a chat completion, else a text completion.
        model: as the client named it.
        messages: of a chat, each ``{"role", "content"}``; empty for a text completion.
        prompt: of a text completion, text or token ids; empty for a chat.
        sampling: keyword arguments for ``SamplingParams``; the seed is always there, ``max_tokens`` only where asked.
        stream: answer with server-sent events.
        include_usage: end the stream with a usage chunk.
        session_id: the session whose history this turn continues.
        on_disconnect: what a client that goes away leaves behind.
    """

    chat: bool
    model: str
    messages: tuple[dict[str, Any], ...] = ()
    prompt: str | tuple[int, ...] = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    include_usage: bool = False
    session_id: str | None = None
    on_disconnect: Literal["cancel", "continue"] | None = None


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ChatMessage(_Strict):
    """One message of a conversation; content is text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(text_content)]
    name: str | None = Field(None, max_length=64)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_extras(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        for name in _MESSAGE_EXTRAS:
            if value.get(name):
                raise ValueError(f"`{name}` in a message is not supported")
        return {name: content for name, content in value.items() if name not in _MESSAGE_EXTRAS}


class StreamOptions(_Strict):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Common(_Strict):
    model: str = Field(min_length=1, max_length=512)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: Annotated[dict[int, float], BeforeValidator(token_bias)] = {}
    stop: Annotated[list[str], BeforeValidator(stop_strings)] = []
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(None, max_length=64)
    ignore_eos: bool = False
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    session_id: Identifier | None = None
    on_disconnect: Literal["cancel", "continue"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_without_effect(cls, value: dict[str, Any]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for name, content in value.items():
            if name in _IGNORED and name not in cls.model_fields:
                continue
            if name in _WITHOUT_EFFECT and name not in cls.model_fields:
                if content is None or any(type(content) is type(o) and content == o for o in _WITHOUT_EFFECT[name]):
                    continue
                raise _UnsupportedError(name)
            kept[name] = content
        return kept

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` only makes sense with `stream: true`")
        return self

    def _sampling(self) -> dict[str, Any]:
        names = (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
        )  # fmt: skip
        sampling: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        # Drawn here and not in the engine: a job that is continued by another worker must continue the same numbers.
        sampling["seed"] = secrets.randbits(53) if self.seed is None else self.seed & MAX_SEED
        if self.top_k == -1:  # vLLM's way to say: all of them
            sampling["top_k"] = 0
        sampling["logit_bias"] = dict(self.logit_bias)
        sampling["stop"] = tuple(self.stop)
        sampling["stop_token_ids"] = tuple(self.stop_token_ids or ())
        sampling["ignore_eos"] = self.ignore_eos
        return sampling


class ChatRequest(_Common):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` only makes sense with `logprobs: true`")
        return self

    def generation(self) -> Generation:
        """The request without its HTTP clothes."""
        sampling = self._sampling()
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        if limit is not None:
            sampling["max_tokens"] = limit
        if self.logprobs:
            sampling["logprobs"] = self.top_logprobs or 0
        return _generation(
            self, chat=True, messages=tuple(m.model_dump() for m in self.messages), prompt="", sampling=sampling
        )


class TextRequest(_Common):
    """``POST /v1/completions``."""

    prompt: Annotated[str | tuple[int, ...], BeforeValidator(one_prompt)]
    logprobs: int | None = Field(None, ge=0, le=20)

    def generation(self) -> Generation:
        """The request without its HTTP clothes."""
        sampling = self._sampling()
        if self.max_tokens is not None:
            sampling["max_tokens"] = self.max_tokens
        if self.logprobs is not None:
            sampling["logprobs"] = self.logprobs
        return _generation(self, chat=False, messages=(), prompt=self.prompt, sampling=sampling)


def read_generation(body: Mapping[str, Any], *, chat: bool) -> Generation:
    """Validates a parsed body.

    Raises:
        ApiError: 400, naming the field.
    """
    kind: type[ChatRequest | TextRequest] = ChatRequest if chat else TextRequest
    try:
        return kind.model_validate(dict(body)).generation()
    except _UnsupportedError as error:
        raise invalid(
            f"`{error.name}` is not supported with this value.", error.name, "unsupported_parameter"
        ) from None
    except ValidationError as error:
        raise _as_api_error(error) from None


class _UnsupportedError(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _generation(request: _Common, **fields: Any) -> Generation:
    options = request.stream_options
    return Generation(
        model=request.model,
        stream=bool(request.stream),
        include_usage=options is not None and options.include_usage,
        session_id=request.session_id,
        on_disconnect=request.on_disconnect,
        **fields,
    )


def _as_api_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    # Validators of a union add the names of its branches to the location; only field names and indices mean anything.
    param = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier()) or None
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return invalid(f"Unknown parameter `{param}`.", param, "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"`{param}` is required.", param, "missing_required_parameter")
    return invalid(f"`{param}`: {text}" if param else text, param)
