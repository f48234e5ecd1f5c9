"""Operators that stay whole when a step is compiled.

A compiler sees through ``torch.mv`` and rewrites it into a loop that is slower than the library's kernel, and it does
not know what to do with weights in oneDNN's own layout. Behind an operator of our own both are a single call with known
output, and so are our own kernels: ``kernels/`` for a CPU, declared here, ``gpu/`` for a GPU, in ``gpu/operators.py``.
There is nothing behind the names of the former until ``native.py`` has loaded them. Registering an operator is this
module's only side effect.

Legend: R rows · K input channels · N output channels
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from axon_llm.fast import native

_library = torch.library.Library("axon", "DEF")
_library.define("gemv(Tensor x, Tensor weight) -> Tensor")
_library.define("packed_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor")
_library.define("int8_linear(Tensor q, Tensor packed, Tensor scale, Tensor zero) -> Tensor")
_library.define("bf16_strips(Tensor x, Tensor strips, int out_features, int products) -> Tensor")
_library.define("int8_strips(Tensor x, Tensor strips, Tensor scale, int out_features, int products) -> Tensor")
_library.define("int4_strips(Tensor x, Tensor strips, int out_features, int products) -> Tensor")
_library.define("bf16_stored(Tensor x, Tensor weight, int products) -> Tensor")
_library.define("lay_strips(Tensor words, Tensor(a!) strips) -> ()")
_library.define("strip_rows(Tensor strips, Tensor channels, int words) -> Tensor")
_library.define("bf16_attention(Tensor q, Tensor k, Tensor v, Tensor mask, int products) -> Tensor")
_library.define("read_words(Tensor x) -> Tensor")
_library.define("likeliest(Tensor scores) -> (Tensor, Tensor)")
_library.define("bf16_angles(Tensor positions, Tensor frequencies, float scale) -> Tensor")
_library.define("bf16_rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor")
_library.define(
    "strips_blocks(Tensor x, Tensor positions, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values,"
    " int[] windows, int heads, int intermediate, float eps, Tensor[] norms, Tensor[] strips, Tensor[] scales,"
    " Tensor[] qkv_biases, Tensor[] out_biases, Tensor[] head_norms, int kind, int products) -> Tensor"
)
_library.define(
    "strips_step(Tensor tokens, Tensor positions, Tensor table, int hidden, Tensor frequencies, float angle_scale,"
    " Tensor(a!) keys, Tensor(b!) values, int[] windows, int heads, int intermediate, float eps, Tensor[] norms,"
    " Tensor[] strips, Tensor[] scales, Tensor[] qkv_biases, Tensor[] out_biases, Tensor[] head_norms, int kind,"
    " int products, Tensor last_norm, Tensor last, Tensor? last_scale, int out_features, int last_kind) -> Tensor"
)
_library.define(
    "strips_logits(Tensor x, Tensor norm, float eps, Tensor strips, Tensor? scale, int out_features, int kind,"
    " int products) -> Tensor"
)


def gemv(x: Tensor, weight: Tensor) -> Tensor:
    """One row times a matrix: ``x`` ``[…, K]`` with a single row, ``weight`` ``[N, K]`` → ``[…, N]``."""
    return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], weight.shape[0])


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Rows times a matrix in oneDNN's layout: ``x`` ``[…, K]`` → ``[…, N]`` in x's dtype.

    Args:
        x: bfloat16 or float32.
        packed: ``[N, K]``, opaque.
        bias: ``[N]`` or ``None``.
        out_features: N.
    """
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def int8_linear(q: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Bytes around 128 times int8 weights: ``q`` ``[…, K]`` → ``[…, N]``, not yet scaled by the rows' own scales.

    The result is float32: one in bfloat16 is what oneDNN has only a reference for where there is no AVX-512, and that
    is a thousand times slower.

    Args:
        q: uint8 ``[…, K]``.
        packed: weights in oneDNN's layout.
        scale: of the output channels, ``[N]``.
        zero: zeros, ``[N]`` int64.
    """
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        q, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


@cache
def works(kernel: str, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether this build of PyTorch has the operators that a kernel of ``plan.py`` uses on the CPU, and they run here.

    They belong to PyTorch's own compiler and are promised to nobody, so each is tried once, on a tiny product. Where
    one is missing or wrong, one line on stderr says what that costs: oneDNN adds products of bytes up in 16 bits on a
    processor with neither VNNI nor AMX, where large ones do not fit.

    Args:
        kernel: ``"packed"``, ``"int8"`` or ``"int4"``.
        dtype: of the weights to pack.
    """
    x = torch.ones(2, 64, dtype=dtype)
    try:
        if kernel == "packed":
            packed = torch.ops.mkldnn._reorder_linear_weight(torch.ones(64, 64, dtype=dtype), 1)
            packed_linear(x, packed, None, 64)
        elif kernel == "int8":
            packed = torch.ops.onednn.qlinear_prepack(torch.full((64, 64), 127, dtype=torch.int8), None)
            rows, scale = torch.full((2, 64), 255, dtype=torch.uint8), torch.ones(64)
            y = int8_linear(rows, packed, scale, torch.zeros(64, dtype=torch.int64))
            if not bool((y == 64 * 127 * 127).all()):
                raise NotImplementedError("its int8 sums overflow on this processor")
        elif kernel == "int4":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.ones(64, 64, dtype=torch.int32), 1)
            scales = torch.ones(2, 64, 2, dtype=torch.bfloat16)
            torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, 32, scales)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        costs = f"{kernel} linears run slowly, for PyTorch {torch.__version__} does not serve them: {reason}"
        print(f"axon: {costs}", file=sys.stderr)  # noqa: T201
        return False
    return True


def has_amx() -> bool:
    """The CPU multiplies small matrices in hardware (Intel AMX), in bfloat16 and int8."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe is not None and probe())


@cache
def wide_products() -> bool:
    """Products are faster in float32 than in bfloat16 on this CPU, the conversion of the weights included.

    Intel's processors with AVX-512 multiply bfloat16 at little more than half the rate of float32 where their matrix
    unit (AMX) is missing or hidden from a virtual machine; AMD's, and Intel's with AMX, at several times that rate. So
    the two are far apart everywhere, and a few milliseconds, once per process, tell them apart.
    """
    wide = torch.ones(256, 512)
    narrow = wide.bfloat16()

    def quickest(work: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)

    return 1.25 * quickest(lambda: wide @ wide.T) < quickest(lambda: narrow @ narrow.T)


class Products(IntEnum):
    """How our own kernels multiply; the numbers are those of ``kernels/strips.h``."""

    PAIRS = 0  # by the vector unit
    WIDE = 1  # by the vector unit, bfloat16 weights in float32
    TILES = 2  # by the matrix unit


@cache
def products() -> Products:
    """The fastest way on this CPU; compiles and loads the kernels if nobody has."""
    if native.tiles():
        return Products.TILES
    return Products.WIDE if not native.pairs() or wide_products() else Products.PAIRS


_library.impl("gemv", gemv, "CPU")
# The packed weight carries oneDNN's dispatch key, the activations the CPU's; either may be the one looked at first.
_library.impl("packed_linear", packed_linear, "CPU")
_library.impl("packed_linear", packed_linear, "MkldnnCPU")
_library.impl("int8_linear", int8_linear, "CPU")
_library.impl("int8_linear", int8_linear, "MkldnnCPU")


@torch.library.register_fake("axon::gemv", lib=_library)
def _gemv_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("axon::packed_linear", lib=_library)
def _packed_linear_shape(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("axon::int8_linear", lib=_library)
def _int8_linear_shape(q: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return scale.new_empty(*q.shape[:-1], scale.shape[0])


@torch.library.register_fake("axon::bf16_strips", lib=_library)
def _bf16_strips_shape(x: Tensor, strips: Tensor, out_features: int, products: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("axon::int8_strips", lib=_library)
def _int8_strips_shape(x: Tensor, strips: Tensor, scale: Tensor, out_features: int, products: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("axon::int4_strips", lib=_library)
def _int4_strips_shape(x: Tensor, strips: Tensor, out_features: int, products: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("axon::bf16_stored", lib=_library)
def _bf16_stored_shape(x: Tensor, weight: Tensor, products: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("axon::strip_rows", lib=_library)
def _strip_rows_shape(strips: Tensor, channels: Tensor, words: int) -> Tensor:
    return strips.new_empty(*channels.shape, words)


@torch.library.register_fake("axon::bf16_attention", lib=_library)
def _bf16_attention_shape(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, products: int) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("axon::bf16_angles", lib=_library)
def _bf16_angles_shape(positions: Tensor, frequencies: Tensor, scale: float) -> Tensor:
    B, T = positions.shape
    return frequencies.new_empty(2, B, 1, T, 2 * len(frequencies), dtype=torch.bfloat16)


@torch.library.register_fake("axon::bf16_rotate", lib=_library)
def _bf16_rotate_shape(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("axon::strips_blocks", lib=_library)
def _strips_blocks_shape(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("axon::strips_step", lib=_library)
def _strips_step_shape(tokens: Tensor, positions: Tensor, table: Tensor, hidden: int, *given: Any) -> Tensor:
    return tokens.new_empty(*tokens.shape, given[-2], dtype=torch.float32)


@torch.library.register_fake("axon::strips_logits", lib=_library)
def _strips_logits_shape(
    x: Tensor, norm: Tensor, eps: float, strips: Tensor, scale: Tensor | None, out_features: int, *_: object
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features, dtype=torch.float32)
