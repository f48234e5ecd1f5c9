"""What lies between the products of a block on a GPU: norms, turning and writing to the cache, the gate.

Each is one kernel for any number of rows: run without a compiler they would be a dozen, and what a small kernel costs
is that it is one more.

Legend: R rows · B slots · T new tokens of each · Hq/Hkv query and KV heads · D head_dim
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from axon_llm.fast.gpu.launch import launch, whole_row


@triton.jit
def norm_rows(  # type: ignore[no-untyped-def]
    x, weight, eps, out, K: tl.constexpr, BK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """One row, scaled to unit root-mean-square and by a weight per channel; rounded as ``RMSNorm`` rounds."""
    k = tl.arange(0, BK)
    row = tl.program_id(0).to(tl.int64) * K
    w = tl.load(weight + k, mask=k < K, other=0.0)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    a = tl.load(x + row + k, mask=k < K, other=0.0).to(tl.float32)
    a *= tl.rsqrt(tl.sum(a * a, axis=0) / K + eps)
    y = a.to(out.dtype.element_ty).to(tl.float32) * w.to(tl.float32)
    tl.store(out + row + k, y.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def gated_by(gate, up):  # type: ignore[no-untyped-def]
    """``silu(gate) · up``, float32, any shape."""
    return (gate / (1.0 + tl.exp(-gate))) * up


@triton.jit
def in_turn(n, N):  # type: ignore[no-untyped-def]
    """Rows of a weight whose first N are gate's and whose others up's, one of each in turn."""
    return tl.minimum(n // 2, N - 1) + n % 2 * N


@triton.jit
def put(y, residual, out, at, there, ADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Results, float32, rounded to where they go, and the stream added to them if asked for."""
    if ADDED:
        y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def gate_rows(  # type: ignore[no-untyped-def]
    both, out, N, BN: tl.constexpr, DEPENDENT: tl.constexpr
):
    """BN channels of ``silu(gate) · up`` of a row that holds N channels of each."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.program_id(0).to(tl.int64)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(both + row * 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * N + N + n, mask=n < N, other=0.0).to(tl.float32)
    y = gated_by(gate, up)
    tl.store(out + row * N + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def turn_heads(  # type: ignore[no-untyped-def]
    heads, q_norm, k_norm, eps, cos, sin, positions, q, keys, values, key_slot, key_head, key_place,
    value_slot, value_head, value_place, T, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, NORMED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One head of one token: normed if asked for, turned, and put where it belongs; a value is only put there."""
    head, row = tl.program_id(1), tl.program_id(0).to(tl.int64)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.arange(0, D // 2)
    place = heads + (row * (HQ + 2 * HKV) + head) * D + i
    first, second = tl.load(place).to(tl.float32), tl.load(place + D // 2).to(tl.float32)
    if NORMED:  # noqa: SIM102 - decided when the kernel is compiled, unlike the next
        if head < HQ + HKV:
            weight = k_norm
            if head < HQ:
                weight = q_norm
            root = tl.rsqrt((tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / D + eps)
            first *= root * tl.load(weight + i).to(tl.float32)
            second *= root * tl.load(weight + D // 2 + i).to(tl.float32)
    slot, at = row // T, tl.load(positions + row)
    if head < HQ + HKV:
        c, s = tl.load(cos + row * D + i).to(tl.float32), tl.load(sin + row * D + i).to(tl.float32)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
        if head < HQ:
            there = q + (row * HQ + head) * D + i
            tl.store(there, first.to(q.dtype.element_ty))
            tl.store(there + D // 2, second.to(q.dtype.element_ty))
        else:
            there = keys + slot * key_slot + (head - HQ) * key_head + at * key_place + i
            tl.store(there, first.to(keys.dtype.element_ty))
            tl.store(there + D // 2, second.to(keys.dtype.element_ty))
    else:
        there = values + slot * value_slot + (head - HQ - HKV) * value_head + at * value_place + i
        tl.store(there, first.to(values.dtype.element_ty))
        tl.store(there + D // 2, second.to(values.dtype.element_ty))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As :class:`axon_llm.layers.norm.RMSNorm`: ``x`` ``[…, K]``, contiguous, to the same shape."""
    K = x.shape[-1]
    out = torch.empty_like(x)
    launch(norm_rows, (x.numel() // K,), x.device, x, weight, eps, out, K, **whole_row(K))
    return out


def gate(both: Tensor) -> Tensor:
    """``silu(gate) · up`` of ``both`` ``[…, 2 · N]``, gate first → ``[…, N]``."""
    N = both.shape[-1] // 2
    out = torch.empty(*both.shape[:-1], N, device=both.device, dtype=both.dtype)
    launch(gate_rows, (both.numel() // (2 * N), triton.cdiv(N, 1024)), both.device, both, out, N, BN=1024, warps=4)
    return out


def turn(
    heads: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Turn queries and keys by their positions, and write keys and values to the cache.

    Args:
        heads: ``[B, T, Hq + 2 · Hkv, D]``, contiguous: queries, keys, values.
        q_norm: ``[D]``, or ``None`` where queries and keys are not normed first.
        k_norm: likewise.
        eps: of both norms.
        cos: ``[B, 1, T, D]``, contiguous.
        sin: likewise.
        positions: ``[B, T]`` int64, contiguous.
        keys: of one layer, ``[B, Hkv, S, D]``; written.
        values: likewise.

    Returns:
        The queries, ``[B, T, Hq, D]``.
    """
    B, T, H, D = heads.shape
    Hkv = keys.shape[1]
    Hq = H - 2 * Hkv
    q = torch.empty(B, T, Hq, D, device=heads.device, dtype=heads.dtype)
    launch(
        turn_heads, (B * T, H), heads.device,
        heads, q_norm, k_norm, eps, cos, sin, positions, q, keys, values, *keys.stride()[:3],
        *values.stride()[:3], T, Hq, Hkv, D, NORMED=q_norm is not None, warps=1,
    )  # fmt: skip
    return q
