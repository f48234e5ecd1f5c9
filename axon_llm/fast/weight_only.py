"""Products with quantised weights for few rows on a GPU, in Triton: weights are read as bytes, and are numbers inside.

A decode step is bound by reading the weights, so what is read must be the small form. A compiler left to itself writes
the weights out in the activations' type and multiplies those: more bytes than were saved. Here each program takes some
output channels, walks along their input channels, and turns each piece of the weights into numbers in registers.

* One row: multiply and add in float32, a sum at the end. No matrix unit would be busier than the memory.
* Up to ``FEW_ROWS``: matrix units, on tiles of 16, 32 or 64 rows of which those that do not exist are zeros.
* More: not here. Weights that are used hundreds of times are better converted once, see ``int8.py`` and ``int4.py``.

Nothing is split along the input channels between programs: no partial sums to add, no order that could change.

Importing this needs Triton, which is not everywhere that PyTorch is: ``ops.few_rows_kernels`` asks.

Legend: M rows · N output channels · K input channels
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_ROWS = 64
GROUP = 32  # input channels that share a scale and a middle in int4; a byte holds channels i and 16 + i of its group


@triton.jit
def int8_one_row(x, q, scale, out, N, K, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """BN output channels of one row: ``out[n] = scale[n] · Σ x[k] · q[n, k]``."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    weights = q + n.to(tl.int64)[:, None] * K
    total = tl.zeros((BN, BK), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        w = tl.load(weights + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0)
        a = tl.load(x + k, mask=k < K, other=0.0)
        total += w.to(tl.float32) * a.to(tl.float32)[None, :]
    y = tl.sum(total, axis=1) * tl.load(scale + n, mask=n < N, other=0.0)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M"])
def int8_few_rows(  # type: ignore[no-untyped-def]
    x, q, scale, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """BN output channels of up to BM rows, BK input channels at a time."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    weights = q + n.to(tl.int64)[:, None] * K
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        w = tl.load(weights + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0)
        a = tl.load(x + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        total = tl.dot(a, tl.trans(w.to(a.dtype)), total, input_precision="ieee")
    y = total * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def int4_one_row(  # type: ignore[no-untyped-def]
    x, halves, scale, middle, out, N, K, BN: tl.constexpr, BG: tl.constexpr
):
    """BN output channels of one row, BG groups at a time: ``w = (q − 8) · scale + middle``."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    i = tl.arange(0, 16)
    groups = K // 32
    weights = halves + n.to(tl.int64)[:, None, None] * (K // 2)
    total = tl.zeros((BN, BG, 16), tl.float32)
    for start in range(0, groups, BG):
        g = start + tl.arange(0, BG)
        inside = (n[:, None] < N) & (g[None, :] < groups)
        b = tl.load(weights + (g[:, None] * 16 + i[None, :])[None, :, :], mask=inside[:, :, None], other=0)
        at = n.to(tl.int64)[:, None] * groups + g[None, :]
        s = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(middle + at, mask=inside, other=0.0).to(tl.float32) - 8.0 * s
        k = g[:, None] * 32 + i[None, :]
        a = tl.load(x + k, mask=g[:, None] < groups, other=0.0).to(tl.float32)
        c = tl.load(x + k + 16, mask=g[:, None] < groups, other=0.0).to(tl.float32)
        low = (b & 15).to(tl.float32) * s[:, :, None] + z[:, :, None]
        high = (b >> 4).to(tl.float32) * s[:, :, None] + z[:, :, None]
        total += low * a[None, :, :] + high * c[None, :, :]
    y = tl.sum(tl.sum(total, axis=2), axis=1)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M"])
def int4_few_rows(  # type: ignore[no-untyped-def]
    x, halves, scale, middle, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr
):
    """BN output channels of up to BM rows, BG groups at a time; the two halves of the bytes are two products."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    i = tl.arange(0, 16)
    groups = K // 32
    weights = halves + n.to(tl.int64)[:, None, None] * (K // 2)
    rows = x + m[:, None, None] * K
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, groups, BG):
        g = start + tl.arange(0, BG)
        inside = (n[:, None] < N) & (g[None, :] < groups)
        b = tl.load(weights + (g[:, None] * 16 + i[None, :])[None, :, :], mask=inside[:, :, None], other=0)
        at = n.to(tl.int64)[:, None] * groups + g[None, :]
        s = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(middle + at, mask=inside, other=0.0).to(tl.float32) - 8.0 * s
        k = (g[:, None] * 32 + i[None, :])[None, :, :]
        present = ((m[:, None] < M) & (g[None, :] < groups))[:, :, None]
        a = tl.load(rows + k, mask=present, other=0.0)
        c = tl.load(rows + k + 16, mask=present, other=0.0)
        low = ((b & 15).to(tl.float32) * s[:, :, None] + z[:, :, None]).to(a.dtype)
        high = ((b >> 4).to(tl.float32) * s[:, :, None] + z[:, :, None]).to(a.dtype)
        flat_a, flat_low = tl.reshape(a, (BM, BG * 16)), tl.reshape(low, (BN, BG * 16))
        flat_c, flat_high = tl.reshape(c, (BM, BG * 16)), tl.reshape(high, (BN, BG * 16))
        total = tl.dot(flat_a, tl.trans(flat_low), total, input_precision="ieee")
        total = tl.dot(flat_c, tl.trans(flat_high), total, input_precision="ieee")
    tl.store(
        out + m[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N)
    )


def tile_rows(rows: int) -> int:
    """Rows of the tile that holds so many."""
    return 16 if rows <= 16 else 32 if rows <= 32 else FEW_ROWS


def launch(kernel: Any, out_features: int, block: int, *arguments: Any, warps: int, stages: int, **sizes: int) -> None:
    """Run a kernel with a program for every ``block`` output channels."""
    kernel[(triton.cdiv(out_features, block),)](*arguments, BN=block, **sizes, num_warps=warps, num_stages=stages)


def int8_few(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Rows ``[M, K]`` times int8 weights ``[N, K]`` with scales ``[N]`` float32 → ``[M, N]`` in x's dtype."""
    (M, K), N = x.shape, q.shape[0]
    out = torch.empty(M, N, device=x.device, dtype=x.dtype)
    if M == 1:
        launch(int8_one_row, N, 8, x, q, scale, out, N, K, BK=1024, warps=4, stages=1)
        return out
    block, step = 16 if N <= 8192 else 32, 256 if M <= 16 and x.dtype.itemsize == 2 else 64
    launch(int8_few_rows, N, block, x, q, scale, out, M, N, K, BM=tile_rows(M), BK=step, warps=4, stages=4)
    return out


def int4_few(x: Tensor, halves: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    """Rows ``[M, K]`` times int4 weights → ``[M, N]`` in x's dtype.

    Args:
        x: ``[M, K]``, contiguous.
        halves: ``[N, K / 2]`` uint8; in each group's 16 bytes, byte i holds channel i low and channel 16 + i high.
        scale: ``[N, K / 32]``.
        middle: ``[N, K / 32]``.
    """
    (M, K), N = x.shape, halves.shape[0]
    out = torch.empty(M, N, device=x.device, dtype=x.dtype)
    if M == 1:
        launch(int4_one_row, N, 8, x, halves, scale, middle, out, N, K, BG=32, warps=4, stages=1)
        return out
    block, groups = 16 if N <= 8192 else 32, 8 if M <= 16 and x.dtype.itemsize == 2 else 4
    sizes = {"BM": tile_rows(M), "BG": groups}
    launch(int4_few_rows, N, block, x, halves, scale, middle, out, M, N, K, **sizes, warps=4, stages=3)
    return out
