"""The plain generate loop: prefill the prompt once, then decode one token at a time against the cache.

This is the whole idea in one function, greedy and for a single sequence. ``runner.py`` does the same with a compiled
step and bucketed views, ``scheduler.py`` for many sequences at once; both are tested against this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from axon_llm.cache import KVCache
from axon_llm.model import Transformer


@torch.inference_mode()
def greedy(model: Transformer, prompt: Sequence[int], max_tokens: int, cache: KVCache | None) -> Iterator[int]:
    """Generate greedily, with the cache or without it: the same tokens at a very different price.

    With a cache, each step runs the model on *one* new token: its keys and values join those already stored. Without
    one, each step runs the model on the whole sequence again.

    Args:
        model: the decoder.
        prompt: token ids, at least one.
        max_tokens: how many tokens to generate.
        cache: one slot with room for prompt and completion (overwritten from position 0), or ``None``.

    Yields:
        Token ids, ``max_tokens`` of them.
    """
    device = model.embed_tokens.weight.device
    tokens = torch.tensor([list(prompt)], device=device)  # [1, T]
    positions = torch.arange(tokens.shape[1], device=device)[None]  # [1, T]
    for _ in range(max_tokens):
        token = next_token(model, tokens, positions, cache)  # prefill the first time, decode from then on
        yield int(token)
        next_position = positions[:, -1:] + 1  # [1, 1]
        if cache is not None:  # the past is in the cache: only the new token goes through the model
            tokens, positions = token, next_position
        else:  # nothing is remembered: everything goes through again
            tokens, positions = torch.cat((tokens, token), dim=1), torch.cat((positions, next_position), dim=1)


def next_token(model: Transformer, tokens: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
    """Run the model over the new tokens ``[1, T]`` and pick the likeliest next one, ``[1, 1]``."""
    last = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
    logits: Tensor = model(tokens, positions, cache, logits_at=last)  # [1, 1, V]
    return logits.argmax(dim=-1)
