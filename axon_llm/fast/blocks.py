"""Blocks with fewer calls than the readable one: parallel projections fused, and with strips what surrounds them too.

Query, key and value read the same input; so do gate and up. One matrix of their rows one below the other is one call
instead of three, or two, and one longer stretch of memory to read. Where our own kernels multiply, all of a block is
one call (``kernels/block.cpp``): a step of one token is otherwise busy calling for a tenth of its time.

Legend: B slots · T new tokens · Hq/Hkv query and KV heads · D head_dim
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from axon_llm.cache import KVCache
from axon_llm.fast.attention import AttentionKernels
from axon_llm.fast.linear import ParallelLinear
from axon_llm.fast.strips import StripLinear
from axon_llm.layers.attention import Attention
from axon_llm.layers.norm import RMSNorm
from axon_llm.model import Block

NO_WINDOW = 1 << 40  # wider than any sequence


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
        both = self.gate_up_proj
        gate, up = both.parts(x) if isinstance(both, ParallelLinear) else both(x).chunk(2, dim=-1)
        # In place: in a long prompt these are the largest tensors there are.
        gated: Tensor = self.down_proj(F.silu(gate, inplace=True).mul_(up))
        return gated


class StripBlock(nn.Module):
    """The readable ``Block`` in one call, the cache's update among it; bfloat16, weights in strips of one format.

    Without a cache, or over one of another type than the activations, it is a block of parts (``FusedAttention``,
    ``FusedFeedForward``). The one call takes no mask: what a token may see follows from its position.

    Args:
        block: whose norms and dimensions are taken over.
        qkv_proj: maps hidden to ``(Hq + 2 · Hkv) · D`` channels.
        o_proj: maps ``Hq · D`` channels back.
        gate_up_proj: maps hidden to twice the intermediate size, gate first; no bias.
        down_proj: maps back; no bias.
        kernels: how the parts compute; the one call uses the same.
        window: width of a sliding window, or ``None``.
    """

    def __init__(
        self,
        block: Block,
        qkv_proj: StripLinear,
        o_proj: StripLinear,
        gate_up_proj: StripLinear,
        down_proj: StripLinear,
        kernels: AttentionKernels,
        window: int | None,
    ) -> None:
        super().__init__()
        self.window = NO_WINDOW if window is None else window
        self.input_layernorm, self.post_attention_layernorm = block.input_layernorm, block.post_attention_layernorm
        self.self_attn = FusedAttention(block.self_attn, qkv_proj, o_proj, kernels)
        self.mlp = FusedFeedForward(gate_up_proj, down_proj)
        self.linears = (qkv_proj, o_proj, gate_up_proj, down_proj)
        self.skips_hidden = kernels.skips_hidden

    @classmethod
    def where_it_suits(
        cls, block: Block, linears: Sequence[nn.Module], kernels: AttentionKernels | None, window: int | None
    ) -> StripBlock | None:
        """One for these four linears, in the order above, and these kernels, if there can be one."""
        strips = [linear for linear in linears if isinstance(linear, StripLinear)]
        alike = len(strips) == len(linears) and len({linear.strip_kind for linear in strips}) == 1
        biased = any(linear.bias is not None for linear in strips[2:])
        if kernels is None or not kernels.skips_hidden or not alike or biased:
            return None
        qkv, out, gate_up, down = strips
        return cls(block, qkv, out, gate_up, down, kernels, window)

    def forward(
        self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> Tensor:
        """As :meth:`axon_llm.model.Block.forward`."""
        attention, first, second = self.self_attn, self.input_layernorm, self.post_attention_layernorm
        if cache is None or cache.k.dtype != x.dtype:
            x = x + attention(first(x), positions, rope, mask, cache)
            return x + self.mlp(second(x))
        keys, values = cache.layer(attention.layer)  # [B, Hkv, S, D] each
        qkv, out, gate_up, down = self.linears
        y: Tensor = torch.ops.axon.strips_block(
            x, positions, *rope, keys, values, self.window, attention.num_heads,
            first.weight, first.eps, qkv.strips, qkv.scale, qkv.bias, _weight(attention.q_norm),
            _weight(attention.k_norm), out.strips, out.scale, out.bias,
            second.weight, second.eps, gate_up.strips, gate_up.scale, down.strips, down.scale, down.in_features,
            qkv.strip_kind, qkv.products,
        )  # fmt: skip
        return y


def _weight(norm: nn.Module) -> Tensor | None:
    return norm.weight if isinstance(norm, RMSNorm) else None
