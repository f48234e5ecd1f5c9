"""The decoder: embed tokens, run them through the blocks, read off a score for every possible next token.

This file does not know what sampling, requests or text are. It keeps no state between calls: whatever is remembered is
in the cache that is passed in, and where each token stands is in ``positions``.

Legend: B slots · T new tokens · S positions attended

Read next: ``engine/generate.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
from axon_llm.layers.attention import Attention
from axon_llm.layers.feed_forward import FeedForward
from axon_llm.layers.norm import RMSNorm
from axon_llm.layers.rope import Rope


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normalised copy and added back to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> Tensor:
        """Map ``x`` ``[B, T, hidden]`` to the same shape; the other arguments are attention's."""
        x = x + self.self_attn(self.input_layernorm(x), positions, rope, mask, cache)
        mixed: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return mixed


class Blocks(nn.ModuleList):
    """The layers, one after the other, each with a window of its own on what came before.

    Args:
        blocks: of every layer.
        windows: how many tokens each layer's attention sees, or ``None``.
    """

    def __init__(self, blocks: Iterable[nn.Module] = (), windows: Sequence[int | None] = ()) -> None:
        super().__init__(blocks)
        self.windows = tuple(windows)

    def forward(self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        """Run new tokens through every layer.

        Args:
            x: their embeddings, ``[B, T, hidden]``.
            positions: ``[B, T]``.
            rope: cosine and sine of their angles, ``[B, 1, T, D]`` each.
            cache: read, and written at ``positions``, in place; ``None`` where the new tokens are all there is.

        Returns:
            ``[B, T, hidden]``.
        """
        key_positions = positions  # [B, S]
        if cache is not None:
            key_positions = torch.arange(cache.max_seq_len, device=positions.device)[None]  # [1, S]
        masks = {window: causal_mask(positions, key_positions, window) for window in set(self.windows)}
        for block, window in zip(self, self.windows, strict=True):
            x = block(x, positions, rope, masks[window], cache)
        return x


class Transformer(nn.Module):
    """A decoder-only transformer of the Llama family (Llama, Mistral, Qwen2, Qwen3).

    Parameter names are those of a Hugging Face checkpoint without its leading ``model.``.

    Args:
        config: dimensions and variations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = (Block(config, layer) for layer in range(config.num_layers))
        self.layers = Blocks(blocks, config.layer_windows)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.rope = Rope(config)

    def forward(
        self, tokens: Tensor, positions: Tensor, cache: KVCache | None = None, logits_at: Tensor | None = None
    ) -> Tensor:
        """Score every possible next token after each new token.

        Row i of ``tokens`` and ``positions`` belongs to slot i of the cache. With ``cache=None`` the new tokens are the
        whole sequence and nothing is remembered: the reference that the cached path is compared with.

        Args:
            tokens: new token ids, ``[B, T]`` int64.
            positions: their absolute positions in their sequences, ``[B, T]`` int64.
            cache: read, and written at ``positions``, in place; as many slots as there are rows.
            logits_at: score a single one of the T tokens of each row, ``[B]`` int64 (prefill needs just the last).

        Returns:
            Logits, ``[B, T, vocab]`` float32; ``[B, 1, vocab]`` with ``logits_at``.
        """
        x = self.embed_tokens(tokens)  # [B, T, hidden]
        x = self.layers(x, positions, self.rope(positions, x.dtype), cache)
        if logits_at is not None:
            x = x.gather(1, logits_at[:, None, None].expand(-1, 1, x.shape[-1]))  # [B, 1, hidden]
        logits: Tensor = self.lm_head(self.norm(x)).float()
        return logits


def causal_mask(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Which keys each query may look at: a token sees itself and what came before it, ``window`` tokens at most.

    Args:
        query_positions: of the new tokens, ``[B, T]``.
        key_positions: of the tokens that there are to look at, ``[B or 1, S]``.
        window: width of a sliding window (Mistral), or ``None``.

    Returns:
        ``[B, 1, T, S]`` bool, True where a query may look. It also hides what the cache holds beyond a sequence's end.
    """
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]  # [B, 1, T, S]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)
