"""A linear layer on a GPU whose weights are read as words by the kernels beside this file."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from axon_llm.fast.gpu.operators import gpu_kernels
from axon_llm.fast.gpu.words import PIECES, to_words, weights_in_word
from axon_llm.fast.linear import FastLinear

FEW_ROWS = 64  # that quantised weights are multiplied by as they are
_KINDS = {1: "plain-triton", 4: "int8-triton", 8: "int4-triton"}


class GpuLinear(FastLinear):
    """A linear layer on a GPU: as stored, int8 with a scale per output channel, or int4 in groups of 32.

    One row is multiplied by ``one_row.py``, and a few by quantised weights by ``few_rows.py``. The rest is cuBLAS, for
    which quantised weights are converted first: a copy in the activations' type.

    Args:
        words: ``[N, K / P]``, see ``words.py``.
        inputs: K.
        scale: float32 ``[N]`` for int8, ``[N, K / 32]`` for int4.
        middle: ``[N, K / 32]`` for int4.
        bias: ``[N]`` or ``None``.
    """

    norms_rows = True  # a norm in front of one row costs nothing
    words: Tensor
    scale: Tensor | None
    middle: Tensor | None

    def __init__(
        self,
        words: Tensor,
        inputs: int,
        scale: Tensor | None = None,
        middle: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(inputs, words.shape[0])
        self.register_buffer("words", words.contiguous())
        self.register_buffer("scale", None if scale is None else scale.contiguous())
        self.register_buffer("middle", None if middle is None else middle.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.in_word = weights_in_word(words, inputs)
        self.kind = _KINDS[self.in_word]

    @classmethod
    def where_it_suits(cls, values: tuple[Tensor, ...], bias: Tensor | None) -> GpuLinear | None:
        """One for weights ``[N, K]``, or quantised values and their scales, if there can be one."""
        weight = values[0]
        piece = {torch.int8: PIECES["int8"], torch.uint8: PIECES["int4"]}.get(weight.dtype, 8)
        if weight.device.type != "cuda" or weight.shape[1] % piece or not gpu_kernels():
            return None
        words = to_words(weight) if len(values) > 1 else weight.detach()
        scale, middle = (*values[1:], None, None)[:2]
        return cls(words, weight.shape[1], scale, middle, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]`` in x's dtype."""
        rows = x.numel() // self.in_features
        if rows == 1:
            return self.row(x)
        if self.in_word > 1:  # one row is rounded on the way
            x = torch.ops.axon.round_pieces(x, 4 * self.in_word)
        if self.in_word > 1 and rows <= FEW_ROWS:
            flat = x.reshape(-1, self.in_features)
            y: Tensor = torch.ops.axon.few_rows_product(flat, self.words, self.scale, self.middle)
            y = y.view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.weight(x.dtype), self.bias)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + self(x)``, in one call where there is one for that."""
        if x.numel() == self.in_features:
            return self.row(x, residual=residual)
        if self.in_word == 1 and self.bias is None:
            y = torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), self.words.t())
            return y.view(residual.shape)
        return residual + self(x)

    def row(self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None) -> Tensor:
        """A single row, normed first and added to another, where those are given."""
        y: Tensor = torch.ops.axon.row_product(x, norm, eps, self.words, self.scale, self.middle, self.bias, residual)
        return y

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weights as numbers, ``[N, K]``."""
        if self.in_word == 1:
            return self.words
        w: Tensor = torch.ops.axon.widen(self.words, self.scale, self.middle, self.in_features, dtype)
        return w

    @property
    def weight_bytes(self) -> int:
        """Bytes of words, scales and middles."""
        return sum(part.nbytes for part in (self.words, self.scale, self.middle) if part is not None)
