"""What can be served at all: how many slots fit into memory, and which requests no slot could ever hold."""

from __future__ import annotations

from collections.abc import Container

import torch

from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
from axon_llm.engine.events import Request
from axon_llm.errors import RequestError


def slots_that_fit(config: ModelConfig, memory_bytes: int, *, max_seq_len: int, dtype: torch.dtype) -> int:
    """How many slots of ``max_seq_len`` positions a cache can have in ``memory_bytes``; may be 0."""
    return max(memory_bytes, 0) // KVCache.bytes_for(config, slots=1, max_seq_len=max_seq_len, dtype=dtype)


def validate(request: Request, vocab_size: int, max_seq_len: int, known: Container[str] = ()) -> None:
    """Refuse a request that no amount of waiting would make possible.

    Args:
        request: the request.
        vocab_size: of the model.
        max_seq_len: positions of a slot.
        known: ids in use.

    Raises:
        RequestError: why, with the numbers.
    """
    params = request.params
    if request.id in known:
        raise RequestError(f"a request with id {request.id!r} is running", code="duplicate_id", param="id")
    if not request.prompt:
        raise RequestError("the prompt is empty", code="empty_prompt", param="prompt")
    needed = len(request.prompt) + params.max_tokens
    if needed > max_seq_len:
        raise RequestError(
            f"this model's context holds {max_seq_len} tokens, but {needed} were asked for: "
            f"{len(request.prompt)} in the prompt and {params.max_tokens} to generate",
            code="context_length_exceeded",
            param="max_tokens" if len(request.prompt) < max_seq_len else "prompt",
            hint=f"Shorten the prompt, or lower max_tokens to at most {max_seq_len - len(request.prompt)}."
            if len(request.prompt) < max_seq_len
            else "Shorten the prompt.",
        )
    for name, ids in (
        ("prompt", request.prompt),
        ("generated", request.generated),
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise RequestError(
                f"token id {wrong} in {name} is outside the vocabulary of {vocab_size} tokens",
                code="invalid_value",
                param=name,
            )
