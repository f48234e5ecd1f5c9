"""The plain loop: the cache changes what a token costs, not which token it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import tiny_model

from axon_llm.cache import KVCache
from axon_llm.engine.generate import greedy
from axon_llm.model import Transformer


@pytest.mark.parametrize("length", [1, 7, 100])
def test_with_and_without_cache_the_same_tokens_come_out(length: int) -> None:
    model = tiny_model()
    prompt = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    cached = list(greedy(model, prompt, 60, KVCache(model.config)))
    assert cached == list(greedy(model, prompt, 60, None))
    assert len(set(cached)) > 10, "a loop over a few tokens would hide mistakes"


def test_with_a_cache_a_step_runs_one_token_and_without_one_it_runs_all() -> None:
    model, widths = tiny_model(), []
    forward = model.forward

    def watched(tokens: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        widths.append(tokens.shape[1])
        return forward(tokens, *rest, **options)  # type: ignore[arg-type]

    model.forward = watched  # type: ignore[method-assign]
    list(greedy(model, [1, 2, 3], 4, KVCache(model.config)))
    assert widths == [3, 1, 1, 1]
    widths.clear()
    list(greedy(model, [1, 2, 3], 4, None))
    assert widths == [3, 4, 5, 6]


def test_tokens_come_one_by_one() -> None:
    model: Transformer = tiny_model()
    tokens: Iterator[int] = greedy(model, [1, 2, 3], 1_000_000, KVCache(model.config))
    assert isinstance(next(tokens), int)


def test_what_a_slot_held_before_does_not_matter() -> None:
    model = tiny_model()
    cache = KVCache(model.config)
    fresh = list(greedy(model, [5, 6, 7], 20, cache))
    list(greedy(model, list(range(200)), 40, cache))
    assert list(greedy(model, [5, 6, 7], 20, cache)) == fresh
