"""Rotary position embedding: a token's position as an angle (Su et al., 2021, "RoFormer").

Channel ``i`` of a query or key is paired with channel ``i + D/2``, and each pair is turned by
``position · frequency_i``. The dot product of a query and a key then depends on their *distance* alone. The half-split
pairing is the one Hugging Face checkpoints are stored for.

The variants stretch the frequencies so that a model works beyond the context it was trained on: ``linear`` divides all
of them; ``llama3`` the slow ones only; ``yarn`` (Peng et al., 2023) blends by how often a channel turns within the
original context, and scales attention a little.

Legend: B slots · T new tokens · H heads · D head_dim
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from axon_llm.config import ModelConfig
from axon_llm.rope_config import RopeConfig


class Rope(nn.Module):
    """Turns positions into the cosines and sines that rotate queries and keys.

    Attributes:
        inv_freq: radians per position of each channel pair, ``[D / 2]`` float32.
        scale: factor on both cosine and sine (1 except for yarn).
    """

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies, self.attention_factor = rope_frequencies(config.rope, config.head_dim)
        # On the CPU even where the model is being built on "meta": it is computed, not loaded.
        self._exact = torch.tensor(frequencies, dtype=torch.float32, device="cpu")
        self.register_buffer("inv_freq", self._exact.clone(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rope:
        # model.to(bfloat16) must not round the frequencies: at position 8,000 that would be a wrong angle.
        super()._apply(fn, recurse)
        self.inv_freq = self._exact.to(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine for ``positions`` ``[B, T]``: ``[B, 1, T, D]`` each, from float32 to ``dtype``."""
        angles = positions[:, None, :, None].float() * self.inv_freq  # [B, 1, T, D/2]
        angles = torch.cat((angles, angles), dim=-1)  # [B, 1, T, D]
        return (angles.cos() * self.attention_factor).to(dtype), (angles.sin() * self.attention_factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` ``[B, H, T, D]`` by the angles whose cosine and sine are ``[B, 1, T, D]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[list[float], float]:
    """Radians per position for each of the ``head_dim / 2`` channel pairs, and the scale on cosine and sine.

    The arithmetic is float32 in the order transformers does it (``modeling_rope_utils.py``), so that angles at large
    positions agree to the last bit and not only nearly.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    scale = 1.0
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    elif rope.kind == "yarn":
        inv_freq, scale = _yarn(rope, head_dim, rope.theta**exponents)
    values: Any = inv_freq.tolist()
    return values, scale


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Divide slow channels by the factor, keep fast ones, blend those between."""
    wavelength = 2 * math.pi / inv_freq
    blend = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * inv_freq / rope.factor + blend * inv_freq
    slow = wavelength > rope.original_max_position_embeddings / rope.low_freq_factor
    fast = wavelength < rope.original_max_position_embeddings / rope.high_freq_factor
    return torch.where(slow, inv_freq / rope.factor, torch.where(fast, inv_freq, blended))


def _yarn(rope: RopeConfig, head_dim: int, pos_freq: Tensor) -> tuple[Tensor, float]:
    """Interpolate channels that turn seldom within the original context, keep those that turn often."""

    def channel_turning(turns: float) -> float:
        """The (fractional) channel that makes this many turns over the original context."""
        span = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return (head_dim * math.log(span)) / (2 * math.log(rope.theta))

    low, high = channel_turning(rope.beta_fast), channel_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    channels = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    keep = 1 - ((channels - low) / (high - low)).clamp(0, 1)
    inv_freq = 1.0 / (rope.factor * pos_freq) * (1 - keep) + 1.0 / pos_freq * keep
    return inv_freq, rope.attention_factor
