"""Linear layers whose weights lie in strips, for the kernels of ``kernels/linear.cpp``: one layout, three formats.

A strip holds 16 output channels. Each channel's weights are a row of 4-byte words, and the words of the 16 are
interleaved: first of all 16, second of all 16, and so on. What a word holds is the format's business; laying out and
reading back are the same for all, and this file does both in PyTorch, so that a machine without the kernels can read
what one with them wrote.

bf16 weights go with activations as they are. int8 and int4 weights go with activations rounded to int8, by row and by
row and group: one small error more, for products that are several times as fast. One row's result does not depend on
the rows computed with it, to the last bit.

Legend: R rows · K input channels · N output channels · W words of a channel · G groups of 32 input channels
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from axon_llm.fast import native, ops, pages
from axon_llm.fast.linear import FastLinear
from axon_llm.fast.quantise import GROUP

LANES = 16  # output channels of a strip
BLOCK = {"bf16": 16, "int8": 16, "int4": 10}  # words that the kernels take at a time; W is a multiple


def lay(words: Sequence[Tensor], block: int) -> Tensor:
    """Rows of words → strips.

    Args:
        words: ``[N, W]`` int32, of several linears one below the other.
        block: words that the kernels take at a time.

    Returns:
        ``[⌈N / 16⌉, W, 16]``, both sizes filled up with zeros.
    """
    if any(len(part) % LANES for part in words[:-1]):
        words = (torch.cat(tuple(words)),)
    length = -(-words[0].shape[1] // block) * block
    strips = pages.weights.empty((-(-sum(map(len, words)) // LANES), length, LANES), words[0].dtype)
    first = 0
    for part in words:
        here = strips[first : first + -(-len(part) // LANES)]
        first += len(here)
        if native.loaded() and part.stride(1) == 1:
            torch.ops.axon.lay_strips(part, here)
        else:
            padded = F.pad(part, (0, length - part.shape[1], 0, -len(part) % LANES))
            here.copy_(padded.view(-1, LANES, length).transpose(1, 2))
    return strips


def rows(strips: Tensor) -> Tensor:
    """Strips → rows of words, with what they were filled up with."""
    return strips.transpose(1, 2).reshape(-1, strips.shape[1])


def lay_bf16(weights: Sequence[Tensor]) -> Tensor:
    """``[N, K]`` bfloat16 each, of several linears one below the other → strips."""
    even = [weight if weight.shape[1] % 2 == 0 else F.pad(weight, (0, 1)) for weight in weights]
    return lay([weight.contiguous().view(torch.int32) for weight in even], BLOCK["bf16"])


def lay_int8(q: Tensor) -> Tensor:
    """``[N, K]`` int8 → strips of bytes around 128, the unsigned side of the processor's dot product."""
    unsigned = F.pad(q, (0, -q.shape[1] % 4)).contiguous().view(torch.uint8) ^ 128
    return lay([unsigned.view(torch.int32)], BLOCK["int8"])


def lay_int4(q: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    """``q`` ``[N, K]`` uint8, 0 … 15, ``scale`` and ``middle`` ``[N, G]`` → strips; a fifth word per group for both."""
    halves = q.view(*scale.shape, 4, 2, 4)  # [N, G, word, low or high, byte]
    values = (halves[..., 0, :] | (halves[..., 1, :] << 4)).contiguous().view(torch.int32)  # [N, G, 4, 1]
    factors = torch.stack((scale.bfloat16(), middle.bfloat16()), dim=-1).view(torch.int32)  # [N, G, 1]
    return lay([torch.cat((values[..., 0], factors), dim=-1).flatten(1)], BLOCK["int4"])


def read_int8(strips: Tensor, n: int, k: int) -> Tensor:
    """What :func:`lay_int8` was given."""
    return (rows(strips)[:n].contiguous().view(torch.uint8) ^ 128).view(torch.int8)[:, :k].contiguous()


def read_int4(strips: Tensor, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`lay_int4` was given."""
    groups = rows(strips)[:n, : 5 * (k // GROUP)].unflatten(1, (-1, 5))  # [N, G, 5]
    values = groups[..., :4].contiguous().view(torch.uint8).unflatten(-1, (4, 1, 4))  # [N, G, word, 1, byte]
    q = torch.cat((values & 15, values >> 4), dim=-2).reshape(n, k)
    scale, middle = groups[..., 4:].contiguous().view(torch.bfloat16).unbind(-1)  # [N, G] each
    return q, scale.contiguous(), middle.contiguous()


class StripLinear(FastLinear):
    """A linear layer on the CPU with weights in strips; subclasses know the format.

    Args:
        strips: as ``lay_…`` returns.
        in_features: K.
        out_features: N.
        bias: ``[N]`` or ``None``.
    """

    strip_kind = -1  # as numbered in kernels/weights.h
    strips: Tensor
    scale: Tensor | None

    def __init__(self, strips: Tensor, in_features: int, out_features: int, bias: Tensor | None = None) -> None:
        super().__init__(in_features, out_features)
        self.products = int(ops.products())
        self.register_buffer("scale", None)
        self.register_buffer("strips", strips)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, K]`` → ``[…, N]`` in x's dtype."""
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias

    def multiply(self, x: Tensor) -> Tensor:
        """The product without the bias."""
        raise NotImplementedError

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and scales."""
        return self.strips.nbytes


class Bf16Strips(StripLinear):
    """bfloat16 weights and activations.

    Args:
        weights: ``[N, K]`` bfloat16 each, of several linears one below the other; not needed afterwards.
        bias: ``[N]`` of all together, or ``None``.
    """

    kind = "bf16-strips"
    strip_kind = 0

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None = None) -> None:
        count = sum(len(weight) for weight in weights)
        super().__init__(lay_bf16([weight.detach() for weight in weights]), weights[0].shape[1], count, bias)

    def multiply(self, x: Tensor) -> Tensor:
        """In bfloat16, or in float32 where that is faster."""
        y: Tensor = torch.ops.axon.bf16_strips(x, self.strips, self.out_features, self.products)
        return y


class StripEmbedding(nn.Module):
    """The embedding of a model whose output layer is the same matrix, which is kept once: in the output layer's strips.

    A lookup gathers a token's words from its strip, which takes microseconds; the matrix once more as rows would take a
    fifth of a billion-parameter model's memory.

    Args:
        output: the output layer.
    """

    strips: Tensor

    def __init__(self, output: Bf16Strips) -> None:
        super().__init__()
        self.hidden_size = output.in_features
        self.register_buffer("strips", output.strips)

    @property
    def weight(self) -> Tensor:
        """The same memory; only its dtype and device mean what those of an ``nn.Embedding``'s weight do."""
        return self.strips.view(torch.bfloat16)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` ``[B, T]`` → ``[B, T, hidden]`` bfloat16."""
        words = torch.ops.axon.strip_rows(self.strips, tokens, (self.hidden_size + 1) // 2)
        embedded: Tensor = words.view(torch.bfloat16)[..., : self.hidden_size]
        return embedded


class Int8Strips(StripLinear):
    """int8 weights with a scale per output channel; activations rounded to int8 with a scale per row.

    Args:
        strips: as :func:`lay_int8` returns.
        scale: ``[N]`` float32.
        in_features: K.
        bias: ``[N]`` or ``None``.
    """

    kind = "int8-strips"
    strip_kind = 1
    scale: Tensor

    def __init__(self, strips: Tensor, scale: Tensor, in_features: int, bias: Tensor | None = None) -> None:
        super().__init__(strips, in_features, scale.shape[0], bias)
        # As long as whole strips are: the kernel reads 16 at a time.
        self.register_buffer("scale", F.pad(scale, (0, -scale.shape[0] % LANES)).contiguous())

    def multiply(self, x: Tensor) -> Tensor:
        """In integers, scaled at the end."""
        y: Tensor = torch.ops.axon.int8_strips(x, self.strips, self.scale, self.out_features, self.products)
        return y

    @property
    def weight_bytes(self) -> int:
        """Bytes of int8 values and their scales."""
        return self.strips.nbytes + self.scale.nbytes


class Int4Strips(StripLinear):
    """int4 weights in groups of 32; activations rounded to int8 with a scale per row and group."""

    kind = "int4-strips"
    strip_kind = 2

    def multiply(self, x: Tensor) -> Tensor:
        """In integers by groups, whose sums are scaled and added in float32; many rows by tiles in bfloat16."""
        y: Tensor = torch.ops.axon.int4_strips(x, self.strips, self.out_features, self.products)
        return y
