"""fp8 weights and activations (e4m3) on GPUs from Hopper on: half of bfloat16's bytes, and products at twice its rate.

Each output channel has a scale, and each *row* of activations one of its own, so that a row's result does not depend on
the rows computed with it.

Legend: R rows · K input channels · N output channels
"""

from __future__ import annotations

import torch
from torch import Tensor

from axon_llm.errors import UsageError
from axon_llm.fast.gpu.linear import GpuLinear
from axon_llm.fast.gpu.operators import gpu_kernels

LARGEST = 448.0  # in e4m3
MULTIPLE = 16  # what the operator wants K and N to be


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of ``x`` ``[R, K]`` to e4m3 ``q`` and ``scale`` ``[R, 1]`` float32 with ``x ≈ q · scale``."""
    wide = x.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp_min(1e-12)
    return (wide / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def check_sizes(weight: Tensor) -> None:
    """Raise UsageError for a weight ``[N, K]`` that the operator does not take."""
    if weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
        raise UsageError(
            f"fp8 needs sizes that are multiples of {MULTIPLE}; this model has a {list(weight.shape)} linear",
            "--quantize int8 has no such limit.",
        )


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round ``weight`` ``[N, K]`` to e4m3 ``[N, K]`` and scales ``[N]`` float32.

    Raises:
        UsageError: N or K is not a multiple of 16.
    """
    check_sizes(weight)
    parts = [round_rows(rows) for rows in weight.split(4096)]  # a float32 copy of an output layer is a gigabyte
    return torch.cat([q for q, _ in parts]), torch.cat([scale[:, 0] for _, scale in parts])


class Fp8Linear(GpuLinear):
    """A linear layer with fp8 weights, one scale per output channel, and one activation scale per row.

    One row, rounded like any other, is multiplied by our own kernel; PyTorch's wants tiles full of them.

    Args:
        q: ``[N, K]`` e4m3.
        scale: ``[N]`` float32.
        bias: ``[N]`` or ``None``.
    """

    kind = "fp8"
    weight: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(q.shape[1], q.shape[0], bias)
        self.register_buffer("weight", q.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.kernels = gpu_kernels()

    def product(self, x: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None, gated: bool) -> Tensor:
        """See :meth:`axon_llm.fast.gpu.linear.GpuLinear.product`; ``x`` bfloat16."""
        y: Tensor
        x = x if norm is None else torch.ops.axon.gpu_norm(x, norm, eps)
        if self.kernels and x.numel() == self.in_features:
            x = torch.ops.axon.as_in_fp8(x)
            y = torch.ops.axon.row_product(x, None, 0.0, self.weight, self.scale, self.bias, residual)
        else:
            rows = x.reshape(-1, self.in_features)
            q, scale = torch.ops.axon.round_to_fp8(rows) if self.kernels else round_rows(rows)
            y = torch._scaled_mm(
                q, self.weight.t(), scale_a=scale, scale_b=self.scale[None], out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )  # fmt: skip
            y = y.view(*x.shape[:-1], self.out_features)
            y = y if self.bias is None else y + self.bias
            y = y if residual is None else residual + y
        return torch.ops.axon.gpu_gate(y) if gated else y
