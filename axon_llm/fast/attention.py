"""Attention as two matrix products with a softmax between them, for processors on which that beats the fused kernel.

PyTorch's fused CPU kernel works in blocks that it converts to float32, unless there is a matrix unit to multiply them
with. Without one (AVX-512 with bfloat16 products, but no AMX) plain products of the library are about twice as fast,
from one token to a whole chunk: docs/performance.md. Scores are kept in float32, as the fused kernel keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from axon_llm.fast.plan import attention_kernel
from axon_llm.layers.attention import attend

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As :func:`axon_llm.layers.attention.attend`, up to the order of summation."""
    B, Hq, T, D = q.shape
    Hkv, G = k.shape[1], Hq // k.shape[1]
    folded = q.reshape(B, Hkv, G * T, D)  # heads h·G … h·G+G-1 share KV head h
    scores = torch.matmul(folded, k.transpose(2, 3)).float() / math.sqrt(D)  # [B, Hkv, G·T, S]
    scores = scores.masked_fill(~mask.repeat(1, 1, G, 1), -math.inf)
    return torch.matmul(scores.softmax(dim=-1).to(v.dtype), v).reshape(B, Hq, T, D)


def fastest_attend(weight: Tensor) -> Attend:
    """The faster of the two for activations of this weight's type, on its device."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    kernel = attention_kernel(
        device=weight.device.type,
        dtype=str(weight.dtype).removeprefix("torch."),
        amx=bool(amx and amx()),
        bf16_products=bool(probe and probe()),
    )
    return attend_by_products if kernel == "products" else attend
