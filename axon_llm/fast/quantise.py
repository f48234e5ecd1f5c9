"""Weights as small integers and scales: the arithmetic of quantisation, without any kernel.

* int8: one scale per output channel, symmetric. ``w ≈ q · scale`` with ``q`` in −127 … 127.
* int4: one scale and one middle per group of 32 input channels. ``w ≈ (q − 8) · scale + middle`` with ``q`` in 0 … 15:
  the group's smallest and largest weight are both kept to within half a step.

Rounding to nearest, no calibration data. What it costs in quality is in ``docs/performance.md``.

Legend: N output channels · K input channels · G = K / 32 groups

Read next: ``strips.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round ``weight`` ``[N, K]`` to int8 ``[N, K]`` and scales ``[N]`` float32."""
    values, scales = [], []
    for rows in weight.split(4096):  # in pieces: a float32 copy of an output layer is a gigabyte
        wide = rows.float()
        scale = (wide.abs().amax(dim=1) / 127).clamp_min(1e-12)
        values.append((wide / scale[:, None]).round_().to(torch.int8))
        scales.append(scale)
    return torch.cat(values), torch.cat(scales)


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round ``weight`` ``[N, K]`` to 0 … 15.

    Returns:
        ``q`` uint8 ``[N, K]``, ``scale`` and ``middle`` bfloat16 ``[N, G]``.

    Raises:
        ValueError: K is not a multiple of the group size.
    """
    if weight.shape[1] % GROUP:
        raise ValueError(f"{weight.shape[1]} input channels cannot be split into groups of {GROUP}")
    values, scales, middles = [], [], []
    for rows in weight.split(4096):
        wide = rows.float().view(rows.shape[0], -1, GROUP)  # [N, G, 32]
        low, high = wide.amin(dim=2), wide.amax(dim=2)
        # What the kernel will multiply by are the rounded scale and middle, so values are rounded against those.
        scale = ((high - low) / 15).clamp_min(1e-12).bfloat16()
        middle = (low + scale.float() * 8).bfloat16()
        q = ((wide - middle.float()[..., None]) / scale.float()[..., None] + 8).round_().clamp_(0, 15)
        values.append(q.to(torch.uint8).view(rows.shape))
        scales.append(scale)
        middles.append(middle)
    return torch.cat(values), torch.cat(scales), torch.cat(middles)


def dequantise_int8(q: Tensor, scale: Tensor) -> Tensor:
    """The weights that int8 values stand for, ``[N, K]`` float32."""
    return q.float() * scale[:, None]


def dequantise_int4(q: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    """The weights that int4 values stand for, ``[N, K]`` float32."""
    grouped = (q.float() - 8).view(q.shape[0], -1, GROUP)
    return (grouped * scale.float()[..., None] + middle.float()[..., None]).view(q.shape)
