"""A model of a few thousand random weights and a tokenizer whose tokens are bytes, for tests of the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
from axon_llm.engine.engine import Engine
from axon_llm.engine.events import Request, TokenEvent
from axon_llm.engine.generate import greedy
from axon_llm.engine.params import SamplingParams
from axon_llm.model import Transformer
from axon_llm.tokenizer import StreamDetokenizer

EOS = 256
VOCAB = 257
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=320,
)


class ByteTokenizer:
    """Token i is byte i; one more ends the sequence."""

    eos_token_ids = frozenset({EOS})
    vocab_size = VOCAB
    strips_first_space = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def special_id(self, text: str) -> int | None:
        return EOS if text == "<end>" else None

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


def byte_decoder() -> StreamDetokenizer:
    tokenizer: Any = ByteTokenizer()
    return StreamDetokenizer(tokenizer)


def tiny_model(config: ModelConfig = CONFIG, seed: int = 0, scale: float = 0.4) -> Transformer:
    """Random weights, large enough for the output to depend on every token."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, scale, generator=generator)
    return model


def tiny_engine(model: Transformer | None = None, **options: Any) -> Engine:
    tokenizer: Any = ByteTokenizer()
    return Engine(model or tiny_model(), tokenizer, **options)


def plain_greedy(model: Transformer, prompt: Sequence[int], count: int) -> list[int]:
    """What the readable loop generates."""
    return list(greedy(model, prompt, count, KVCache(model.config)))


def submit(engine: Engine, name: str, prompt: Sequence[int], **options: Any) -> None:
    generated = tuple(options.pop("generated", ()))
    deadline = options.pop("deadline_unix_s", None)
    params = SamplingParams(**options)
    engine.submit(Request(id=name, prompt=tuple(prompt), params=params, generated=generated, deadline_unix_s=deadline))


def drain(engine: Engine, limit: int = 10_000) -> dict[str, list[TokenEvent]]:
    """Step until there is no work, and sort the events by request."""
    events: dict[str, list[TokenEvent]] = {}
    for _ in range(limit):
        if not engine.has_work():
            return events
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    raise AssertionError(f"the engine still has work after {limit} steps")


def tokens_of(events: Iterable[TokenEvent]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def text_of(events: Iterable[TokenEvent]) -> str:
    return "".join(event.text for event in events)
