"""Rows times quantised weights on a GPU: the decode step of several sequences, and what a prompt needs.

A decode step is bound by reading the weights, so what is read must be the small form. A compiler left to itself writes
the weights out in the activations' type and multiplies those: more bytes than were saved. Here each program takes some
output channels, walks along their input channels, and turns each piece of the weights into numbers in registers, from
where the matrix units take them; rows that do not exist, of tiles of 16, 32 or 64, are zeros.

For many rows it is the other way round: weights that are used hundreds of times are better converted once (``widen``).

Nothing is split along the input channels between programs: no partial sums to add, no order that could change.

Legend: M rows · N output channels · K input channels · P weights in a word
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from axon_llm.fast.gpu.launch import launch
from axon_llm.fast.gpu.linear import FEW_ROWS
from axon_llm.fast.gpu.words import weights_in_word


@triton.jit
def weight_of(words, j: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Byte, or half byte, j of each word as float32; half bytes as −8 … 7.

    Turning integers into floats is slow: a processor that multiplies 128 numbers at once converts 16. So their bits
    become the lower ones of a float's fraction, above which stands a large power of two, and that is subtracted.
    """
    BITS: tl.constexpr = 32 // P
    w = ((words >> (BITS * j)) & ((1 << BITS) - 1)) ^ (0x80 if P == 4 else 0)
    return (w | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + 128.0 if P == 4 else 8388608.0 + 8.0)


@triton.jit
def channel_of(word, j: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which input channel that is."""
    within = 4 * j if P == 4 else 4 * (j // 2) + 16 * (j % 2)
    return word // 4 * (4 * P) + within + word % 4


@triton.jit(do_not_specialize=["M"])
def few_rows(  # type: ignore[no-untyped-def]
    x, words, scale, middle, out, M, N, K: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BW: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BN output channels of up to BM rows, BW words of each channel at a time."""
    WORDS: tl.constexpr = K // P
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m, w = tl.arange(0, BM), tl.arange(0, BW)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BN, BM), tl.float32)
    channel = tl.minimum(n, N - 1).to(tl.int64)
    for start in range(0, WORDS, BW):
        inside = w + start < WORDS
        here = tl.load(words + channel[:, None] * WORDS + (start + w)[None, :], mask=inside[None, :], other=0)
        if P == 8:
            g = start // 4 + tl.arange(0, BW // 4)
            at, there = channel[:, None] * (WORDS // 4) + g[None, :], (g < WORDS // 4)[None, :]
            s = tl.load(scale + at, mask=there, other=0.0).to(tl.float32)
            z = tl.load(middle + at, mask=there, other=0.0).to(tl.float32)
            s = tl.reshape(tl.broadcast_to(s[:, :, None], (BN, BW // 4, 4)), (BN, BW))
            z = tl.reshape(tl.broadcast_to(z[:, :, None], (BN, BW // 4, 4)), (BN, BW))
        for j in tl.static_range(P):
            k = channel_of(start + w, j, P)
            a = tl.load(x + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & inside[:, None], other=0.0)
            weight = weight_of(here, j, P)
            if P == 8:
                weight = weight * s + z
            total = tl.dot(weight.to(a.dtype), a, total, input_precision="ieee")
    if P == 4:
        total *= tl.load(scale + channel)[:, None]
    there = (m[None, :] < M) & (n[:, None] < N)
    tl.store(out + m[None, :] * N + n[:, None], total.to(out.dtype.element_ty), mask=there)


@triton.jit
def widen_rows(  # type: ignore[no-untyped-def]
    words, scale, middle, out, K: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, DEPENDENT: tl.constexpr
):
    """BT pieces of one channel's words as numbers."""
    PIECES: tl.constexpr = K // (4 * P)
    channel = tl.program_id(0).to(tl.int64)
    t, i = tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, 4)
    inside = t < PIECES
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    piece = channel * PIECES + t
    here = tl.load(words + piece[:, None] * 4 + i[None, :], mask=inside[:, None], other=0)
    if P == 4:
        s = tl.load(scale + channel) + tl.zeros((BT,), tl.float32)
    else:
        s = tl.load(scale + piece, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(middle + piece, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(P):
        weight = weight_of(here, j, P)
        weight = weight * s[:, None] if P == 4 else weight * s[:, None] + z[:, None]
        at = out + channel * K + channel_of(t[:, None] * 4 + i[None, :], j, P)
        tl.store(at, weight.to(out.dtype.element_ty), mask=inside[:, None])


def few_rows_product(x: Tensor, words: Tensor, scale: Tensor, middle: Tensor | None) -> Tensor:
    """Rows ``[M, K]`` times quantised weights of N channels → ``[M, N]`` in x's dtype.

    Args:
        x: at most ``FEW_ROWS`` rows, contiguous.
        words: int32 ``[N, K / P]``, see ``words.py``.
        scale: float32 ``[N]`` for int8, ``[N, K / 32]`` for int4.
        middle: ``[N, K / 32]`` for int4.
    """
    (M, K), N = x.shape, words.shape[0]
    out = torch.empty(M, N, device=x.device, dtype=x.dtype)
    tile = 16 if M <= 16 else 32 if M <= 32 else FEW_ROWS
    P = weights_in_word(words, K)
    sizes = {"BN": 64, "BW": 64, "stages": 3} if P == 4 else {"BN": 64, "BW": 32, "stages": 4}
    if x.dtype.itemsize > 2 or tile > 32:
        sizes = {"BN": 32, "BW": 32, "stages": 3}
    launch(
        few_rows, (triton.cdiv(N, sizes["BN"]),), x.device,
        x, words, scale, middle, out, M, N, K, P, BM=tile, warps=4, **sizes,
    )  # fmt: skip
    return out


def widen(words: Tensor, scale: Tensor, middle: Tensor | None, inputs: int, dtype: torch.dtype) -> Tensor:
    """Quantised weights as numbers, ``[N, K]``.

    Args:
        words: int32 ``[N, K / P]``, see ``words.py``.
        scale: as for :func:`few_rows_product`, and so is the next.
        middle: see there.
        inputs: K.
        dtype: of the result.
    """
    N, P = words.shape[0], weights_in_word(words, inputs)
    out = torch.empty(N, inputs, device=words.device, dtype=dtype)
    launch(
        widen_rows, (N, triton.cdiv(inputs // (4 * P), 128)), words.device,
        words, scale, middle, out, inputs, P, BT=128, warps=4,
    )  # fmt: skip
    return out
