"""Chance without state: random numbers that are a hash of seed and position, and the draw that uses them.

No generator is seeded, advanced or saved. So a draw cannot depend on batch-mates, timing, device or what ran before,
and a sequence that is continued elsewhere has the random numbers it would have had here.

Legend: R rows · V vocabulary, padded
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def draw(weights: Tensor, random: Tensor) -> Tensor:
    """Draw an index of each row, as likely as its weight: a block of the row, then an index of the block.

    Made to stay the same when the weights differ by rounding, as they do when a sequence is continued elsewhere:

    - It goes by the order of the row, not of the weights. When two weights are nearly equal, their *order* is noise.
    - The index has a random number of its own. Among many unlikely tokens the edges lie closer together than the error
      of a cumulative weight over the whole row; over their own block, that error is as small as they are.

    Args:
        weights: ``[R, V]`` float32, not negative, V a multiple of ``BLOCK``; a weight of 0 is never drawn.
        random: ``[R, 2]`` float64 in [0, 1).

    Returns:
        ``[R]`` int64.
    """
    blocks = weights.view(len(weights), -1, BLOCK)  # [R, V / BLOCK, BLOCK]
    block = _pass(blocks.sum(dim=-1, dtype=torch.float64), random[:, 0])
    return block * BLOCK + _pass(blocks[torch.arange(len(block), device=block.device), block], random[:, 1])


def _pass(weights: Tensor, random: Tensor) -> Tensor:
    """Where the cumulative weight ``[R, N]`` passes ``random`` ``[R]``."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    target = random[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[1] - 1)[:, 0]


def as_int64(value: int) -> int:
    """The integer in [-2⁶³, 2⁶³) that is the same modulo 2⁶⁴."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = as_int64(0x9E3779B97F4A7C15)
_MIX_1 = as_int64(0xBF58476D1CE4E5B9)
_MIX_2 = as_int64(0x94D049BB133111EB)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """Two random numbers for each (seed, position) pair: SplitMix64 (Steele et al., 2014) used as a hash.

    The seed is mixed before the position is added, so that neighbouring seeds do not give shifted copies of one stream.
    Integer arithmetic modulo 2⁶⁴: the same on every device.

    Args:
        seed: ``[R]`` int64.
        position: ``[R]`` int64.

    Returns:
        ``[R, 2]`` float64, multiples of 2⁻⁴⁰ in [0, 1).
    """
    first = _mix(_mix(seed + _GOLDEN) + position * _GOLDEN)
    return _shift_right(torch.stack((first, _mix(first + _GOLDEN)), dim=1), 24).double() * 2.0**-40


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical shift: zeros come in from the left, where ``>>`` on int64 repeats the sign."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted
