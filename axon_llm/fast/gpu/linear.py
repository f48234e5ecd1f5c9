"""Linear layers on a GPU, multiplied by the kernels beside this file.

A block asks for four things: a product, one of a normed row, one added to the stream, and ``silu(gate) · up``. What of
it one kernel does, and which, depends on the weights and on the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from axon_llm.fast.gpu.operators import gpu_kernels
from axon_llm.fast.gpu.words import PIECES, to_pairs, to_words
from axon_llm.fast.linear import FastLinear

# Rows that few_rows.py is the fastest for, measured on an H200.
INT8_FEW, INT4_FEW = 4, 8


class GpuLinear(FastLinear):
    """Weights as stored. One row is multiplied by ``one_row.py``, more are by cuBLAS.

    Args:
        weight: ``[N, K]``, K a multiple of 8.
        bias: ``[N]`` or ``None``.
    """

    kind = "plain-triton"
    piece = 8  # input channels that there must be a multiple of
    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.register_buffer("weight", weight.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def where_it_suits(cls, values: tuple[Tensor, ...], bias: Tensor | None) -> GpuLinear | None:
        """One for weights ``[N, K]``, or quantised values and their scales, if there can be one."""
        weight = values[0]
        kinds = {torch.int8: GpuInt8Linear, torch.uint8: GpuInt4Linear}
        kind: Any = kinds[weight.dtype] if len(values) > 1 else GpuLinear
        if weight.device.type != "cuda" or weight.shape[1] % kind.piece or not gpu_kernels():
            return None
        linear: GpuLinear = kind(*(each.detach() for each in values), bias)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]`` in x's dtype."""
        if x.numel() == self.in_features:
            return self._row(x)
        return F.linear(x, self.weight, self.bias)

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """The same of ``x`` normed with ``norm`` ``[K]``."""
        if x.numel() == self.in_features:
            return self._row(x, norm, eps)
        return self(torch.ops.axon.gpu_norm(x, norm, eps))

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + self(x)``."""
        if x.numel() == self.in_features:
            return self._row(x, residual=residual)
        if self.bias is None:
            return torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), self.weight.t()).view(residual.shape)
        return residual + self(x)

    def gated(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """``silu(gate) · up`` ``[…, N / 2]`` of ``x`` normed, where these weights are gate's and then up's."""
        y: Tensor
        if x.numel() == self.in_features and self.bias is None:
            y = torch.ops.axon.row_gated(x, norm, eps, self.weight)
        else:
            y = torch.ops.axon.gpu_gate(self.normed(x, norm, eps))
        return y

    def _row(self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.axon.row_product(x, norm, eps, self.weight, None, self.bias, residual)
        return y

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and scales."""
        return sum(part.nbytes for part in self.buffers())


class _GpuIntegerLinear(GpuLinear):
    """What int8 and int4 share: every product is of rounded rows, with what surrounds it."""

    def __init__(self, words: Tensor, scale: Tensor, inputs: int, bias: Tensor | None) -> None:
        FastLinear.__init__(self, inputs, words.shape[0])
        self.register_buffer("words", words)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]`` in x's dtype."""
        return self._product(x)

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """The same of ``x`` normed with ``norm`` ``[K]``."""
        return self._product(x, norm, eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + self(x)``."""
        return self._product(x, residual=residual)

    def gated(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """``silu(gate) · up`` ``[…, N / 2]`` of ``x`` normed, where these weights are gate's and then up's."""
        return self._product(x, norm, eps, gated=True)

    def _product(
        self,
        x: Tensor,
        norm: Tensor | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:
        raise NotImplementedError


class GpuInt8Linear(_GpuIntegerLinear):
    """int8 weights with a scale per output channel, and rows rounded to int8 with one scale each.

    Sums are integers, so a row's result is the same to the last bit whatever rows are computed with it.

    Args:
        q: ``[N, K]`` int8, K a multiple of 16.
        scale: ``[N]`` float32.
        bias: ``[N]`` or ``None``.
    """

    kind = "int8-triton"
    piece = PIECES["int8"]

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(to_words(q), scale.float().contiguous(), q.shape[1], bias)

    def _product(
        self,
        x: Tensor,
        norm: Tensor | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:
        q, steps = torch.ops.axon.round_rows(x, norm, eps)
        product = torch.ops.axon.gpu_few_rows if q.shape[0] <= INT8_FEW else torch.ops.axon.gpu_int8_tiles
        y: Tensor = product(q, steps, None, self.words, self.scale, self.bias, residual, gated, x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


class GpuInt4Linear(_GpuIntegerLinear):
    """int4 weights with a scale and a middle per group of 32, and rows rounded to int8 with a scale per group.

    For many rows the weights are converted first: a copy in the activations' type, which cuBLAS multiplies.

    Args:
        q: ``[N, K]`` uint8, 0 … 15, K a multiple of 32.
        scale: ``[N, K / 32]``.
        middle: ``[N, K / 32]``.
        bias: ``[N]`` or ``None``.
    """

    kind = "int4-triton"
    piece = PIECES["int4"]

    def __init__(self, q: Tensor, scale: Tensor, middle: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(to_words(q), to_pairs(scale, middle), q.shape[1], bias)

    def _product(
        self,
        x: Tensor,
        norm: Tensor | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:
        y: Tensor
        if x.numel() <= INT4_FEW * self.in_features:
            rounded = torch.ops.axon.round_groups(x, norm, eps)
            y = torch.ops.axon.gpu_few_rows(*rounded, self.words, self.scale, self.bias, residual, gated, x.dtype)
            return y.view(*x.shape[:-1], y.shape[-1])
        normed = x if norm is None else torch.ops.axon.gpu_norm(x, norm, eps)
        weight = torch.ops.axon.widen(self.words, self.scale, x.dtype)
        y = F.linear(torch.ops.axon.as_in_groups(normed), weight, self.bias)
        y = torch.ops.axon.gpu_gate(y) if gated else y
        return y if residual is None else residual + y
