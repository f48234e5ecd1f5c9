"""The memory formula holds on a GPU, and a slot's neighbours are left alone."""

from __future__ import annotations

import torch
from tiny import tiny_model

from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
from axon_llm.engine.runner import Runner

WIDE = ModelConfig(
    vocab_size=10,
    hidden_size=64,
    intermediate_size=64,
    num_layers=16,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    max_position_embeddings=4096,
)


def test_the_allocator_grows_by_what_the_formula_says() -> None:
    before = torch.cuda.memory_allocated()
    cache = KVCache(WIDE, slots=2, max_seq_len=4096, device="cuda", dtype=torch.bfloat16)
    assert torch.cuda.memory_allocated() - before == cache.nbytes


def test_a_runner_allocates_its_cache_and_little_else() -> None:
    model = tiny_model().cuda()
    before = torch.cuda.memory_allocated()
    runner = Runner(model, slots=64, max_seq_len=320)
    assert 0 <= torch.cuda.memory_allocated() - before - runner.cache.nbytes < 65_536


def test_copy_swap_and_erase_move_what_they_say() -> None:
    runner = Runner(tiny_model().cuda(), slots=3, max_seq_len=20)
    runner.cache.k.normal_()
    before = runner.cache.k.clone()
    runner.copy(0, 2, 7)
    runner.swap(1, 2, 5)
    runner.erase(0)
    assert torch.equal(runner.cache.k[:, 1, :, :5], before[:, 0, :, :5])
    assert torch.equal(runner.cache.k[:, 2, :, :5], before[:, 1, :, :5])
    assert torch.equal(runner.cache.k[:, 2, :, 5:7], before[:, 0, :, 5:7])
    assert not runner.cache.k[:, 0].any()
