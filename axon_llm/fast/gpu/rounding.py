"""Rounding of activations on a GPU, to int8 by pieces and to fp8 by rows.

Quantised weights meet rounded activations whatever the number of rows, so that a row's result does not depend on its
batch-mates by more than it does in bfloat16. One row is rounded inside its product with int8 and int4 weights
(``one_row.py``); elsewhere these kernels do it before.

Legend: R rows · K channels
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from axon_llm.fast.gpu.launch import launch


@triton.jit
def _pieces(  # type: ignore[no-untyped-def]
    x, out, COUNT, PIECE: tl.constexpr, BP: tl.constexpr, DEPENDENT: tl.constexpr
):
    """BP of COUNT pieces: each number to the nearest of 127 steps either way."""
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    at = p[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    a = tl.load(x + at, mask=(p < COUNT)[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(a), axis=1)[:, None]
    steps = (a * (127.0 / tl.maximum(largest, 1e-20)) + 12582912.0) - 12582912.0  # where only integers have room
    tl.store(out + at, (steps * (largest / 127.0)).to(out.dtype.element_ty), mask=(p < COUNT)[:, None])


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
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


def round_pieces(x: Tensor, piece: int) -> Tensor:
    """``x`` ``[…, K]``, contiguous, every ``piece`` channels rounded to 127 steps either way; same shape and dtype."""
    out = torch.empty_like(x)
    count = x.numel() // piece
    launch(_pieces, (triton.cdiv(count, 64),), x.device, x, out, count, PIECE=piece, BP=64, warps=4)
    return out


def round_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[R, K]`` as e4m3 ``[R, K]`` and scales ``[R, 1]`` float32: :func:`axon_llm.fast.fp8.round_rows`."""
    R, K = x.shape
    q = torch.empty(R, K, device=x.device, dtype=torch.float8_e4m3fn)
    scales = torch.empty(R, 1, device=x.device, dtype=torch.float32)
    _round(x, q, scales, numbers=False)
    return q, scales


def as_in_fp8(x: Tensor) -> Tensor:
    """Rows ``[…, K]``, contiguous, rounded as :func:`round_to_fp8` rounds them; same shape and dtype."""
    out = torch.empty_like(x)
    _round(x, out, out, numbers=True)
    return out


def _round(x: Tensor, q: Tensor, scales: Tensor, numbers: bool) -> None:
    K = x.shape[-1]
    size = triton.next_power_of_2(K)
    warps = 4 if size <= 4096 else 8
    launch(_rows, (x.numel() // K,), x.device, x, q, scales, K, BK=size, NUMBERS=numbers, warps=warps)
