"""Operators that stay whole when a step is compiled.

A compiler sees through ``torch.mv`` and rewrites it into a loop that is slower than the library's kernel, and it does
not know what to do with weights in oneDNN's own layout. Behind an operator of our own both are a single call with known
output, and so are our own kernels: ``gpu/`` for a GPU, ``kernels/`` for a CPU. Those on the CPU are declared
here (``bf16_…``, ``…_strips``, ``strip_rows``) and there is nothing behind the names until ``native.py`` has loaded
them. Registering an operator is this module's only side effect.

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
_library.define("bf16_rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor")
_library.define(
    "strips_qkv(Tensor x, Tensor norm, float eps, Tensor strips, Tensor? scale, Tensor? bias, Tensor? q_norm,"
    " Tensor? k_norm, Tensor cos, Tensor sin, int heads, int kv_heads, int kind, int products) -> Tensor"
)
_library.define("strips_remember(Tensor heads, Tensor positions, Tensor(a!) keys, Tensor(b!) values) -> ()")
_library.define(
    "strips_add(Tensor x, Tensor strips, Tensor? scale, Tensor? bias, Tensor residual, int kind, int products)"
    " -> Tensor"
)
_library.define(
    "strips_feed_forward(Tensor x, Tensor norm, float eps, Tensor gate_up, Tensor? gate_up_scale, Tensor down,"
    " Tensor? down_scale, int intermediate, int kind, int products) -> Tensor"
)
_library.define(
    "row_product(Tensor x, Tensor? norm, float eps, Tensor words, Tensor? scale, Tensor? middle, Tensor? bias,"
    " Tensor? residual) -> Tensor"
)
_library.define("row_gated(Tensor x, Tensor norm, float eps, Tensor words, Tensor? scale, Tensor? middle) -> Tensor")
_library.define("few_rows_product(Tensor x, Tensor words, Tensor scale, Tensor? middle) -> Tensor")
_library.define("gpu_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_library.define("round_to_fp8(Tensor x) -> (Tensor, Tensor)")
_library.define("gpu_gate(Tensor both) -> Tensor")
_library.define(
    "gpu_turn(Tensor heads, Tensor? q_norm, Tensor? k_norm, float eps, Tensor cos, Tensor sin, Tensor positions,"
    " Tensor(a!) keys, Tensor(b!) values) -> Tensor"
)
_library.define(
    "gpu_step(Tensor heads, Tensor? q_norm, Tensor? k_norm, float eps, Tensor cos, Tensor sin, Tensor positions,"
    " Tensor(a!) keys, Tensor(b!) values, int window) -> Tensor"
)
_library.define("widen(Tensor words, Tensor scale, Tensor? middle, int inputs, ScalarType dtype) -> Tensor")
_library.define("gpu_attention(Tensor q, Tensor keys, Tensor values, Tensor positions, int window) -> Tensor")


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


def row_product(
    x: Tensor, norm: Tensor | None, eps: float, words: Tensor, scale: Tensor | None, middle: Tensor | None,
    bias: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """See ``gpu/one_row.py``."""
    from axon_llm.fast.gpu import one_row

    return one_row.row_product(x.contiguous(), norm, eps, words, scale, middle, bias, residual)


def row_gated(
    x: Tensor, norm: Tensor, eps: float, words: Tensor, scale: Tensor | None, middle: Tensor | None
) -> Tensor:
    """See ``gpu/one_row.py``."""
    from axon_llm.fast.gpu import one_row

    return one_row.row_gated(x.contiguous(), norm, eps, words, scale, middle)


def few_rows_product(x: Tensor, words: Tensor, scale: Tensor, middle: Tensor | None) -> Tensor:
    """See ``gpu/few_rows.py``."""
    from axon_llm.fast.gpu import few_rows

    return few_rows.few_rows_product(x.contiguous(), words, scale, middle)


def gpu_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``gpu/around.py``."""
    from axon_llm.fast.gpu import around

    return around.rms_norm(x.contiguous(), weight, eps)


def round_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``gpu/around.py``."""
    from axon_llm.fast.gpu import around

    return around.round_to_fp8(x.contiguous())


def gpu_gate(both: Tensor) -> Tensor:
    """See ``gpu/around.py``."""
    from axon_llm.fast.gpu import around

    return around.gate(both.contiguous())


def gpu_turn(
    heads: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    positions: Tensor, keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """See ``gpu/around.py``."""
    from axon_llm.fast.gpu import around

    at = positions.contiguous()
    return around.turn(heads.contiguous(), q_norm, k_norm, eps, cos.contiguous(), sin.contiguous(), at, keys, values)


def gpu_step(
    heads: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    positions: Tensor, keys: Tensor, values: Tensor, window: int,
) -> Tensor:  # fmt: skip
    """See ``gpu/attention.py``."""
    from axon_llm.fast.gpu import attention

    given = heads.contiguous(), q_norm, k_norm, eps, cos.contiguous(), sin.contiguous(), positions.contiguous()
    return attention.attention_step(*given, keys, values, window)


def widen(words: Tensor, scale: Tensor, middle: Tensor | None, inputs: int, dtype: torch.dtype) -> Tensor:
    """See ``gpu/few_rows.py``."""
    from axon_llm.fast.gpu import few_rows

    return few_rows.widen(words, scale, middle, inputs, dtype)


def gpu_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int) -> Tensor:
    """See ``gpu/attention.py``."""
    from axon_llm.fast.gpu import attention

    return attention.attention(q.contiguous(), keys, values, positions.contiguous(), window)


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


@cache
def gpu_kernels() -> bool:
    """The kernels of ``gpu/`` can be used: Triton is installed. Where not, one line on stderr says so."""
    try:
        from axon_llm.fast.gpu import attention, few_rows  # noqa: F401
    except ImportError as error:
        print(f"axon: steps on the GPU are made of many kernels, which is slow: {error}", file=sys.stderr)  # noqa: T201
        return False
    return True


ON_GPU: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        row_product,
        row_gated,
        few_rows_product,
        widen,
        gpu_norm,
        round_to_fp8,
        gpu_gate,
        gpu_turn,
        gpu_step,
        gpu_attention,
    )
}
for _name, _kernel in ON_GPU.items():
    _library.impl(_name, _kernel, "CUDA")
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


@torch.library.register_fake("axon::bf16_rotate", lib=_library)
def _bf16_rotate_shape(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("axon::strips_qkv", lib=_library)
def _strips_qkv_shape(
    x: Tensor, norm: Tensor, eps: float, strips: Tensor, scale: Tensor | None, bias: Tensor | None,
    q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, kind: int,
    products: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:2], heads + 2 * kv_heads, cos.shape[3])


@torch.library.register_fake("axon::strips_remember", lib=_library)
def _strips_remember_shape(heads: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
    return None


@torch.library.register_fake("axon::strips_add", lib=_library)
def _strips_add_shape(
    x: Tensor, strips: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor, kind: int, products: int
) -> Tensor:
    return x.new_empty(residual.shape)


@torch.library.register_fake("axon::strips_feed_forward", lib=_library)
def _strips_feed_forward_shape(
    x: Tensor, norm: Tensor, eps: float, gate_up: Tensor, gate_up_scale: Tensor | None, down: Tensor,
    down_scale: Tensor | None, intermediate: int, kind: int, products: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


@torch.library.register_fake("axon::row_product", lib=_library)
def _row_product_shape(
    x: Tensor, norm: Tensor | None, eps: float, words: Tensor, scale: Tensor | None, middle: Tensor | None,
    bias: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], words.shape[0])


@torch.library.register_fake("axon::row_gated", lib=_library)
def _row_gated_shape(
    x: Tensor, norm: Tensor, eps: float, words: Tensor, scale: Tensor | None, middle: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0] // 2)


@torch.library.register_fake("axon::few_rows_product", lib=_library)
def _few_rows_product_shape(x: Tensor, words: Tensor, scale: Tensor, middle: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[0])


@torch.library.register_fake("axon::gpu_norm", lib=_library)
def _gpu_norm_shape(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("axon::round_to_fp8", lib=_library)
def _round_to_fp8_shape(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.register_fake("axon::gpu_gate", lib=_library)
def _gpu_gate_shape(both: Tensor) -> Tensor:
    return both.new_empty(*both.shape[:-1], both.shape[-1] // 2)


@torch.library.register_fake("axon::gpu_turn", lib=_library)
def _gpu_turn_shape(
    heads: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    positions: Tensor, keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    return heads.new_empty(*heads.shape[:2], heads.shape[2] - 2 * keys.shape[1], heads.shape[3])


@torch.library.register_fake("axon::gpu_step", lib=_library)
def _gpu_step_shape(
    heads: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    positions: Tensor, keys: Tensor, values: Tensor, window: int,
) -> Tensor:  # fmt: skip
    return heads.new_empty(*heads.shape[:2], heads.shape[2] - 2 * keys.shape[1], heads.shape[3])


@torch.library.register_fake("axon::widen", lib=_library)
def _widen_shape(words: Tensor, scale: Tensor, middle: Tensor | None, inputs: int, dtype: torch.dtype) -> Tensor:
    return words.new_empty(words.shape[0], inputs, dtype=dtype)


@torch.library.register_fake("axon::gpu_attention", lib=_library)
def _gpu_attention_shape(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int) -> Tensor:
    return q.new_empty(q.shape)
