"""With the cache and without it: the same tokens, whatever else is in the cache."""

from __future__ import annotations

import pytest
import torch

from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
from axon_llm.engine.generate import greedy
from axon_llm.model import Transformer
from axon_llm.rope_config import RopeConfig

CONFIGS = {
    "GQA": ModelConfig(
        vocab_size=211,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=256,
    ),
    "MQA with windows, biases and q/k norm": ModelConfig(
        vocab_size=130,
        hidden_size=48,
        intermediate_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=1,
        head_dim=20,
        max_position_embeddings=256,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=True,
        layer_windows=(None, 6, None, 40),
        rope=RopeConfig(theta=500.0, kind="linear", factor=2.0),
    ),
}


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(5)
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_and_uncached_decoding_pick_the_same_tokens(name: str) -> None:
    model = make_model(CONFIGS[name])
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    cached = list(greedy(model, prompt, 80, KVCache(model.config, max_seq_len=100)))
    assert cached == list(greedy(model, prompt, 80, None))
    assert len(set(cached)) > 2


@pytest.mark.parametrize("name", CONFIGS)
def test_in_bfloat16_the_tokens_are_the_same_up_to_near_ties(name: str) -> None:
    """bfloat16 keeps 8 bits: where the two best logits are closer than that, either may win."""
    model = make_model(CONFIGS[name], torch.bfloat16)
    # A given text: one that follows the model's own choices would be another on each processor, near ties and all.
    text = torch.randint(0, model.config.vocab_size, (1, 72), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, max_seq_len=100, dtype=torch.bfloat16)
    near_ties = 0
    logits = model(text[:, :8], torch.arange(8)[None], cache)[:, -1]
    for position in range(8, 72):
        uncached = model(text[:, :position], torch.arange(position)[None], None)[:, -1]
        assert (logits - uncached).abs().max() < 0.15
        best = uncached.topk(2).values[0]
        near_tie = (best[0] - best[1]).item() < 0.15
        near_ties += near_tie
        assert near_tie or logits.argmax() == uncached.argmax()
        logits = model(text[:, position : position + 1], torch.tensor([[position]]), cache)[:, -1]
    assert near_ties < 40


def test_eight_slots_at_different_positions_are_each_what_they_would_be_alone() -> None:
    model = make_model(CONFIGS["GQA"])
    generator = torch.Generator().manual_seed(2)
    prompts = [
        torch.randint(0, 211, (length,), generator=generator).tolist() for length in (1, 2, 5, 9, 17, 30, 41, 60)
    ]
    alone = [list(greedy(model, prompt, 30, KVCache(model.config, max_seq_len=96))) for prompt in prompts]
    cache = KVCache(model.config, slots=8, max_seq_len=96)
    cache.k.normal_(generator=generator)  # what earlier sequences left behind must not matter
    cache.v.normal_(generator=generator)
    rows = []
    for slot, prompt in enumerate(prompts):
        logits = model(torch.tensor([prompt]), torch.arange(len(prompt))[None], cache.slot(slot))
        rows.append([int(logits[0, -1].argmax())])
    for _ in range(29):
        tokens = torch.tensor([row[-1:] for row in rows])
        positions = torch.tensor([[len(prompt) + len(row) - 1] for prompt, row in zip(prompts, rows, strict=True)])
        for row, token in zip(rows, model(tokens, positions, cache)[:, -1].argmax(-1).tolist(), strict=True):
            row.append(token)
    assert rows == alone


def test_attention_over_a_view_of_the_cache_equals_attention_over_all_of_it() -> None:
    model = make_model(CONFIGS["GQA"])
    whole, cut = KVCache(model.config, slots=3, max_seq_len=200), KVCache(model.config, slots=3, max_seq_len=200)
    tokens, positions = torch.randint(0, 211, (2, 20)), torch.arange(20).expand(2, 20)
    expected = model(tokens, positions, whole.view(slots=2))
    assert torch.allclose(model(tokens, positions, cut.view(slots=2, length=32)), expected, atol=1e-5)
    assert torch.allclose(whole.k, cut.k, atol=1e-6)


def test_with_only_the_logits_are_those_of_that_token() -> None:
    model = make_model(CONFIGS["GQA"])
    tokens, positions = torch.randint(0, 211, (2, 12)), torch.arange(12).expand(2, 12)
    every = model(tokens, positions)
    some = model(tokens, positions, logits_at=torch.tensor([4, 11]))
    assert torch.allclose(some[:, 0], every[[0, 1], [4, 11]], atol=1e-5)
