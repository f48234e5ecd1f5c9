"""Attention and rotary positions by our own kernels, where there are any for this CPU: see ``kernels/attend.h``.

PyTorch's fused CPU kernel works in blocks that it converts to float32, unless there is a matrix unit to multiply them
with. Ours multiplies bfloat16 as it is, by the matrix unit where there is one, reads keys and values once for all query
heads that share them, and skips what the mask hides: the unused tail of the cache, and the future of a prompt.

Legend: B slots · T new tokens · H heads · D head_dim
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from axon_llm.fast import native, ops
from axon_llm.fast.plan import attention_kernel
from axon_llm.layers.attention import attend
from axon_llm.layers.rope import Rope, rotate

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


class AttentionKernels(NamedTuple):
    """How a fused attention layer computes; by default as the readable one does.

    Attributes:
        attend: as :func:`axon_llm.layers.attention.attend`.
        rotate: as :func:`axon_llm.layers.rope.rotate`.
        skips_hidden: pieces of a bfloat16 cache that the mask hides from every token are not read.
    """

    attend: Attend = attend
    rotate: Rotate = rotate
    skips_hidden: bool = False


def attend_in_strips(products: ops.Products) -> Attend:
    """As :func:`axon_llm.layers.attention.attend`, up to the order of summation, where the cache is bfloat16 too.

    Args:
        products: how to multiply.
    """
    return partial(_attend, int(products))  # which, unlike a function in here, can be pickled


def _attend(products: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    if k.dtype != torch.bfloat16:
        return attend(q, k, v, mask)
    y: Tensor = torch.ops.axon.bf16_attention(q, k, v, mask, products)
    return y


def rotate_at_once(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As :func:`axon_llm.layers.rope.rotate`, for ``x`` ``[B, H, T, D]`` bfloat16."""
    y: Tensor = torch.ops.axon.bf16_rotate(x.transpose(1, 2), cos, sin).transpose(1, 2)
    return y


class RopeAtOnce(nn.Module):
    """The readable ``Rope`` in one call, where it would be nine small ones: a tenth of a millisecond a step.

    Args:
        rope: whose frequencies and scale are taken over.
    """

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As :meth:`axon_llm.layers.rope.Rope.forward`, up to the last bit of a bfloat16."""
        if dtype != torch.bfloat16:
            cos, sin = self.rope(positions, dtype)
        else:
            cos, sin = torch.ops.axon.bf16_angles(positions, self.rope.inv_freq, self.rope.attention_factor)
        return cos, sin


def fastest_attention(device: torch.device, dtype: torch.dtype) -> AttentionKernels:
    """The fastest for activations of this type on this device."""
    strips = device.type == "cpu" and dtype == torch.bfloat16 and native.load()
    kernel = attention_kernel(device=device.type, dtype=str(dtype).removeprefix("torch."), strips=strips)
    if kernel == "strips":
        return AttentionKernels(attend_in_strips(ops.products()), rotate_at_once, skips_hidden=True)
    return AttentionKernels()
