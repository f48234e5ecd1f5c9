"""int4 weights in groups of 32, without the kernels of ``strips.py``: PyTorch's own on a CPU, ours on a GPU.

Few rows are what both are made for: they turn weights into numbers as they read them. On a GPU many rows are multiplied
by weights that are converted once; PyTorch's CPU kernel converts them again for every four rows, so a prompt is slow.

Legend: R rows · K input channels · N output channels · G = K / 32 groups
"""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from axon_llm.fast import ops
from axon_llm.fast.linear import FastLinear
from axon_llm.fast.quantise import GROUP

FEW_ROWS = 64  # that the kernels of weight_only.py are for


def pack(q: Tensor, scale: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales in the layout of PyTorch's CPU kernel.

    Args:
        q: ``[N, K]`` uint8, 0 … 15.
        scale: ``[N, G]``.
        middle: ``[N, G]``.

    Returns:
        packed uint8 ``[N, K / 2]`` and scales-and-middles bfloat16 ``[G, N, 2]``.
    """
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int().contiguous(), 1)
    return packed, torch.stack((scale, middle), dim=2).transpose(0, 1).contiguous().bfloat16()


@cache
def _say_prefill_is_slow() -> None:
    print("axon: with PyTorch's int4 kernel long prompts are slow", file=sys.stderr)  # noqa: T201


class Int4Linear(FastLinear):
    """A linear layer on the CPU with int4 weights, multiplied by PyTorch's kernel.

    Args:
        packed: as :func:`pack` returns.
        scales: as :func:`pack` returns.
        bias: ``[N]`` or ``None``.
    """

    kind = "int4"
    packed: Tensor
    scales: Tensor

    def __init__(self, packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(packed.shape[1] * 2, packed.shape[0])
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        _say_prefill_is_slow()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]`` in x's dtype."""
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales)
        y = y.view(*x.shape[:-1], self.out_features).to(x.dtype)
        return y if self.bias is None else y + self.bias

    @property
    def weight_bytes(self) -> int:
        """Bytes of int4 values, scales and middles."""
        return self.packed.nbytes + self.scales.nbytes


class Int4WeightLinear(FastLinear):
    """A linear layer with int4 weights for devices without the CPU's kernel.

    Few rows go through a kernel that reads the weights as half bytes (``weight_only.py``). For many, and where there is
    no Triton, the weights are converted first: a copy in the activations' type, written and read again at every call.

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
        # Byte i of a group holds its channels i (low) and 16 + i (high): both halves meet neighbouring activations.
        grouped = q.view(q.shape[0], -1, GROUP)  # [N, G, 32]
        half = GROUP // 2
        self.register_buffer("halves", (grouped[..., :half] | (grouped[..., half:] << 4)).flatten(1))  # [N, K / 2]
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("middle", middle.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.few = FEW_ROWS if q.device.type == "cuda" and ops.few_rows_kernels() else 0  # rows the kernel is for
        if self.few:
            self.kind = "int4-triton"

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]`` in x's dtype."""
        if x.numel() <= self.few * self.in_features:
            rows = x.reshape(-1, self.in_features).contiguous()
            y: Tensor = torch.ops.axon.int4_few(rows, self.halves, self.scale, self.middle)
            y = y.view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        grouped = self.halves.view(self.out_features, -1, GROUP // 2)
        q = torch.cat((grouped & 15, grouped >> 4), dim=2)  # [N, G, 32]
        weight = (q.to(x.dtype) - 8) * self.scale[..., None].to(x.dtype) + self.middle[..., None].to(x.dtype)
        return F.linear(x, weight.view(self.out_features, self.in_features), self.bias)

    @property
    def weight_bytes(self) -> int:
        """Bytes of int4 values, scales and middles."""
        return self.halves.nbytes + self.scale.nbytes + self.middle.nbytes
