"""Swap a model's parts for fast ones, and say what was swapped.

The model is changed in place and returned; each weight is released as soon as its replacement exists, so that memory
peaks at one layer above the larger of the two. What comes out is a ``Transformer`` like any other: same forward, same
logits up to the order of summation (and up to quantisation, where asked for).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from axon_llm.errors import UsageError
from axon_llm.fast import native, ops
from axon_llm.fast.attention import AttentionKernels, RopeAtOnce, fastest_attention
from axon_llm.fast.blocks import (
    FusedAttention,
    FusedFeedForward,
    StripBlocks,
    StripHead,
    StripTransformer,
    multiplies_itself,
)
from axon_llm.fast.fp8 import Fp8Linear, check_sizes, quantise_fp8
from axon_llm.fast.gpu.block import GpuBlock, GpuNorm
from axon_llm.fast.gpu.linear import GpuLinear
from axon_llm.fast.int4 import Int4Linear, Int4WeightLinear, pack
from axon_llm.fast.int8 import Int8Linear, Int8WeightLinear
from axon_llm.fast.linear import FastLinear, PackedLinear, ParallelLinear, PlainLinear
from axon_llm.fast.plan import Plan, choose
from axon_llm.fast.quantise import GROUP, quantise_int4, quantise_int8
from axon_llm.fast.strips import Bf16Strips, Int4Strips, Int8Strips, StripEmbedding, lay_int4, lay_int8
from axon_llm.model import Transformer


def accelerate(
    model: Transformer,
    quantize: str | None = None,
    *,
    rows: int = 1,
    once: bool = False,
    plan: Plan | None = None,
) -> Transformer:
    """Replace the parts of a model that a faster variant exists for on its device.

    Args:
        model: changed in place; for inference only afterwards.
        quantize: ``"int8"``, ``"int4"``, ``"fp8"`` (on GPUs that have it) or ``None`` (same precision).
        rows: slots a decode step will run.
        once: for one answer only: start soon rather than run fastest.
        plan: overrides the choice (tests, measurements).

    Returns:
        The same model, or another made of its parts.

    Raises:
        UsageError: an unknown quantisation, one this device does not have, or a model that is quantised otherwise.
    """
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    if plan is None:
        plan = plan_for(device, dtype, quantize, rows, once)
        if plan.kernel == "packed" and not ops.works("packed", dtype):
            plan = replace(plan, kernel="plain", decode="F.linear", prefill="F.linear")
    kinds = {module.kind for module in model.modules() if isinstance(module, FastLinear)}
    if kinds and quantize is not None and not any(kind.startswith(quantize) for kind in kinds):
        raise UsageError(
            f"this model's weights are {', '.join(sorted(kind.removesuffix('-strips') for kind in kinds))} and cannot "
            f"become {quantize}",
            "Start from the original checkpoint.",
        )
    if plan.kernel == "reference" or kinds:
        return model  # nothing faster, or loaded from a packed checkpoint
    for module in model.modules():  # all of it before any is changed
        if isinstance(module, nn.Linear):
            _check_sizes(plan.kernel.removesuffix("-strips"), module.weight)
    model.requires_grad_(False)
    if plan.fuse:
        return join(fuse(model, lambda _, linears: _make(plan, rows, linears), fastest_attention(device, dtype)))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _make(plan, rows, [module]))
    return model


def plan_for(device: torch.device, dtype: torch.dtype, quantize: str | None, rows: int = 1, once: bool = False) -> Plan:
    """What :func:`axon_llm.fast.plan.choose` says of a device that is here.

    Raises:
        UsageError: an unknown quantisation, or one this device does not have.
    """
    on_cpu = device.type == "cpu"
    # Not asked for where they would not be used: asking compiles them.
    useful = on_cpu and dtype != torch.float16 and (quantize is not None or dtype == torch.bfloat16)
    strips = useful and native.load()
    return choose(
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        rows=rows,
        quantize=quantize,
        amx=on_cpu and ops.has_amx(),
        fp8=device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0),
        strips=strips,
        products=("bfloat16", "float32", "tiles")[ops.products()] if strips else "",
        once=once,
    )


def fuse(
    model: Transformer,
    make: Callable[[str, list[nn.Linear]], nn.Module],
    kernels: AttentionKernels | None = None,
) -> Transformer:
    """Replace every linear, several with the same input by one; and the embedding, where the output layer can be both.

    Args:
        model: changed in place.
        make: from the new linear's name (such as ``layers.0.self_attn.qkv_proj``) and the linears it stands for, in
            order, to the new linear.
        kernels: how attention is computed; as in the readable model when omitted. Blocks on a GPU have their own.

    Returns:
        The same model.
    """
    blocks: Any = model.layers  # of Block; the container does not say so
    tied = model.lm_head.weight is model.embed_tokens.weight
    # The output layer first: where it stands for the embedding too, that is released before the rest is laid out.
    head = make("lm_head", _take(model, "lm_head"))
    model.lm_head = head  # type: ignore[assignment]
    if isinstance(head, Bf16Strips) and tied:
        model.embed_tokens = StripEmbedding(head)  # type: ignore[assignment]
    for index, block in enumerate(blocks):
        attention, mlp, prefix = block.self_attn, block.mlp, f"layers.{index}"
        qkv = make(f"{prefix}.self_attn.qkv_proj", _take(attention, "q_proj", "k_proj", "v_proj"))
        out = make(f"{prefix}.self_attn.o_proj", _take(attention, "o_proj"))
        gate_up = make(f"{prefix}.mlp.gate_up_proj", _take(mlp, "gate_proj", "up_proj"))
        down = make(f"{prefix}.mlp.down_proj", _take(mlp, "down_proj"))
        linears = (qkv, out, gate_up, down)
        if on_gpu := GpuBlock.where_it_suits(block, linears, model.config.layer_windows[index]):
            blocks[index] = on_gpu
            continue
        block.self_attn = FusedAttention(attention, qkv, out, kernels)
        block.mlp = FusedFeedForward(gate_up, down)
    if isinstance(blocks[0], GpuBlock):
        model.norm = GpuNorm(model.norm)  # type: ignore[assignment]
    return model


def join(model: Transformer) -> Transformer:
    """Make one call of a fused model's blocks, and one of a whole step, where our own kernels multiply all of it.

    Args:
        model: changed in place; its weights are those it keeps.

    Returns:
        The same model, or another made of its parts.
    """
    blocks = StripBlocks.where_they_suit(model.layers)
    if blocks is None:
        return model
    model.layers = blocks
    model.rope = RopeAtOnce(model.rope)  # type: ignore[assignment]
    linear: Any = model.lm_head  # of another type than a Transformer's
    if multiplies_itself(linear):
        head = StripHead(model.norm, linear)
        model.norm, model.lm_head = nn.Identity(), head  # type: ignore[assignment]
    return StripTransformer.where_it_suits(model) or model


def describe(model: Transformer) -> dict[str, Any]:
    """What multiplies by this model's weights.

    Returns:
        ``kernels`` (kind → number of linears), ``linear_bytes`` (weights and scales a decode step reads),
        ``fused`` (projections are fused), ``plain_linears`` (not replaced).
    """
    kinds: dict[str, int] = {}
    total, untouched = 0, 0
    for _, module in _linears(model):
        if isinstance(module, FastLinear):
            kinds[module.kind] = kinds.get(module.kind, 0) + 1
            total += module.weight_bytes
        else:
            untouched += 1
            total += module.weight.nbytes
    return {
        "kernels": kinds,
        "linear_bytes": total,
        "fused": any(isinstance(module, FusedAttention | GpuBlock) for module in model.modules()),
        "plain_linears": untouched,
    }


def _linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, FastLinear | nn.Linear):
            yield name, module


def _take(parent: nn.Module, *names: str) -> list[nn.Linear]:
    """Remove linears from their parent, so that their weights can be released."""
    taken = [getattr(parent, name) for name in names]
    for name in names:
        delattr(parent, name)
    return taken


def quantised(quantize: str, linears: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """The weights of linears, stacked and quantised: values and scales.

    Raises:
        UsageError: input channels that cannot be grouped.
    """
    weight = stack([linear.weight for linear in linears])
    assert weight is not None
    if quantize == "int8":
        return quantise_int8(weight)
    if quantize == "fp8":
        return quantise_fp8(weight)
    _check_sizes(quantize, weight)
    return quantise_int4(weight)


def _check_sizes(quantize: str, weight: Tensor) -> None:
    """Raise UsageError for a weight ``[N, K]`` that cannot be quantised so."""
    if quantize == "fp8":
        check_sizes(weight)
    if quantize == "int4" and weight.shape[1] % GROUP:
        raise UsageError(
            f"int4 needs input channels that are multiples of {GROUP}; this model has a {list(weight.shape)} linear",
            "--quantize int8 has no such limit.",
        )


def build(kernel: str, values: tuple[Tensor, ...], bias: Tensor | None) -> FastLinear:
    """The linear that holds quantised weights, by a plan's kernel; a portable one where PyTorch lacks what it uses."""
    if kernel == "int8-strips":
        q, scale = values
        return Int8Strips(lay_int8(q), scale, q.shape[1], bias)
    if kernel == "int4-strips":
        return Int4Strips(lay_int4(*values), values[0].shape[1], values[0].shape[0], bias)
    if kernel == "fp8":
        q, scale = values
        return Fp8Linear(q, scale, bias)
    if on_gpu := GpuLinear.where_it_suits(values, bias):
        return on_gpu
    on_cpu = values[0].device.type == "cpu" and ops.works(kernel)
    if kernel == "int8":
        q, scale = values
        return Int8Linear(q, scale, bias) if on_cpu else Int8WeightLinear(q, scale, bias)
    q, scale, middle = values
    return Int4Linear(*pack(q, scale, middle), bias) if on_cpu else Int4WeightLinear(q, scale, middle, bias)


def _make(plan: Plan, rows: int, linears: Sequence[nn.Linear]) -> nn.Module:
    """One fast linear that does the work of several with the same input, stacked in order."""
    if plan.kernel == "plain" and len(linears) > 1:
        return ParallelLinear([PlainLinear(linear.weight, linear.bias) for linear in linears])
    bias = stack([linear.bias for linear in linears])
    quantize = plan.kernel.removesuffix("-strips")
    if quantize in ("int8", "int4", "fp8"):
        return build(plan.kernel, quantised(quantize, linears), bias)
    if plan.kernel == "bf16-strips":
        return Bf16Strips([linear.weight for linear in linears], bias)
    weight = stack([linear.weight for linear in linears])
    assert weight is not None
    if plan.kernel == "packed":
        return PackedLinear(weight, bias, rows)
    return (GpuLinear.where_it_suits((weight,), bias) if plan.kernel == "gpu" else None) or PlainLinear(weight, bias)


def stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Weights, or biases, of linears one below the other; ``None`` where there are none."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    return present[0] if len(present) == 1 else torch.cat(present)
