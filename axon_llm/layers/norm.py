"""Root-mean-square normalisation (Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization")."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scale each vector to unit root-mean-square, then by a learned weight per channel.

    The mean is taken in float32 whatever the model's dtype: a bfloat16 sum over thousands of channels loses digits that
    every later layer would feel.

    Args:
        size: channels, the last dimension of the input.
        eps: added to the mean square before the root.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` ``[..., size]`` over its last dimension; same shape and dtype out."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
