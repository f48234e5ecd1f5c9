"""int8 weights and int8 activations (W8A8): half the bytes of bfloat16, and integer products at twice its rate.

Each *row* of activations gets a scale of its own. With one scale for a whole call, the usual way, a token's rounding
would depend on the largest value among its batch-mates, and so would its answer. Integer sums have no rounding and no
order, so here a row's result is the same to the last bit whatever rows are computed with it.

Activations are stored as unsigned bytes around 128 because that is the one operand that both kinds of x86 integer
instruction (VNNI and AMX) multiply at full speed; signed ones are hundreds of times slower without AMX.

Legend: R rows · K input channels · N output channels
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from axon_llm.fast import ops
from axon_llm.fast.linear import FastLinear

# A little above 1/127: the scale is then rounded to bfloat16, and the largest value must still fit.
_STEP = 1.004 / 127


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of ``x`` ``[…, K]`` to bytes around 128.

    Returns:
        ``q`` uint8 ``[…, K]`` and ``scale`` ``[…, 1]``, with ``x ≈ (q − 128) · scale``; in x's dtype, but of float16 in
        float32: a small scale would lose its digits, and the largest value would no longer fit.
    """
    scale = (x.abs().amax(dim=-1, keepdim=True).float() * _STEP).clamp_min(1e-20)  # [..., 1]
    scale = scale if x.dtype == torch.float16 else scale.to(x.dtype)
    return (x.float() / scale.float() + 128.5).to(torch.uint8), scale


class Int8Linear(FastLinear):
    """A linear layer on the CPU with int8 weights, one scale per output channel, and one activation scale per row.

    Args:
        q: ``[N, K]`` int8.
        scale: ``[N]`` float32.
        bias: ``[N]`` or ``None``.
    """

    kind = "int8"

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(q.shape[1], q.shape[0])
        self.packed = torch.ops.onednn.qlinear_prepack(q.contiguous(), None)
        self.scale = scale.contiguous()
        self.zero = torch.zeros(q.shape[0], dtype=torch.int64)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]`` in x's dtype."""
        q, scale = quantise_rows(x)
        product = torch.ops.axon.int8_linear if torch.compiler.is_compiling() else ops.int8_linear
        y: Tensor = (product(q, self.packed, self.scale, self.zero) * scale).to(x.dtype)
        return y if self.bias is None else y + self.bias

    @property
    def weight_bytes(self) -> int:
        """Bytes of int8 values and their scales."""
        return self.in_features * self.out_features + self.scale.nbytes


class Int8WeightLinear(FastLinear):
    """A linear layer with int8 weights and activations as they are, where there are no kernels for that.

    The weights are converted first: a copy in the activations' type, written and read again at every call.

    Args:
        q: ``[N, K]`` int8.
        scale: ``[N]`` float32.
        bias: ``[N]`` or ``None``.
    """

    kind = "int8-weights"
    q: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(q.shape[1], q.shape[0])
        self.register_buffer("q", q.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]`` in x's dtype."""
        # In float32: a product scaled in bfloat16 is what the compiler replaces by a kernel slower than bfloat16.
        y = (F.linear(x, self.q.to(x.dtype)).float() * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias

    @property
    def weight_bytes(self) -> int:
        """Bytes of int8 values and their scales."""
        return self.q.nbytes + self.scale.nbytes
