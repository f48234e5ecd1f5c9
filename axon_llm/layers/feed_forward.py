"""The feed-forward half of a block: SwiGLU (Shazeer, 2020, "GLU Variants Improve Transformer")."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from axon_llm.config import ModelConfig


class FeedForward(nn.Module):
    """``down(silu(gate(x)) · up(x))``: each token by itself, hidden → intermediate → hidden."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, intermediate, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` ``[B, T, hidden]`` to the same shape."""
        gated: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return gated
