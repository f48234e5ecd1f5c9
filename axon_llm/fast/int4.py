"""int4 weights in groups of 32, without the kernels of ``strips.py`` and ``gpu/``: by PyTorch's own, or by none.

PyTorch's CPU kernel turns weights into numbers as it reads them, again for every four rows, so a prompt is slow.

Legend: R rows · K input channels · N output channels · G = K / 32 groups
"""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from axon_llm.fast.linear import FastLinear
from axon_llm.fast.quantise import GROUP

CHANNELS = 16  # output channels that PyTorch's kernel takes at a time


def pack(q: Tensor, scale: Tensor, middle: Tensor) -> tuple[Tensor, Tensor, int]:
    """Values and scales in the layout of PyTorch's CPU kernel, which takes output channels by 16: zeros fill them up.

    Args:
        q: ``[N, K]`` uint8, 0 … 15.
        scale: ``[N, G]``.
        middle: ``[N, G]``.

    Returns:
        packed uint8 ``[⌈N / 16⌉ · 16, K / 2]``, scales-and-middles bfloat16 ``[G, ⌈N / 16⌉ · 16, 2]``, and N.
    """
    whole = (0, 0, 0, -len(q) % CHANNELS)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(q, whole).int().contiguous(), 1)
    scales = torch.stack((F.pad(scale, whole), F.pad(middle, whole)), dim=2).transpose(0, 1)
    return packed, scales.contiguous().bfloat16(), len(q)


@cache
def _say_prefill_is_slow() -> None:
    print("axon: with PyTorch's int4 kernel long prompts are slow", file=sys.stderr)  # noqa: T201


class Int4Linear(FastLinear):
    """A linear layer on the CPU with int4 weights, multiplied by PyTorch's kernel.

    Args:
        packed: as :func:`pack` returns.
        scales: as :func:`pack` returns.
        out_features: N.
        bias: ``[N]`` or ``None``.
    """

    kind = "int4"
    packed: Tensor
    scales: Tensor

    def __init__(self, packed: Tensor, scales: Tensor, out_features: int, bias: Tensor | None = None) -> None:
        super().__init__(packed.shape[1] * 2, out_features)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        _say_prefill_is_slow()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]`` in x's dtype."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales)
        y = y[:, : self.out_features].reshape(*x.shape[:-1], self.out_features).to(x.dtype)
        return y if self.bias is None else y + self.bias

    @property
    def weight_bytes(self) -> int:
        """Bytes of int4 values, scales and middles."""
        return self.packed.nbytes + self.scales.nbytes


class Int4WeightLinear(FastLinear):
    """A linear layer with int4 weights, two in a byte, where there are no kernels for that.

    The weights are converted first: a copy in the activations' type, written and read again at every call.

    Args:
        q: ``[N, K]`` uint8, 0 … 15.
        scale: ``[N, G]``.
        middle: ``[N, G]``.
        bias: ``[N]`` or ``None``.
    """

    kind = "int4-weights"
    halves: Tensor
    scale: Tensor
    middle: Tensor

    def __init__(self, q: Tensor, scale: Tensor, middle: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(q.shape[1], q.shape[0])
        self.register_buffer("halves", q[:, ::2] | (q[:, 1::2] << 4))  # [N, K / 2]
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("middle", middle.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]`` in x's dtype."""
        q = torch.stack((self.halves & 15, self.halves >> 4), dim=2).view(self.out_features, -1, GROUP)  # [N, G, 32]
        weight = (q.to(x.dtype) - 8) * self.scale[..., None].to(x.dtype) + self.middle[..., None].to(x.dtype)
        return F.linear(x, weight.view(self.out_features, self.in_features), self.bias)

    @property
    def weight_bytes(self) -> int:
        """Bytes of int4 values, scales and middles."""
        return self.halves.nbytes + self.scale.nbytes + self.middle.nbytes
