"""Linear layers on a GPU, multiplied by the kernels beside this file.

A block asks for four things: a product, one of a normed row, one added to the stream, and ``silu(gate) · up``. What of
it one kernel does, and which, depends on the weights and on the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from axon_llm.fast.gpu.operators import gpu_kernels
from axon_llm.fast.gpu.words import PIECES, to_pairs, to_words
from axon_llm.fast.linear import FastLinear
from axon_llm.fast.plan import INT4_FEW, INT8_FEW

WIDENED = 32768  # int4 output channels that are numbers at a time: all of a block's, and a part of an output layer's


class GpuLinear(FastLinear):
    """What they share: the four ways to ask.

    Args:
        inputs: K.
        outputs: N.
        bias: ``[N]`` or ``None``.
    """

    piece = 1  # input channels that there must be a multiple of

    def __init__(self, inputs: int, outputs: int, bias: Tensor | None) -> None:
        super().__init__(inputs, outputs)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @staticmethod
    def where_it_suits(values: tuple[Tensor, ...], bias: Tensor | None) -> GpuLinear | None:
        """One for weights ``[N, K]``, or quantised values and their scales, if there can be one."""
        weight = values[0]
        kinds: dict[torch.dtype, type[GpuLinear]] = {torch.int8: GpuInt8Linear, torch.uint8: GpuInt4Linear}
        made_of = kinds[weight.dtype] if len(values) > 1 else GpuPlainLinear
        if weight.device.type != "cuda" or weight.shape[1] % made_of.piece or not gpu_kernels():
            return None
        return made_of(*(each.detach() for each in values), bias)  # type: ignore[call-arg, arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]`` in x's dtype."""
        return self.product(x, None, 0.0, None, False)

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """The same of ``x`` normed with ``norm`` ``[K]``."""
        return self.product(x, norm, eps, None, False)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + self(x)``."""
        return self.product(x, None, 0.0, residual, False)

    def gated(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """``silu(gate) · up`` ``[…, N / 2]`` of ``x`` normed, where these weights are gate's and then up's."""
        return self.product(x, norm, eps, None, True)

    def product(self, x: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None, gated: bool) -> Tensor:
        """What the four ask for: ``x`` normed if ``norm`` is given; the stream added, or gated."""
        raise NotImplementedError

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and scales."""
        return sum(part.nbytes for part in self.buffers())


class GpuPlainLinear(GpuLinear):
    """Weights as stored. One row is multiplied by ``one_row.py``, more are by cuBLAS.

    Args:
        weight: ``[N, K]``, K a multiple of 8.
        bias: ``[N]`` or ``None``.
    """

    kind = "plain-triton"
    piece = 8
    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.register_buffer("weight", weight.contiguous())

    def product(self, x: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None, gated: bool) -> Tensor:
        """See :meth:`GpuLinear.product`."""
        y: Tensor
        if x.numel() == self.in_features:
            if gated and self.bias is None:
                y = torch.ops.axon.row_gated(x, norm, eps, self.weight)
                return y
            y = torch.ops.axon.row_product(x, norm, eps, self.weight, None, self.bias, residual)
        else:
            x = x if norm is None else torch.ops.axon.gpu_norm(x, norm, eps)
            if residual is not None and self.bias is None:
                y = torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), self.weight.t())
                return y.view(residual.shape)
            y = F.linear(x, self.weight, self.bias)
            y = y if residual is None else residual + y
        return torch.ops.axon.gpu_gate(y) if gated else y


class GpuInt8Linear(GpuLinear):
    """int8 weights with a scale per output channel, and rows rounded to int8 with one scale each.

    Sums are integers, so a row's result is the same to the last bit whatever rows are computed with it.

    Args:
        q: ``[N, K]`` int8, K a multiple of 16.
        scale: ``[N]`` float32.
        bias: ``[N]`` or ``None``.
    """

    kind = "int8-triton"
    piece = PIECES["int8"]
    words: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(q.shape[1], q.shape[0], bias)
        self.register_buffer("words", to_words(q))
        self.register_buffer("scale", scale.float().contiguous())

    def product(self, x: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None, gated: bool) -> Tensor:
        """See :meth:`GpuLinear.product`."""
        q, steps = torch.ops.axon.round_rows(x, norm, eps)
        given = self.words, self.scale, self.bias, residual, gated, x.dtype
        if q.shape[0] <= INT8_FEW:
            y: Tensor = torch.ops.axon.gpu_few_rows(q, steps, None, *given)
        else:
            y = torch.ops.axon.gpu_int8_tiles(q, steps, *given)
        return y.view(*x.shape[:-1], y.shape[-1])


class GpuInt4Linear(GpuLinear):
    """int4 weights with a scale and a middle per group of 32, and rows rounded to int8 with a scale per group.

    For many rows both become numbers first, in the activations' type, which cuBLAS multiplies: of the weights a copy
    that is written and read again at every call.

    Args:
        q: ``[N, K]`` uint8, 0 … 15, K a multiple of 32.
        scale: ``[N, K / 32]``.
        middle: ``[N, K / 32]``.
        bias: ``[N]`` or ``None``.
    """

    kind = "int4-triton"
    piece = PIECES["int4"]
    words: Tensor
    pairs: Tensor

    def __init__(self, q: Tensor, scale: Tensor, middle: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(q.shape[1], q.shape[0], bias)
        self.register_buffer("words", to_words(q))
        self.register_buffer("pairs", to_pairs(scale, middle))

    def product(self, x: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None, gated: bool) -> Tensor:
        """See :meth:`GpuLinear.product`."""
        y: Tensor
        if x.numel() <= INT4_FEW * self.in_features:
            rounded = torch.ops.axon.round_groups(x, norm, eps)
            y = torch.ops.axon.gpu_few_rows(*rounded, self.words, self.pairs, self.bias, residual, gated, x.dtype)
            return y.view(*x.shape[:-1], y.shape[-1])
        x = torch.ops.axon.as_in_groups(x if norm is None else torch.ops.axon.gpu_norm(x, norm, eps))
        slices = zip(self.words.split(WIDENED), self.pairs.split(WIDENED), strict=True)
        parts = [F.linear(x, torch.ops.axon.widen(words, pairs, x.dtype)) for words, pairs in slices]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        y = y if self.bias is None else y + self.bias
        y = y if residual is None else residual + y
        return torch.ops.axon.gpu_gate(y) if gated else y
