"""The cache's memory: the formula, the tensors and the allocator say the same."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=10,
    hidden_size=64,
    intermediate_size=64,
    num_layers=5,
    num_heads=6,
    num_kv_heads=3,
    head_dim=14,
    max_position_embeddings=77,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("slots", "length"), [(1, 1), (3, 50), (8, 77)])
def test_the_formula_is_the_bytes_of_the_tensors(slots: int, length: int, dtype: torch.dtype) -> None:
    cache = KVCache(CONFIG, slots=slots, max_seq_len=length, dtype=dtype)
    expected = 2 * 5 * slots * length * 3 * 14 * dtype.itemsize
    held = sum(t.untyped_storage().nbytes() for t in (cache.k, cache.v))
    assert KVCache.bytes_for(CONFIG, slots=slots, max_seq_len=length, dtype=dtype) == cache.nbytes == held == expected


def test_the_process_grows_by_what_the_formula_says() -> None:
    program = """
import resource, torch
from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
config = ModelConfig(vocab_size=10, hidden_size=64, intermediate_size=64, num_layers=16, num_heads=8, num_kv_heads=8,
                     head_dim=64, max_position_embeddings=4096)
def resident():
    return int(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1]) * 1024
torch.ones(10).sum()
before = resident()
cache = KVCache(config, slots=2, max_seq_len=4096, dtype=torch.float32)
cache.k.fill_(1); cache.v.fill_(1)
print(resident() - before, KVCache.bytes_for(config, slots=2, max_seq_len=4096, dtype=torch.float32))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    grown, formula = map(int, out)
    assert abs(grown - formula) < 0.02 * formula


def test_views_share_memory_with_the_cache_they_are_views_of() -> None:
    cache = KVCache(CONFIG, slots=4, max_seq_len=20)
    new = torch.randn(1, 3, 2, 14)
    cache.slot(2).view(length=10).update(1, torch.tensor([[4, 7]]), new, 2 * new)
    assert torch.equal(cache.k[1, 2, :, [4, 7]], new[0])
    assert torch.equal(cache.v[1, 2, :, [4, 7]], 2 * new[0])
    assert cache.k.count_nonzero() == new.numel()
    assert cache.slot(2).slots == 1
    assert cache.view(slots=3, length=10).max_seq_len == 10


def test_each_row_is_written_at_its_own_positions() -> None:
    cache = KVCache(CONFIG, slots=2, max_seq_len=20)
    new = torch.randn(2, 3, 1, 14)
    keys, values = cache.update(0, torch.tensor([[3], [11]]), new, -new)
    assert torch.equal(keys[0, :, 3], new[0, :, 0])
    assert torch.equal(values[1, :, 11], -new[1, :, 0])
    assert keys[0, :, 11].count_nonzero() == 0


def test_an_empty_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        KVCache(CONFIG, slots=0, max_seq_len=10)
