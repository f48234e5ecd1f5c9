"""A row or a few times quantised weights on a GPU: the decode step of a sequence, or of some.

Such a step reads every weight once, so it can only be as fast as memory; and integers of a byte or half of one come
too fast to be turned into numbers one by one. So activations are integers, too (``rounding.py``), and one instruction
multiplies four pairs of bytes and adds them up (dp4a). A program takes a few output channels and walks along their
input channels: it asks for the next pieces of the weights before it multiplies the last, and for the first before the
kernel in front has ended (``launch.py``). Each thread holds a piece of every channel, and meets it with that of one row
after another. Nothing is split along the input channels between programs: no order of sums that could change.

Each further row is as much work again while the bytes stay the same, so from some number of rows on something else is
faster: tiles of the matrix unit for int8 (``tiles.py``), numbers and cuBLAS for int4 (``widen.py``).

Legend: M rows · N output channels · K input channels · P weights in a word (``words.py``) · G = K / 32 groups
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from axon_llm.fast.gpu.around import gated_by, in_turn, put
from axon_llm.fast.gpu.launch import launch
from axon_llm.fast.gpu.one_row import piece_of


@triton.jit
def four_products(w, x, total, ASSEMBLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total`` and the products of the four signed bytes of each word; Triton's interpreter knows no instructions."""
    if ASSEMBLED:
        w, x = tl.broadcast(w, x)
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    for b in tl.static_range(4):
        total += ((w << (24 - 8 * b)) >> 24) * ((x << (24 - 8 * b)) >> 24)
    return total


@triton.jit
def scale_and_middle(pairs):  # type: ignore[no-untyped-def]
    """Of int4's groups, float32; with them ``w = q · scale + middle``, q in 0 … 15."""
    scale = (pairs << 16).to(tl.float32, bitcast=True)
    return scale, (pairs & -65536).to(tl.float32, bitcast=True) - 8.0 * scale


@triton.jit(do_not_specialize=["M"])
def few_rows(  # type: ignore[no-untyped-def]
    q, steps, sums, words, scale, bias, residual, out, M, N, K: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, AHEAD: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr,
    ADDED: tl.constexpr, ASSEMBLED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BN output channels of up to BM rows, BT pieces of each at a time; gated, BN / 2 of ``silu(gate) · up``."""
    PIECES: tl.constexpr = K // (4 * P)
    b, t, i = tl.arange(0, BN), tl.arange(0, BT), tl.arange(0, 4)
    n = tl.program_id(0) * BN + b
    channel = tl.minimum(n, N - 1)
    if GATED:
        channel = in_turn(n, N)
    # Pieces before channels: so a warp's threads take neighbouring pieces of one channel, here as in a row.
    piece = channel.to(tl.int64)[None, :] * PIECES + t[:, None]
    rows = words + piece[:, :, None] * 4 + i[None, None, :]
    ahead = piece_of(rows, t, PIECES)
    if AHEAD == 2:
        further = piece_of(rows + BT * 4, t + BT, PIECES)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    totals = ()
    for _ in tl.static_range(BM):
        nothing = tl.zeros((BT, BN, 4), tl.int32) if P == 4 else tl.zeros((BT, BN), tl.float32)
        totals += (nothing,)  # type: ignore[assignment]
    for start in range(0, PIECES, BT):
        here, following = ahead, start + AHEAD * BT
        if AHEAD == 2:
            ahead = further
            further = piece_of(rows + following * 4, t + following, PIECES)
        else:
            ahead = piece_of(rows + following * 4, t + following, PIECES)
        inside = t + start < PIECES
        if P == 8:
            pairs = tl.load(scale + piece + start, mask=inside[:, None], other=0)
            s, z = scale_and_middle(pairs)
            low, high = here & 0x0F0F0F0F, (here >> 4) & 0x0F0F0F0F
        sums_so_far = ()
        for m in tl.static_range(BM):
            at = tl.minimum(m, M - 1) * PIECES + t + start
            word = q + at[:, None] * P + i[None, :]
            x = tl.load(word, mask=inside[:, None], other=0)[:, None, :]
            if P == 4:
                total = four_products(here, x, totals[m], ASSEMBLED)
            else:
                y = tl.load(word + 4, mask=inside[:, None], other=0)[:, None, :]
                found = four_products(low, x, tl.zeros((BT, BN, 4), tl.int32), ASSEMBLED)
                found = tl.sum(four_products(high, y, found, ASSEMBLED), axis=2).to(tl.float32)
                step = tl.load(steps + at, mask=inside, other=0.0)[:, None]
                sum_ = tl.load(sums + at, mask=inside, other=0.0)[:, None]
                total = totals[m] + (found * step * s + sum_ * z)
            sums_so_far += (total,)  # type: ignore[assignment]
        totals = sums_so_far
    for m in tl.static_range(BM):
        if P == 4:
            y = tl.sum(tl.sum(totals[m], axis=2), axis=0).to(tl.float32)
            y *= tl.load(steps + tl.minimum(m, M - 1)) * tl.load(scale + channel)
        else:
            y = tl.sum(totals[m], axis=0)
        to = n
        if BIASED:
            y += tl.load(bias + channel).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.reshape(y.to(out.dtype.element_ty).to(tl.float32), (BN // 2, 2)))
            y = gated_by(gate, up)
            to = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        there = (to < N) & (m < M)
        put(y, residual, out, tl.minimum(m, M - 1).to(tl.int64) * N + to, there, ADDED)


def few_rows_product(
    q: Tensor,
    steps: Tensor,
    sums: Tensor | None,
    words: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Rounded rows times quantised weights of N channels → ``[M, N]``, or of 2 · N, gate first: ``silu(gate) · up``.

    Args:
        q: int8 ``[M, K]`` in the order of words, up to four rows for int8 weights and up to eight for int4.
        steps: float32 ``[M]`` for int8, ``[M, G]`` for int4.
        sums: ``[M, G]`` for int4.
        words: int32 ``[N, K / P]``; gated, of 2 · N channels, as are the next two.
        scale: float32 ``[N]`` for int8, pairs ``[N, G]`` for int4.
        bias: ``[N]``.
        residual: ``[M, N]``, added to the result.
        gated: see above.
        dtype: of the result.
    """
    (M, K), channels = q.shape, words.shape[0]
    N, P = channels // 2 if gated else channels, K // words.shape[1]
    out = torch.empty(M, N, device=q.device, dtype=dtype)
    rows = triton.next_power_of_2(M)
    sizes = sizes_for(K // (4 * P), P, rows)
    launch(
        few_rows, (triton.cdiv(channels, sizes["BN"]),), q.device,
        q.view(torch.int32), steps, sums, words, scale, bias, residual, out, M, N, K, P, BM=rows, GATED=gated,
        BIASED=bias is not None, ADDED=residual is not None, ASSEMBLED=q.device.type == "cuda", **sizes,
    )  # fmt: skip
    return out


def sizes_for(pieces: int, P: int, rows: int) -> dict[str, int]:
    """Output channels of a program, pieces at a time and ahead, warps. Measured on an H200."""
    int8 = {1: (8, 4, 2), 2: (4, 2, 2), 4: (4, 2, 2)}
    int4 = {1: (8, 4, 2), 2: (8, 2, 2), 4: (8, 2, 1), 8: (4, 1, 2)}
    across, warps, ahead = (int8 if P == 4 else int4)[rows]
    warps = min(warps, triton.next_power_of_2(triton.cdiv(pieces, 32)))
    return {"BN": across, "BT": 32 * warps, "AHEAD": ahead, "warps": warps}
