"""Rounding of activations on a GPU: what quantised weights are multiplied by, whatever the number of rows.

* int8 and fp8 weights: one scale for a row, so that a row's result does not depend on its batch-mates. Sums of int8
  are exact, in any order: there it is the same to the last bit.
* int4 weights: one scale for a group of 32 channels, as the weights have, and the sum of what was rounded, which a
  group's middle is multiplied by.

To integers, a norm in front is taken on the way, rounded as ``RMSNorm`` rounds.

Rounded channels are stored in the order that the products meet them in: as bytes of words (``words.py``), of int4's
groups first those that meet low halves of bytes.

Legend: R rows · K channels · G = K / 32 groups
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from axon_llm.fast.gpu.launch import launch, whole_row

INTEGERS = tl.constexpr(12582912.0)  # 1.5 · 2²³: a small number added to it is rounded, and stands in its lowest bits
SHARES = 4  # programs that round a row in groups: one would have too much to do


@triton.jit
def _normed(a, root, norm, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """As ``RMSNorm`` rounds."""
    return ((a * root).to(dtype).to(tl.float32) * norm).to(dtype).to(tl.float32)


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    x, norm, eps, q, steps, K: tl.constexpr, BK: tl.constexpr, NORMED: tl.constexpr, DEPENDENT: tl.constexpr
):
    """One row as int8, in the order of words."""
    k = tl.arange(0, BK)
    row = tl.program_id(0).to(tl.int64)
    if NORMED:
        w = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    a = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    if NORMED:
        a = _normed(a, tl.rsqrt(tl.sum(a * a, axis=0) / K + eps), w, x.dtype.element_ty)
    largest = tl.max(tl.abs(a), axis=0)
    rounded = a * (127.0 / tl.maximum(largest, 1e-20)) + INTEGERS
    at = k // 16 * 16 + k % 4 * 4 + k % 16 // 4
    tl.store(q + row * K + at, rounded.to(tl.int32, bitcast=True).to(tl.int8), mask=k < K)
    tl.store(steps + row, largest / 127.0 + tl.sum(a * 0.0, axis=0))  # what is not a number leaves a trace


@triton.jit
def _groups(  # type: ignore[no-untyped-def]
    x, norm, eps, words, steps, sums, K: tl.constexpr, BG: tl.constexpr, SHARES: tl.constexpr, NORMED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BG groups of one row as int8, one of SHARES shares of it."""
    G: tl.constexpr = K // 32
    row = tl.program_id(0).to(tl.int64)
    g, i = tl.program_id(1) * BG + tl.arange(0, BG), tl.arange(0, 4)
    inside = (g < G)[:, None]
    k = g[:, None] * 32 + tl.arange(0, 32)[None, :]
    if NORMED:
        w = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    a = tl.load(x + row * K + k, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        whole = tl.arange(0, BG * SHARES * 32)
        all_of_it = tl.load(x + row * K + whole, mask=whole < K, other=0.0).to(tl.float32)
        a = _normed(a, tl.rsqrt(tl.sum(all_of_it * all_of_it, axis=0) / K + eps), w, x.dtype.element_ty)
    largest = tl.max(tl.abs(a), axis=1)
    rounded = a * (127.0 / tl.maximum(largest, 1e-20))[:, None] + INTEGERS
    step = largest / 127.0 + tl.sum(a * 0.0, axis=1)
    bytes_ = tl.reshape(rounded.to(tl.int32, bitcast=True) & 0xFF, (BG, 2, 4, 4))  # [BG, half, b, i]
    word = tl.sum(bytes_ << (8 * i)[None, None, :, None], axis=2)
    at = row * (K // 4) + g[:, None, None] * 8 + tl.arange(0, 2)[None, :, None] * 4 + i[None, None, :]
    tl.store(words + at, word, mask=inside[:, :, None])
    tl.store(steps + row * G + g, step, mask=g < G)
    tl.store(sums + row * G + g, tl.sum(rounded - INTEGERS, axis=1) * step, mask=g < G)


@triton.jit
def _as_in_groups(  # type: ignore[no-untyped-def]
    x, out, COUNT, BG: tl.constexpr, DEPENDENT: tl.constexpr
):
    """BG of COUNT groups as the numbers that their int8 stand for."""
    g = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    at = g[:, None] * 32 + tl.arange(0, 32)[None, :]
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    a = tl.load(x + at, mask=(g < COUNT)[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(a), axis=1)[:, None]
    steps = (a * (127.0 / tl.maximum(largest, 1e-20)) + INTEGERS) - INTEGERS
    tl.store(out + at, (steps * (largest / 127.0)).to(out.dtype.element_ty), mask=(g < COUNT)[:, None])


@triton.jit
def _fp8(  # type: ignore[no-untyped-def]
    x, q, scales, K: tl.constexpr, BK: tl.constexpr, NUMBERS: tl.constexpr, DEPENDENT: tl.constexpr
):
    """One row as e4m3 and a scale, or as the numbers that these stand for."""
    k = tl.arange(0, BK)
    row = tl.program_id(0).to(tl.int64)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    a = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(a), axis=0) / 448.0, 1e-12)
    rounded = (a / scale).to(tl.float8e4nv)
    if NUMBERS:
        tl.store(q + row * K + k, (rounded.to(tl.float32) * scale).to(q.dtype.element_ty), mask=k < K)
    else:
        tl.store(q + row * K + k, rounded, mask=k < K)
        tl.store(scales + row, scale)


def round_rows(x: Tensor, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Rows ``[…, K]`` as int8 ``[R, K]`` in the order of words, and steps ``[R]`` float32.

    Args:
        x: contiguous, K a multiple of 16.
        norm: ``[K]``; rows are normed with it first.
        eps: of the norm.
    """
    K = x.shape[-1]
    q = torch.empty(x.numel() // K, K, device=x.device, dtype=torch.int8)
    steps = torch.empty(q.shape[0], device=x.device, dtype=torch.float32)
    launch(_rows, (q.shape[0],), x.device, x, norm, eps, q, steps, K, NORMED=norm is not None, **whole_row(K))
    return q, steps


def round_groups(x: Tensor, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[…, K]`` as int8 ``[R, K]`` in the order of words, and steps and sums ``[R, G]`` float32.

    Args:
        x: contiguous, K a multiple of 32.
        norm: ``[K]``; rows are normed with it first.
        eps: of the norm.
    """
    K = x.shape[-1]
    q = torch.empty(x.numel() // K, K, device=x.device, dtype=torch.int8)
    steps = torch.empty(q.shape[0], K // 32, device=x.device, dtype=torch.float32)
    sums = torch.empty_like(steps)
    groups = triton.next_power_of_2(triton.cdiv(K // 32, SHARES))
    launch(
        _groups, (q.shape[0], SHARES), x.device,
        x, norm, eps, q.view(torch.int32), steps, sums, K, BG=groups, SHARES=SHARES, NORMED=norm is not None,
        warps=min(16, max(1, groups // 8)),
    )  # fmt: skip
    return q, steps, sums


def as_in_groups(x: Tensor) -> Tensor:
    """``x`` ``[…, K]``, contiguous, rounded as :func:`round_groups` rounds it; same shape and dtype."""
    out = torch.empty_like(x)
    count = x.numel() // 32
    launch(_as_in_groups, (triton.cdiv(count, 64),), x.device, x, out, count, BG=64, warps=4)
    return out


def round_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[R, K]`` as e4m3 ``[R, K]`` and scales ``[R, 1]`` float32: :func:`axon_llm.fast.fp8.round_rows`."""
    R, K = x.shape
    q = torch.empty(R, K, device=x.device, dtype=torch.float8_e4m3fn)
    scales = torch.empty(R, 1, device=x.device, dtype=torch.float32)
    _round_to_fp8(x, q, scales, numbers=False)
    return q, scales


def as_in_fp8(x: Tensor) -> Tensor:
    """Rows ``[…, K]``, contiguous, rounded as :func:`round_to_fp8` rounds them; same shape and dtype."""
    out = torch.empty_like(x)
    _round_to_fp8(x, out, out, numbers=True)
    return out


def _round_to_fp8(x: Tensor, q: Tensor, scales: Tensor, numbers: bool) -> None:
    K = x.shape[-1]
    launch(_fp8, (x.numel() // K,), x.device, x, q, scales, K, NUMBERS=numbers, **whole_row(K))
