"""Attention for processors on which the library's fused kernel in bfloat16 is not the fastest: docs/performance.md.

**Two matrix products with a softmax between them.** PyTorch's fused CPU kernel works in blocks that it converts to
float32, unless there is a matrix unit to multiply them with. Where bfloat16 products are fast without one, those
of the library are about twice as fast, from one token to a whole chunk. Scores are kept in float32, as the fused kernel
keeps them.

**The fused kernel in float32**, for a chunk of a prompt, where float32 products are faster than bfloat16's. One token
reads keys and values once, and would wait for them to be converted; it goes through the fused kernel as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from axon_llm.fast import ops
from axon_llm.fast.plan import attention_kernel
from axon_llm.layers.attention import attend

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
WIDE_TOKENS = 64  # new tokens from which converting keys and values pays


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As :func:`axon_llm.layers.attention.attend`, up to the order of summation."""
    B, Hq, T, D = q.shape
    Hkv, G = k.shape[1], Hq // k.shape[1]
    folded = q.reshape(B, Hkv, G * T, D)  # heads h·G … h·G+G-1 share KV head h
    scores = torch.matmul(folded, k.transpose(2, 3)).float() / math.sqrt(D)  # [B, Hkv, G·T, S]
    scores = scores.masked_fill(~mask.repeat(1, 1, G, 1), -math.inf)
    return torch.matmul(scores.softmax(dim=-1).to(v.dtype), v).reshape(B, Hq, T, D)


def attend_widened(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As :func:`axon_llm.layers.attention.attend`, in float32 for many new tokens; ``[B, Hq, T, D]`` in q's dtype."""
    if q.shape[2] < WIDE_TOKENS:
        return attend(q, k, v, mask)
    return attend(q.float(), k.float(), v.float(), mask).to(q.dtype)


def fastest_attend(weight: Tensor) -> Attend:
    """The fastest for activations of this weight's type, on its device."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    kernel = attention_kernel(
        device=weight.device.type,
        dtype=str(weight.dtype).removeprefix("torch."),
        amx=bool(amx and amx()),
        bf16_products=bool(probe and probe()),
        wide=weight.device.type == "cpu" and ops.wide_products(),
    )
    return {"products": attend_by_products, "widened": attend_widened, "fused": attend}[kernel]
