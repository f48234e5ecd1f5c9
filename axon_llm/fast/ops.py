"""Operators that stay whole when a step is compiled.

A compiler sees through ``torch.mv`` and rewrites it into a loop that is slower than the library's kernel, and it does
not know what to do with weights in oneDNN's own layout. Behind an operator of our own both are a single call with known
output, and so are our own kernels for a GPU. Registering an operator is this module's only side effect.

Legend: R rows · K input channels · N output channels
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_library = torch.library.Library("axon", "DEF")
_library.define("gemv(Tensor x, Tensor weight) -> Tensor")
_library.define("packed_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, bool wide) -> Tensor")
_library.define("int8_linear(Tensor q, Tensor packed, Tensor scale, Tensor zero, bool wide) -> Tensor")
_library.define("int4_many(Tensor x, Tensor packed, Tensor scales, bool wide) -> Tensor")
_library.define("int8_few(Tensor x, Tensor q, Tensor scale) -> Tensor")
_library.define("int4_few(Tensor x, Tensor halves, Tensor scale, Tensor middle) -> Tensor")


def gemv(x: Tensor, weight: Tensor) -> Tensor:
    """One row times a matrix: ``x`` ``[…, K]`` with a single row, ``weight`` ``[N, K]`` → ``[…, N]``."""
    return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], weight.shape[0])


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, wide: bool) -> Tensor:
    """Rows times a matrix in oneDNN's layout: ``x`` ``[…, K]`` → ``[…, N]`` in x's dtype.

    Args:
        x: bfloat16 or float32.
        packed: ``[N, K]``, opaque.
        bias: ``[N]`` or ``None``.
        out_features: N.
        wide: convert the weights to float32 and multiply in that: see :func:`wide_products`.
    """
    if wide:
        weight = packed.to_dense(torch.float32)  # type: ignore[call-overload]
        y: Tensor = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
        return y.to(x.dtype)
    y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def int8_linear(q: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, wide: bool) -> Tensor:
    """Bytes around 128 times int8 weights: ``q`` ``[…, K]`` → ``[…, N]``, not yet scaled by the rows' own scales.

    Args:
        q: uint8 ``[…, K]``.
        packed: weights in oneDNN's layout.
        scale: of the output channels, ``[N]``.
        zero: zeros, ``[N]`` int64.
        wide: float32 out, else bfloat16.
    """
    dtype = torch.float32 if wide else torch.bfloat16
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        q, 1.0, 128, packed, scale, zero, None, 1.0, 0, dtype, "none", [], ""
    )
    return y


def int4_many(x: Tensor, packed: Tensor, scales: Tensor, wide: bool) -> Tensor:
    """Many rows times int4 weights, converted once: ``x`` ``[R, K]`` → ``[R, N]`` bfloat16.

    A weight is ``(q − 8) · scale + middle``. The first term is made explicit for 64 output channels at a time and
    multiplied; the second is the same for 32 input channels together, so it is a product 32 times smaller.

    Args:
        x: ``[R, K]``.
        packed: ``[N, K / 2]`` in the layout of the CPU's int4 kernel, 64 output channels together.
        scales: scales and middles, ``[K / 32, N, 2]``.
        wide: convert to float32 instead and multiply in that: see :func:`wide_products`.
    """
    channels, half = packed.shape
    dtype = torch.float32 if wide else torch.bfloat16
    x, scales = x.to(dtype), scales.to(dtype)
    blocks = packed.view(channels // 64, 2 * half, 32)  # [N/64, K, 32] bytes: channels 0 … 31 low, 32 … 63 high
    factors = scales[..., 0].unflatten(1, (-1, 64)).transpose(0, 1).contiguous().unsqueeze(2)  # [N/64, G, 1, 64]
    y = x.unflatten(1, (-1, 32)).sum(dim=2) @ scales[..., 1]  # [R, N]
    at_once = max(1, (1 << 20) // (64 * dtype.itemsize * 2 * half))  # about a megabyte: stays in the second-level cache
    for first in range(0, channels // 64, at_once):
        signed = (blocks[first : first + at_once] ^ 0x88).view(torch.int8)  # two's complement of q − 8, twice
        weight = torch.cat(((signed << 4) >> 4, signed >> 4), dim=2).to(dtype)  # [n, K, 64]
        weight.unflatten(1, (-1, 32)).mul_(factors[first : first + at_once])
        for channel, block in zip(range(64 * first, channels, 64), weight, strict=False):
            y[:, channel : channel + 64].addmm_(x, block)
    return y.bfloat16()


def int8_few(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Few rows times int8 weights on a GPU: see ``weight_only.py``."""
    from axon_llm.fast import weight_only

    return weight_only.int8_few(x, q, scale)


def int4_few(x: Tensor, halves: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    """Few rows times int4 weights on a GPU: see ``weight_only.py``."""
    from axon_llm.fast import weight_only

    return weight_only.int4_few(x, halves, scale, middle)


@cache
def works(kernel: str, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether this build of PyTorch has the operators that a kernel of ``plan.py`` uses on the CPU, and they run here.

    They belong to PyTorch's own compiler and are promised to nobody, so each is tried once, on a tiny product. Where
    one is missing, one line on stderr says what that costs.

    Args:
        kernel: ``"packed"``, ``"int8"`` or ``"int4"``.
        dtype: of the weights to pack.
    """
    x = torch.ones(2, 64, dtype=dtype)
    try:
        if kernel == "packed":
            packed = torch.ops.mkldnn._reorder_linear_weight(torch.ones(64, 64, dtype=dtype), 1)
            packed_linear(x, packed, None, 64, False)
        elif kernel == "int8":
            packed = torch.ops.onednn.qlinear_prepack(torch.ones(64, 64, dtype=torch.int8), None)
            rows, scale = torch.full((2, 64), 129, dtype=torch.uint8), torch.ones(64)
            int8_linear(rows, packed, scale, torch.zeros(64, dtype=torch.int64), wide=True)
        elif kernel == "int4":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.ones(64, 64, dtype=torch.int32), 1)
            scales = torch.ones(2, 64, 2, dtype=torch.bfloat16)
            torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, 32, scales)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        costs = f"{kernel} linears run slowly, for PyTorch {torch.__version__} lacks what they use: {reason}"
        print(f"axon: {costs}", file=sys.stderr)  # noqa: T201
        return False
    return True


@cache
def wide_products() -> bool:
    """Products of many rows are faster in float32 than in bfloat16 on this CPU, by enough to convert the weights first.

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


@cache
def few_rows_kernels() -> bool:
    """The kernels of ``weight_only.py`` can be used: Triton is installed. Where not, one line on stderr says so."""
    try:
        from axon_llm.fast import weight_only  # noqa: F401
    except ImportError as error:
        print(f"axon: quantised weights are converted at every step, which is slow: {error}", file=sys.stderr)  # noqa: T201
        return False
    return True


_library.impl("int8_few", int8_few, "CUDA")
_library.impl("int4_few", int4_few, "CUDA")
_library.impl("gemv", gemv, "CPU")
# The packed weight carries oneDNN's dispatch key, the activations the CPU's; either may be the one looked at first.
_library.impl("packed_linear", packed_linear, "CPU")
_library.impl("packed_linear", packed_linear, "MkldnnCPU")
_library.impl("int8_linear", int8_linear, "CPU")
_library.impl("int8_linear", int8_linear, "MkldnnCPU")
_library.impl("int4_many", int4_many, "CPU")


@torch.library.register_fake("axon::gemv", lib=_library)
def _gemv_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("axon::packed_linear", lib=_library)
def _packed_linear_shape(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, wide: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("axon::int8_linear", lib=_library)
def _int8_linear_shape(q: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, wide: bool) -> Tensor:
    return scale.new_empty(*q.shape[:-1], scale.shape[0], dtype=torch.float32 if wide else torch.bfloat16)


@torch.library.register_fake("axon::int4_many", lib=_library)
def _int4_many_shape(x: Tensor, packed: Tensor, scales: Tensor, wide: bool) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0], dtype=torch.bfloat16)


@torch.library.register_fake("axon::int8_few", lib=_library)
def _int8_few_shape(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], q.shape[0])


@torch.library.register_fake("axon::int4_few", lib=_library)
def _int4_few_shape(x: Tensor, halves: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], halves.shape[0])
