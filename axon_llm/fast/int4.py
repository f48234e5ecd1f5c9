"""int4 weights in groups of 32, 5 bits with scale and middle: under a third of bfloat16's bytes.

Few rows go through PyTorch's int4 kernel, which turns weights into numbers as it reads them, once for every four rows.
Many rows would make it do so over and over; for them the weights are turned into bfloat16 once, a block of output
channels at a time so that the block stays in the processor's cache, and multiplied like any others.

On the CPU the kernel's layout (AVX-512 and AVX2 alike, N a multiple of 64 or 32) is plain enough to be read from
outside: see :func:`unpack`. The layout is checked once per process against the operator that writes it.

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

# Rows from which a block-wise conversion is cheaper than the kernel's repeated one (docs/performance.md).
MANY_ROWS = 64
FEW_ROWS = 64  # that the kernels of weight_only.py are for
_BLOCK_BYTES = 1 << 20  # of bfloat16 weights at a time: about half of a core's L2


def pack(q: Tensor, scale: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales in the layout of the CPU's int4 kernel.

    Args:
        q: ``[N, K]`` uint8, 0 … 15.
        scale: ``[N, G]``.
        middle: ``[N, G]``.

    Returns:
        packed uint8 ``[N, K / 2]`` and scales-and-middles bfloat16 ``[G, N, 2]``.
    """
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int().contiguous(), 1)
    return packed, torch.stack((scale, middle), dim=2).transpose(0, 1).contiguous().bfloat16()


def unpack(packed: Tensor) -> Tensor:
    """Values out of the kernel's layout: ``[N, K / 2]`` → uint8 ``[N / 64, K, 64]``, output channels last.

    Per 64 output channels and input channel the kernel keeps 32 bytes: the low halves are channels 0 … 31, the high
    halves 32 … 63.
    """
    blocks = packed.view(packed.shape[0] // 64, packed.shape[1] * 2, 32)
    return torch.cat((blocks & 15, blocks >> 4), dim=2)


@cache
def layout_is_known() -> bool:
    """The kernel on this CPU is there, and uses the layout that :func:`unpack` reads."""
    if not ops.works("int4"):
        return False
    q = torch.randint(0, 16, (128, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    return bool((unpack(packed).transpose(1, 2).reshape(q.shape) == q).all())


@cache
def _say_many_rows_are_slow(why: str) -> None:
    print(f"axon: int4 weights are not converted by blocks, so prefill is slow: {why}", file=sys.stderr)  # noqa: T201


class Int4Linear(FastLinear):
    """A linear layer on the CPU with int4 weights.

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
        self.blockwise = packed.shape[0] % 64 == 0 and layout_is_known()
        self.wide = ops.wide_products()
        if not self.blockwise:
            _say_many_rows_are_slow("this CPU's layout is not known" if packed.shape[0] % 64 == 0 else "odd sizes")

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]`` in x's dtype."""
        rows = x.reshape(-1, self.in_features)
        if self.blockwise and rows.shape[0] >= MANY_ROWS:
            many = torch.ops.axon.int4_many if torch.compiler.is_compiling() else ops.int4_many
            y = many(rows, self.packed, self.scales, self.wide)
        else:
            few = rows.to(torch.bfloat16).contiguous()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(few, self.packed, GROUP, self.scales)
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
