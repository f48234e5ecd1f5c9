"""Blocks with fewer calls than the readable one: parallel projections fused, and with our own kernels all the rest too.

Query, key and value read the same input; so do gate and up. One matrix of their rows one below the other is one call
instead of three, or two, and one longer stretch of memory to read; a checkpoint that is used as it is keeps them apart.
Where our own kernels multiply, all blocks are one call (``kernels/blocks.cpp``): a step of one token is otherwise busy
calling for a tenth of its time.

Legend: B slots · T new tokens · Hq/Hkv query and KV heads · D head_dim
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from axon_llm.cache import KVCache
from axon_llm.fast.attention import AttentionKernels, RopeAtOnce
from axon_llm.fast.linear import ParallelLinear, PlainLinear
from axon_llm.fast.strips import LANES, StripEmbedding, StripLinear
from axon_llm.layers.attention import Attention
from axon_llm.layers.norm import RMSNorm
from axon_llm.model import Blocks, Transformer

NO_WINDOW = 1 << 40  # wider than any sequence
STORED_PARTS = (3, 1, 2, 1)  # weights of a block's four products, as a checkpoint has them; kernels/blocks.h


class FusedAttention(nn.Module):
    """The readable ``Attention`` with one projection for query, key and value.

    Args:
        attention: whose norms and dimensions are taken over.
        qkv_proj: maps hidden to ``(Hq + 2 · Hkv) · D`` channels.
        o_proj: maps ``Hq · D`` channels back.
        kernels: what turns queries and keys, and has queries look at keys and values.
    """

    def __init__(
        self, attention: Attention, qkv_proj: nn.Module, o_proj: nn.Module, kernels: AttentionKernels | None = None
    ) -> None:
        super().__init__()
        self.layer = attention.layer
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.head_dim = attention.head_dim
        self.qkv_proj, self.o_proj = qkv_proj, o_proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.attend, self.rotate, self.skips_hidden = kernels or AttentionKernels()
        self.plain = isinstance(self.q_norm, nn.Identity)

    def forward(
        self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: KVCache | None
    ) -> Tensor:
        """As :meth:`axon_llm.layers.attention.Attention.forward`."""
        B, T, _ = x.shape
        Hq, Hkv = self.num_heads, self.num_kv_heads
        heads = self.qkv_proj(x).view(B, T, Hq + 2 * Hkv, self.head_dim).transpose(1, 2)  # [B, Hq + 2·Hkv, T, D]
        turning, v = heads[:, : Hq + Hkv], heads[:, Hq + Hkv :]
        if not self.plain:
            turning = torch.cat((self.q_norm(turning[:, :Hq]), self.k_norm(turning[:, Hq:])), dim=1)
        turned = self.rotate(turning, *rope)
        q, k = turned[:, :Hq], turned[:, Hq:]
        if cache is not None:
            k, v = cache.update(self.layer, positions, k, v)  # [B, Hkv, S, D]
        out = self.attend(q, k, v, mask)  # [B, Hq, T, D]
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(B, T, -1))
        return projected


class FusedFeedForward(nn.Module):
    """The readable ``FeedForward`` with gate and up in one linear.

    Args:
        gate_up_proj: maps hidden to twice the intermediate size, gate first.
        down_proj: maps back.
    """

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` ``[B, T, hidden]`` to the same shape."""
        both = self.gate_up_proj
        gate, up = both.parts(x) if isinstance(both, ParallelLinear) else both(x).chunk(2, dim=-1)
        # In place: in a long prompt these are the largest tensors there are.
        gated: Tensor = self.down_proj(F.silu(gate, inplace=True).mul_(up))
        return gated


class StripBlocks(Blocks):
    """The readable ``Blocks`` in one call, the cache's update among it; bfloat16, all weights of one format.

    They are in strips, or lie as they are stored, for an answer that is not worth laying out strips first. Without a
    cache, or over one of another type than the activations, they are blocks of parts (``FusedAttention``,
    ``FusedFeedForward``). The one call takes no mask: what a token may see follows from its position.

    The call's arguments are gathered once, and again when all blocks are moved or converted together. A weight that is
    exchanged by itself afterwards is not seen, nor are biases of weights as they are stored that change where they are.

    Args:
        blocks: of such parts, all for our own kernels, as :meth:`where_they_suit` finds out.
        windows: as those of ``Blocks``.
    """

    def __init__(self, blocks: Iterable[nn.Module], windows: Sequence[int | None] = ()) -> None:
        super().__init__(blocks, windows)
        self._gather()
        self.register_load_state_dict_post_hook(_gather_again)

    @classmethod
    def where_they_suit(cls, blocks: Blocks) -> StripBlocks | None:
        """The same blocks in one call, if there can be one."""
        parts: list[Any] = [(getattr(block, "self_attn", None), getattr(block, "mlp", None)) for block in blocks]
        if not all(isinstance(attention, FusedAttention) and attention.skips_hidden for attention, _ in parts):
            return None
        linears = [linear for attention, mlp in parts for linear in _linears(attention, mlp)]
        if not all(map(multiplies_itself, linears)):
            return None
        formats = {_parts(linear)[0].strip_kind for linear in linears}
        epsilons = {norm.eps for norm in blocks.modules() if isinstance(norm, RMSNorm)}
        after = [part for _, mlp in parts for linear in (mlp.gate_up_proj, mlp.down_proj) for part in _parts(linear)]
        biased = any(part.bias is not None for part in after)
        whole = [part.out_features for linear in linears for part in _parts(linear)[:-1]]  # by whole strips
        gated = [_parts(mlp.down_proj)[0].in_features for _, mlp in parts]
        counts = {tuple(len(_parts(linear)) for linear in _linears(*each)) for each in parts}
        expected = STORED_PARTS if PlainLinear.strip_kind in formats else (1, 1, 1, 1)
        alike = len(formats) == len(epsilons) == 1 and counts == {expected}
        if not alike or biased or any(size % LANES for size in (*whole, *gated)):
            return None
        return cls(blocks, blocks.windows)

    def _gather(self) -> None:
        """Put the arguments of the call together once: to ask 16 blocks for their parts takes 0.2 to 0.5 ms."""
        blocks: list[Any] = list(self)  # of Block; the container does not say so
        attention: list[Any] = [block.self_attn for block in blocks]
        linears: list[Any] = [linear for block in blocks for linear in _linears(block.self_attn, block.mlp)]
        norms = [norm for block in blocks for norm in (block.input_layernorm, block.post_attention_layernorm)]
        head_norms = [norm for part in attention for norm in (part.q_norm, part.k_norm) if isinstance(norm, RMSNorm)]
        products = [part for linear in linears for part in _parts(linear)]
        qkv_biases = [_bias(part.qkv_proj) for part in attention]
        self.given = (
            [NO_WINDOW if window is None else window for window in self.windows],
            attention[0].num_heads,
            blocks[0].mlp.down_proj.in_features,
            norms[0].eps,
            [norm.weight for norm in norms],
            [_strips(product) for product in products],
            [product.scale for product in products if product.scale is not None],
            [bias for bias in qkv_biases if bias is not None],
            [part.o_proj.bias for part in attention if part.o_proj.bias is not None],
            [norm.weight for norm in head_norms],
            products[0].strip_kind,
            products[0].products,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> StripBlocks:
        super()._apply(fn, recurse)
        self._gather()
        return self

    def forward(self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        """As :meth:`axon_llm.model.Blocks.forward`."""
        if cache is None or cache.k.dtype != x.dtype:
            return super().forward(x, positions, rope, cache)
        y: Tensor = torch.ops.axon.strips_blocks(x, positions, *rope, cache.k, cache.v, *self.given)
        return y


class StripHead(nn.Module):
    """The last norm and the output layer in one call, whose scores are float32 and were never rounded to bfloat16.

    Args:
        norm: of what comes out of the blocks.
        linear: maps hidden to the vocabulary; no bias.
    """

    def __init__(self, norm: RMSNorm, linear: StripLinear | PlainLinear) -> None:
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[…, hidden]`` bfloat16, not normalised → ``[…, vocab]`` float32."""
        norm, linear = self.norm, self.linear
        y: Tensor = torch.ops.axon.strips_logits(
            x, norm.weight, norm.eps, _strips(linear), linear.scale, linear.out_features, linear.strip_kind,
            linear.products,
        )  # fmt: skip
        return y


class StripTransformer(Transformer):
    """The readable ``Transformer`` whose step is one call, from tokens to scores.

    What it is called with is gathered once, as ``StripBlocks`` does. A prompt of which only one token is scored goes
    through the parts, and so does what their call does not take.

    Args:
        model: whose parts are taken over: ``StripBlocks``, ``StripHead``, ``RopeAtOnce``.
    """

    def __init__(self, model: Transformer) -> None:
        nn.Module.__init__(self)
        self.config = model.config
        for name, part in model.named_children():
            setattr(self, name, part)
        self.train(model.training)
        self._gather()
        self.register_load_state_dict_post_hook(_gather_again)

    @classmethod
    def where_it_suits(cls, model: Transformer) -> StripTransformer | None:
        """A model in one call of the same parts, if there can be one."""
        embedding, head = model.embed_tokens, model.lm_head
        even = model.config.hidden_size % 2 == 0 or not isinstance(embedding, StripEmbedding)
        parts = isinstance(model.layers, StripBlocks) and isinstance(model.rope, RopeAtOnce)
        if not (parts and even and isinstance(head, StripHead)) or head.norm.eps != model.config.norm_eps:
            return None
        return cls(model)

    def _gather(self) -> None:
        parts: Any = self  # of other types than those of a Transformer
        embedding, rope, head = parts.embed_tokens, parts.rope.rope, parts.lm_head
        linear = head.linear
        self._before: tuple[Any, ...] = (
            embedding.strips if isinstance(embedding, StripEmbedding) else embedding.weight,
            self.config.hidden_size,
            rope.inv_freq,
            rope.attention_factor,
        )
        self._after: tuple[Any, ...] = (
            *parts.layers.given,
            head.norm.weight,
            _strips(linear),
            linear.scale,
            linear.out_features,
            linear.strip_kind,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> StripTransformer:
        super()._apply(fn, recurse)
        self._gather()
        return self

    def forward(
        self, tokens: Tensor, positions: Tensor, cache: KVCache | None = None, logits_at: Tensor | None = None
    ) -> Tensor:
        """As :meth:`axon_llm.model.Transformer.forward`."""
        if cache is None or logits_at is not None or cache.k.dtype != torch.bfloat16:
            return super().forward(tokens, positions, cache, logits_at)
        y: Tensor = torch.ops.axon.strips_step(tokens, positions, *self._before, cache.k, cache.v, *self._after)
        return y

    @staticmethod
    def likeliest(scores: Tensor) -> tuple[Tensor, Tensor]:
        """As :func:`axon_llm.engine.sampling.likeliest`."""
        best, token = torch.ops.axon.likeliest(scores)
        return best, token


def _gather_again(module: Any, _: object) -> None:
    """After ``load_state_dict``: what was gathered may be of other tensors by now, or made of old ones."""
    module._gather()


def multiplies_itself(linear: nn.Module) -> bool:
    """Our own kernels multiply by a linear's weights, in strips or as they are stored."""
    return all(
        isinstance(part, StripLinear) or (isinstance(part, PlainLinear) and part.native) for part in _parts(linear)
    )


def _linears(attention: Any, mlp: Any) -> tuple[Any, ...]:
    return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj


def _parts(linear: Any) -> Sequence[Any]:
    """The linears that one stands for, where its weights are as they are stored; else itself."""
    return linear.linears if isinstance(linear, ParallelLinear) else (linear,)


def _strips(linear: Any) -> Tensor:
    """What the kernels multiply by."""
    weight: Tensor = linear.weight if isinstance(linear, PlainLinear) else linear.strips
    return weight


def _bias(linear: Any) -> Tensor | None:
    """Of all parts together, if they have one."""
    biases = [part.bias for part in _parts(linear) if part.bias is not None]
    return torch.cat(biases) if len(biases) > 1 else next(iter(biases), None)
