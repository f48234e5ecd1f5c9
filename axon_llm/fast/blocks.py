"""Attention and feed-forward with their parallel projections fused into one linear each.

Query, key and value read the same input; so do gate and up. One matrix of their rows one below the other is one call
instead of three, or two, and one longer stretch of memory to read.

Legend: B slots · T new tokens · Hq/Hkv query and KV heads · D head_dim
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from axon_llm.cache import KVCache
from axon_llm.fast.attention import AttentionKernels
from axon_llm.layers.attention import Attention


class FusedAttention(nn.Module):
    """The readable ``Attention`` with one projection for query, key and value.

    Args:
        attention: whose norms and dimensions are taken over.
        qkv_proj: maps hidden to ``(Hq + 2 · Hkv) · D`` channels.
        o_proj: maps ``Hq · D`` channels back.
        kernels: what turns queries and keys, and has queries look at keys and values.
    """

    def __init__(
        self, attention: Attention, qkv_proj: nn.Module, o_proj: nn.Module, kernels: AttentionKernels | None = None
    ) -> None:
        super().__init__()
        self.layer = attention.layer
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.head_dim = attention.head_dim
        self.qkv_proj, self.o_proj = qkv_proj, o_proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.attend, self.rotate, self.skips_hidden = kernels or AttentionKernels()
        self.plain = isinstance(self.q_norm, nn.Identity)

    def forward(
        self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> Tensor:
        """As :meth:`axon_llm.layers.attention.Attention.forward`."""
        B, T, _ = x.shape
        Hq, Hkv = self.num_heads, self.num_kv_heads
        heads = self.qkv_proj(x).view(B, T, Hq + 2 * Hkv, self.head_dim).transpose(1, 2)  # [B, Hq + 2·Hkv, T, D]
        turning, v = heads[:, : Hq + Hkv], heads[:, Hq + Hkv :]
        if not self.plain:
            turning = torch.cat((self.q_norm(turning[:, :Hq]), self.k_norm(turning[:, Hq:])), dim=1)
        turned = self.rotate(turning, *rope)
        q, k = turned[:, :Hq], turned[:, Hq:]
        if cache is not None:
            k, v = cache.update(self.layer, positions, k, v)  # [B, Hkv, S, D]
        out = self.attend(q, k, v, mask)  # [B, Hq, T, D]
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(B, T, -1))
        return projected


class FusedFeedForward(nn.Module):
    """The readable ``FeedForward`` with gate and up in one linear.

    Args:
        gate_up_proj: maps hidden to twice the intermediate size, gate first.
        down_proj: maps back.
    """

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` ``[B, T, hidden]`` to the same shape."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        gated: Tensor = self.down_proj(F.silu(gate) * up)
        return gated
