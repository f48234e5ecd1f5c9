"""Many rows times quantised weights on a GPU, by the matrix unit: several sequences together, and prompts.

Matrix units multiply bytes twice as fast as bfloat16, and there are half as many to read, so integers stay integers up
to the sums: nothing is turned into a number but a sum.

* int8: a tile's sums along all of K are integers, exact in any order; row's step and channel's scale come at the end.
* int4: each group of 32 channels has a scale of its own, so that its sums become numbers right away. Warps take
  different groups of the same tile, and what they have found is added at the end. A byte's low and high half are
  neighbours among the channels, which rounded activations follow.

Legend: M rows · N output channels · K input channels · G = K / 32 groups
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from axon_llm.fast.gpu.around import gated_by
from axon_llm.fast.gpu.few_rows import scale_and_middle
from axon_llm.fast.gpu.launch import launch, processors, stages_for
from axon_llm.fast.gpu.rounding import INTEGERS


@triton.jit
def _stored(  # type: ignore[no-untyped-def]
    y, m, n, channel, bias, residual, out, M, N, BM: tl.constexpr, BN: tl.constexpr, GATED: tl.constexpr,
    BIASED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Bias, gate, stream; then BM rows of BN channels ``y``, float32, of which those count that there are."""
    if BIASED:
        y += tl.load(bias + channel).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(y.to(out.dtype.element_ty).to(tl.float32), (BM, BN // 2, 2)))
        y = gated_by(gate, up)
        n = tl.program_id(1) * (BN // 2) + tl.arange(0, BN // 2)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    there = (m < M)[:, None] & (n < N)[None, :]
    if ADDED:
        y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["M"])
def int8_tiles(  # type: ignore[no-untyped-def]
    q, steps, weights, scale, bias, residual, out, M, N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BN output channels of BM rows; gated, BN / 2 of ``silu(gate) · up``."""
    m, n, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    channel = tl.minimum(n, N - 1)
    if GATED:  # rows of gate and rows of up, in turn
        channel = tl.minimum(n // 2, N - 1) + n % 2 * N
    row = tl.minimum(m, M - 1)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    x_at = q + row.to(tl.int64)[:, None] * K + k[None, :]
    w_at = weights + channel.to(tl.int64)[:, None] * K + k[None, :]
    total = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        if K % BK == 0:
            x, w = tl.load(x_at + start), tl.load(w_at + start, eviction_policy="evict_first")
        else:
            inside = (k + start < K)[None, :]
            x = tl.load(x_at + start, mask=inside, other=0)
            w = tl.load(w_at + start, mask=inside, other=0, eviction_policy="evict_first")
        total = tl.dot(x, tl.trans(w), total, out_dtype=tl.int32)
    y = total.to(tl.float32) * (tl.load(steps + row)[:, None] * tl.load(scale + channel)[None, :])
    _stored(y, m, n, channel, bias, residual, out, M, N, BM, BN, GATED, BIASED, ADDED)


@triton.jit
def _of_groups(  # type: ignore[no-untyped-def]
    steps_at, sums_at, scale_at, start, g, G: tl.constexpr, BG: tl.constexpr
):
    """Steps and sums of rows' groups, and pairs of channels': what every group of a product is scaled by."""
    inside = (g + start < G)[:, None]
    step = tl.load(steps_at + start, mask=inside, other=0.0)
    sum_ = tl.load(sums_at + start, mask=inside, other=0.0)
    return step, sum_, tl.load(scale_at + start, mask=inside, other=0)


@triton.jit(do_not_specialize=["M"])
def int4_tiles(  # type: ignore[no-untyped-def]
    q, steps, sums, weights, scale, bias, residual, out, M, N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BG: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The same, BG groups at a time."""
    G: tl.constexpr = K // 32
    m, n, g = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BG)
    channel = tl.minimum(n, N - 1)
    if GATED:
        channel = tl.minimum(n // 2, N - 1) + n % 2 * N
    row = tl.minimum(m, M - 1)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    group = channel.to(tl.int64)[None, :] * G + g[:, None]  # [BG, BN]
    of_row = row.to(tl.int64)[None, :] * G + g[:, None]  # [BG, BM]
    x_at = q + of_row[:, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    w_at = weights + group[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    steps += of_row
    sums += of_row
    scale += group
    next_step, next_sum, next_pairs = _of_groups(steps, sums, scale, 0, g, G, BG)
    total = tl.zeros((BG, BM, BN), tl.float32)
    for start in range(0, G, BG):
        if G % BG == 0:
            x, w = tl.load(x_at + start * 32), tl.load(w_at + start * 16, eviction_policy="evict_first")
        else:
            inside = (g + start < G)[:, None, None]
            x = tl.load(x_at + start * 32, mask=inside, other=0)
            w = tl.load(w_at + start * 16, mask=inside, other=0, eviction_policy="evict_first")
        step, sum_, pairs = next_step, next_sum, next_pairs
        next_step, next_sum, next_pairs = _of_groups(steps, sums, scale, start + BG, g, G, BG)
        s, z = scale_and_middle(pairs)
        w = tl.reshape(tl.join((w & 15).to(tl.int8), (w >> 4).to(tl.int8)), (BG, BN, 32))
        # Sums that begin at 1.5 · 2²³ as a float are floats already.
        found = tl.dot(x, tl.permute(w, (0, 2, 1)), tl.full((BG, BM, BN), 0x4B400000, tl.int32), out_dtype=tl.int32)
        found = found.to(tl.float32, bitcast=True) - INTEGERS
        total += found * step[:, :, None] * s[:, None, :] + sum_[:, :, None] * z[:, None, :]
    _stored(tl.sum(total, axis=0), m, n, channel, bias, residual, out, M, N, BM, BN, GATED, BIASED, ADDED)


def int8_product(
    q: Tensor,
    steps: Tensor,
    words: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Rounded rows times int8 weights; :func:`axon_llm.fast.gpu.few_rows.few_rows_product` tells of the arguments."""
    (M, K), channels = q.shape, words.shape[0]
    N = channels // 2 if gated else channels
    out = torch.empty(M, N, device=q.device, dtype=dtype)
    sizes = int8_sizes(M, channels, q.device)
    grid = (triton.cdiv(M, sizes["BM"]), triton.cdiv(channels, sizes["BN"]))
    launch(
        int8_tiles, grid, q.device, q, steps, words.view(torch.int8), scale, bias, residual, out, M, N, K,
        GATED=gated, BIASED=bias is not None, ADDED=residual is not None, **sizes,
    )  # fmt: skip
    return out


def int8_sizes(M: int, channels: int, device: torch.device) -> dict[str, int]:
    """A tile, its warps, and loads under way: as many as there is shared memory for."""
    if M > 64:
        one_each = triton.cdiv(M, 128) * triton.cdiv(channels, 128) <= processors(device)
        stages = stages_for(device, 256 * 128, 4 if one_each else 3)
        return {"BM": 128, "BN": 128, "BK": 128, "warps": 8, "stages": stages}
    rows = max(16, triton.next_power_of_2(M))
    across = 32 if rows > 16 or channels < 64 * processors(device) else 64
    return {
        "BM": rows, "BN": across, "BK": 256, "warps": 4, "stages": stages_for(device, (rows + across) * 256, 5),
    }  # fmt: skip


def int4_product(
    q: Tensor,
    steps: Tensor,
    sums: Tensor,
    words: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The same for int4; rounded channels in the order of tiles, ``scale`` pairs."""
    (M, K), channels = q.shape, words.shape[0]
    N = channels // 2 if gated else channels
    out = torch.empty(M, N, device=q.device, dtype=dtype)
    sizes = int4_sizes(M)
    grid = (triton.cdiv(M, sizes["BM"]), triton.cdiv(channels, sizes["BN"]))
    launch(
        int4_tiles, grid, q.device, q, steps, sums, words.view(torch.uint8), scale, bias, residual, out, M, N, K,
        GATED=gated, BIASED=bias is not None, ADDED=residual is not None, **sizes,
    )  # fmt: skip
    return out


def int4_sizes(M: int) -> dict[str, int]:
    """A tile, its groups and warps, and loads under way."""
    return {"BM": min(64, max(16, triton.next_power_of_2(M))), "BN": 32, "BG": 4, "warps": 4, "stages": 4}
