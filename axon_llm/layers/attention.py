"""Attention: where a token looks at the tokens before it, and where the KV cache is read and written.

One layer, one call: project the new tokens to queries, keys and values; turn queries and keys by their positions; hand
keys and values to the cache and get everything remembered so far back; let each query take a weighted mean of values.
With ``cache=None`` nothing is remembered, and the new tokens are the whole sequence: the same lines, the cost of
recomputing every key and value on every step.

Legend: B slots · T new tokens · S positions attended · Hq/Hkv query and KV heads · G = Hq / Hkv · D head_dim

Read next: ``model.py``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
from axon_llm.layers.norm import RMSNorm
from axon_llm.layers.rope import rotate


class Attention(nn.Module):
    """Grouped-query attention over the cache (Ainslie et al., 2023, "GQA").

    G query heads share one key and value head: the cache is G times smaller than with a KV head for each query head.

    Args:
        config: the model's dimensions.
        layer: this layer's index, its address in the cache.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.out_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> Tensor:
        """Attend from the new tokens to everything their sequence holds.

        Args:
            x: hidden states of the new tokens, ``[B, T, hidden]``.
            positions: their absolute positions, ``[B, T]``.
            rope: cosine and sine at those positions, ``[B, 1, T, D]`` each.
            mask: which of the S positions each new token may see, ``[B, 1, T, S]`` bool.
            cache: written at ``positions`` and read; ``None`` attends among the new tokens alone (S = T).

        Returns:
            ``[B, T, hidden]``.
        """
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.num_heads, self.head_dim)).transpose(1, 2)  # [B, Hq, T, D]
        k = self.k_norm(self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim)).transpose(1, 2)  # [B, Hkv, T, D]
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # [B, Hkv, T, D]
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, positions, k, v)  # [B, Hkv, S, D]
        out = attend(q, k, v, mask)  # [B, Hq, T, D]
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(B, T, -1))
        return projected


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention, ``softmax(q · kᵀ / √D) · v``, without repeating K and V for the query heads that share them.

    The G query heads of one KV head are laid one after the other along the token axis: to the kernel they are G·T
    queries of one head, and K and V are read once where a repeat would copy them G times.

    Args:
        q: ``[B, Hq, T, D]``.
        k: ``[B, Hkv, S, D]``.
        v: ``[B, Hkv, S, D]``.
        mask: True where a query may look, ``[B, 1, T, S]``.

    Returns:
        ``[B, Hq, T, D]``.
    """
    B, Hq, T, D = q.shape
    Hkv, G = k.shape[1], Hq // k.shape[1]
    # Query heads h·G … h·G+G-1 share KV head h.
    folded = q.reshape(B, Hkv, G * T, D)  # [B, Hkv, G·T, D]: row g·T + t is token t of the group's query head g
    repeated = mask.repeat(1, 1, G, 1)  # [B, 1, G·T, S]: the same T rows for each head of the group
    out = F.scaled_dot_product_attention(folded, k.to(q.dtype), v.to(q.dtype), attn_mask=repeated)
    return out.reshape(B, Hq, T, D)
