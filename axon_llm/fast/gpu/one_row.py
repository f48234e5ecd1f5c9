"""One row times weights that are numbers, with what surrounds the product: the decode step of one sequence.

Such a step reads every weight once, so it can only be as fast as memory. A program takes a few output channels and
walks along their input channels: it asks for the next piece of the weights before it multiplies the last, and for the
first before the kernel in front has ended (``launch.py``). Numbers are multiplied and added in float32; no matrix unit
would be busier than the memory. Nothing is split along the input channels between programs: no partial sums to add, no
order that could change.

What surrounds a product costs no pass of its own. A norm's root belongs to the whole row and can be taken at the end:
``Σ (x·g/r)·w = (Σ x·g·w) / r``, and Σ x² is added up on the way. Rows of gate and of up lie in one program, which so
has both factors of what it writes. The stream is added to where a result is written.

``few_rows.py`` is the same for weights that are integers.

Legend: N output channels · K input channels
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from axon_llm.fast.gpu.around import gated_by, put
from axon_llm.fast.gpu.launch import launch


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    x, norm, eps, weight, n, K: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, NORMED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """``Σ x·w`` for the BN output channels ``n``, float32, of a normed row if NORMED; BT pieces of eight at a time."""
    PIECES: tl.constexpr = K // 8
    t, i = tl.arange(0, BT), tl.arange(0, 8)
    # Pieces before channels: so a warp's threads take neighbouring pieces of one channel, here as in a row of x.
    piece = n.to(tl.int64)[None, :] * PIECES + t[:, None]
    rows = weight + piece[:, :, None] * 8 + i[None, None, :]
    ahead = piece_of(rows, t, PIECES)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BT, BN), tl.float32)
    squares = tl.zeros((BT, 8), tl.float32)
    for start in range(0, PIECES, BT):
        here = ahead
        ahead = piece_of(rows + (start + BT) * 8, t + start + BT, PIECES)
        k = (t + start)[:, None] * 8 + i[None, :]
        a = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if NORMED:
            squares += a * a
            a *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        total += tl.sum(here.to(tl.float32) * a[:, None, :], axis=2)
    y = tl.sum(total, axis=0)
    return y * tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / K + eps) if NORMED else y


@triton.jit
def piece_of(rows, t, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights, which are read once: the first to leave a cache whose room the activations need."""
    return tl.load(rows, mask=(t < PIECES)[:, None, None], other=0.0, eviction_policy="evict_first")


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, norm, eps, weight, scale, bias, residual, out, N, K: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    NORMED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BN output channels of a product, plus a bias, plus the stream."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    channel = tl.minimum(n, N - 1)
    y = _sums(x, norm, eps, weight, channel, K, BN, BT, NORMED, DEPENDENT)
    if SCALED:
        y *= tl.load(scale + channel)
    if BIASED:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    put(y, residual, out, n, n < N, ADDED)


@triton.jit
def gated(  # type: ignore[no-untyped-def]
    x, norm, eps, weight, out, N, K: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, DEPENDENT: tl.constexpr
):
    """BN / 2 channels of ``silu(gate) · up`` of a normed row; the weights are N rows of gate, then N of up."""
    i = tl.arange(0, BN)
    channel = tl.program_id(0) * (BN // 2) + i // 2
    y = _sums(x, norm, eps, weight, tl.minimum(channel, N - 1) + (i % 2) * N, K, BN, BT, True, DEPENDENT)
    gate, up = tl.split(tl.reshape(y.to(out.dtype.element_ty).to(tl.float32), (BN // 2, 2)))
    y = gated_by(gate, up)
    n = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)


def _sizes(weight: Tensor) -> dict[str, int]:
    """Output channels of a program, pieces of a row at a time, warps: a thread holds a piece of each channel."""
    pieces = weight.shape[1] // 8
    warps = 4 if pieces > 64 else 2 if pieces > 32 else 1
    return {"BN": 8 if weight.dtype.itemsize == 1 else 4, "BT": 32 * warps, "warps": warps}  # 64 bytes for each thread


def row_product(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """One row ``x`` ``[…, K]`` times the weights of N channels → ``[…, N]`` in x's dtype.

    Args:
        x: a single row, contiguous.
        norm: ``[K]``; the row is normed with it first.
        eps: of the norm.
        weight: ``[N, K]``, K a multiple of 8.
        scale: float32 ``[N]``, which results are multiplied by.
        bias: ``[N]``.
        residual: ``[…, N]``, added to the result.
    """
    N, K = weight.shape
    out = torch.empty(*x.shape[:-1], N, device=x.device, dtype=x.dtype)
    sizes = _sizes(weight)
    launch(
        product, (triton.cdiv(N, sizes["BN"]),), x.device, x, norm, eps, weight, scale, bias, residual, out, N, K,
        NORMED=norm is not None, SCALED=scale is not None, BIASED=bias is not None, ADDED=residual is not None, **sizes,
    )  # fmt: skip
    return out


def row_gated(x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
    """One row ``x`` ``[…, K]``, normed, through gate and up: ``silu(gate) · up`` ``[…, N]``.

    Args:
        x: a single row, contiguous.
        norm: ``[K]``.
        eps: of the norm.
        weight: ``[2 · N, K]``, gate first.
    """
    N, K = weight.shape[0] // 2, x.shape[-1]
    out = torch.empty(*x.shape[:-1], N, device=x.device, dtype=x.dtype)
    sizes = _sizes(weight)
    launch(gated, (triton.cdiv(2 * N, sizes["BN"]),), x.device, x, norm, eps, weight, out, N, K, **sizes)
    return out
