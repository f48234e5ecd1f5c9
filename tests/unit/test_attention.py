"""Attention takes what a kernel returns however it lies in memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from axon_llm.layers.attention import attend


def test_a_kernel_that_returns_heads_last_is_as_good_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's memory-efficient kernel lays its result out as [B, T, H, D] and returns it transposed."""
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool).tril(2)
    expected = attend(q, k, v, mask)
    plain = F.scaled_dot_product_attention

    def heads_last(*args: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        return plain(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", heads_last)
    torch.testing.assert_close(attend(q, k, v, mask), expected)
