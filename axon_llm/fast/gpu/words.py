"""The layout that the GPU kernels read quantised weights in: words of 32 bits, with four int8 or eight int4 in each.

Four words are what a thread loads at once, a *piece*: 16 input channels of int8, 32 of int4, of which the latter are a
group with a scale and a middle of its own. Byte b of word i is channel ``4·b + i`` of its piece; of int4 that is a
byte's low half, and the high half is channel ``16 + 4·b + i``. Scale and middle of a group are the halves of a word,
too, bfloat16 both, so that one load brings them.

Legend: N output channels · K input channels · P weights in a word
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECES = {"int8": 16, "int4": 32}  # input channels of one


def to_words(q: Tensor) -> Tensor:
    """Quantised weights ``[N, K]`` as int32 words ``[N, K / P]``.

    Args:
        q: int8, K a multiple of 16 (P = 4); or uint8, 0 … 15, K a multiple of 32 (P = 8).
    """
    N, K = q.shape
    if q.dtype == torch.int8:
        bytes_ = q.view(N, K // 16, 4, 4).transpose(2, 3)  # [N, pieces, i, b]
    else:
        halves = q.view(N, K // 32, 2, 4, 4).transpose(3, 4)  # [N, pieces, half, i, b]
        bytes_ = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return bytes_.contiguous().view(torch.int32).view(N, -1)


def from_words(words: Tensor, P: int) -> Tensor:
    """The reverse: int8 ``[N, K]``; int4 as 0 … 15."""
    N = words.shape[0]
    bytes_ = words.view(torch.int8).view(N, -1, 4, 4).transpose(2, 3)  # [N, pieces, b, i]
    if P == 4:
        return bytes_.reshape(N, -1)
    return torch.stack((bytes_ & 15, (bytes_ >> 4) & 15), dim=2).reshape(N, -1)


def to_pairs(scale: Tensor, middle: Tensor) -> Tensor:
    """Scales and middles of int4's groups, ``[N, K / 32]`` both, as int32 of the same shape: the scale below."""
    return torch.stack((scale.bfloat16(), middle.bfloat16()), dim=-1).view(torch.int32)[..., 0].contiguous()
