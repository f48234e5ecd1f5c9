"""A block on a GPU in few kernels: five for the one row of a decode step, some more for others.

One row in bfloat16: norm, query, key and value · all of attention · output and the stream · norm, gate, up and
``silu(gate) · up`` · down and the stream. Integers meet rounded rows, and so have a kernel in front of every product,
which takes the norm along. Otherwise, with more rows above all, norms and the gate are kernels of their own.

No compiler is needed for that, so a step is ready as soon as it has been captured.

Legend: B slots · T new tokens · Hq/Hkv query and KV heads · D head_dim
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from axon_llm.cache import KVCache
from axon_llm.fast.gpu.linear import GpuLinear
from axon_llm.fast.gpu.operators import gpu_kernels
from axon_llm.layers.norm import RMSNorm
from axon_llm.model import Block

HEAD_DIMS = (16, 32, 64, 128, 256)


class GpuNorm(nn.Module):
    """The readable ``RMSNorm`` in one kernel.

    Args:
        norm: whose weight is taken over.
    """

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`axon_llm.layers.norm.RMSNorm.forward`."""
        y: Tensor = torch.ops.axon.gpu_norm(x, self.weight, self.eps)
        return y


class GpuBlock(nn.Module):
    """The readable ``Block`` by the kernels beside this file.

    Args:
        block: whose norms and dimensions are taken over.
        qkv_proj: maps hidden to ``(Hq + 2 · Hkv) · D`` channels.
        o_proj: maps ``Hq · D`` channels back.
        gate_up_proj: maps hidden to twice the intermediate size, gate first.
        down_proj: maps back.
        window: positions a token sees at most; 0 for all.
    """

    skips_hidden = True

    def __init__(
        self, block: Block, qkv_proj: nn.Module, o_proj: nn.Module, gate_up_proj: nn.Module, down_proj: nn.Module,
        window: int,
    ) -> None:  # fmt: skip
        super().__init__()
        attention = block.self_attn
        self.layer, self.window = attention.layer, window
        self.num_kv_heads, self.head_dim = attention.num_kv_heads, attention.head_dim
        self.input_layernorm = GpuNorm(block.input_layernorm)
        self.post_attention_layernorm = GpuNorm(block.post_attention_layernorm)
        self.self_attn = attention  # the norms of queries and keys are left of it, under the names of a checkpoint
        self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj = qkv_proj, o_proj, gate_up_proj, down_proj

    @classmethod
    def where_it_suits(cls, block: Block, linears: Sequence[nn.Module], window: int | None) -> GpuBlock | None:
        """One for these four linears, in the order above, if there can be one."""
        tensors = [*linears[0].parameters(), *linears[0].buffers()]
        on_gpu = bool(tensors) and tensors[0].device.type == "cuda"
        if not on_gpu or block.self_attn.head_dim not in HEAD_DIMS or not gpu_kernels():
            return None
        qkv, out, gate_up, down = linears
        return cls(block, qkv, out, gate_up, down, window or 0)

    def forward(
        self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> Tensor:
        """As :meth:`axon_llm.model.Block.forward`; what the mask would hide is known from ``positions``."""
        B, T, _ = x.shape
        D, Hkv = self.head_dim, self.num_kv_heads
        q_norm, k_norm = self.self_attn.q_norm, self.self_attn.k_norm
        normed = isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm)
        if cache is not None:
            keys, values = cache.layer(self.layer)  # [B, Hkv, S, D]
        else:  # wherever the new tokens stand, there are only their keys to look at
            keys, values = x.new_empty(2, B, Hkv, T, D).unbind(0)
            positions = torch.arange(T, device=x.device).expand(B, T)
        heads = _normed(self.qkv_proj, x, self.input_layernorm)
        given = (
            heads.view(B, T, -1, D), q_norm.weight if normed else None, k_norm.weight if normed else None,
            q_norm.eps if normed else 0.0, *rope, positions, keys, values,
        )  # fmt: skip
        if T == 1:
            seen = torch.ops.axon.gpu_step(*given, self.window)
        else:
            q = torch.ops.axon.gpu_turn(*given)
            seen = torch.ops.axon.gpu_attention(q, keys, values, positions, self.window)
        x = _add(self.o_proj, seen.view(B, T, -1), x)
        return _add(self.down_proj, _gated(self.gate_up_proj, x, self.post_attention_layernorm), x)


def _normed(linear: nn.Module, x: Tensor, norm: GpuNorm) -> Tensor:
    return linear.normed(x, norm.weight, norm.eps) if isinstance(linear, GpuLinear) else linear(norm(x))


def _gated(linear: nn.Module, x: Tensor, norm: GpuNorm) -> Tensor:
    if isinstance(linear, GpuLinear):
        return linear.gated(x, norm.weight, norm.eps)
    y: Tensor = torch.ops.axon.gpu_gate(linear(norm(x)))
    return y


def _add(linear: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    return linear.add(x, residual) if isinstance(linear, GpuLinear) else residual + linear(x)
