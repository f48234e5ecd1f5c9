"""Many rows times int8 weights on a GPU, by the matrix unit: several sequences together, and prompts.

Matrix units multiply bytes twice as fast as bfloat16, and there are half as many to read, so integers stay integers up
to the sums: nothing is turned into a number before. Sums of integers are exact in any order, and a row's step and a
channel's scale come at the end, so that a row's result is the same to the last bit whatever the tile it falls into.

Legend: M rows · N output channels · K input channels
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from axon_llm.fast.gpu.around import gated_by, in_turn, put
from axon_llm.fast.gpu.launch import launch, processors, stages_for


@triton.jit(do_not_specialize=["M"])
def int8_tiles(  # type: ignore[no-untyped-def]
    q, steps, weights, scale, bias, residual, out, M, N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BN output channels of BM rows; gated, BN / 2 of ``silu(gate) · up``."""
    m, n, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    channel = tl.minimum(n, N - 1)
    if GATED:
        channel = in_turn(n, N)
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
    if BIASED:
        y += tl.load(bias + channel).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(y.to(out.dtype.element_ty).to(tl.float32), (BM, BN // 2, 2)))
        y = gated_by(gate, up)
        n = tl.program_id(1) * (BN // 2) + tl.arange(0, BN // 2)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    there = (m < M)[:, None] & (n < N)[None, :]
    put(y, residual, out, at, there, ADDED)


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
    """Rounded rows, any number, times int8 weights; the arguments are those of ``few_rows.few_rows_product``."""
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
    """A tile, its warps, and loads under way: as many as shared memory has room for. Measured on an H200."""
    if M > 64:
        few = triton.cdiv(M, 128) * triton.cdiv(channels, 128) <= processors(device)
        across, most = (64, 4) if few else (128, 3)
        stages = stages_for(device, (128 + across) * 128, most)
        return {"BM": 128, "BN": across, "BK": 128, "warps": across // 16, "stages": stages}
    rows = max(16, triton.next_power_of_2(M))
    across = 64 if M <= 16 or channels >= 128 * processors(device) else 32
    stages = stages_for(device, 2 * (rows + across) * 256, 5)  # two programs on a processor
    return {"BM": rows, "BN": across, "BK": 256, "warps": 4, "stages": stages}
