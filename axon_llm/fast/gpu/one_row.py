"""One row times the weights on a GPU, with what surrounds the product: the decode step of one sequence.

Such a step reads every weight once, so it can only be as fast as memory. A program takes a few output channels and
walks along their input channels: it asks for the next piece of the weights before it multiplies the last, and for the
first before the kernel in front has ended (``launch.py``). Nothing is split along the input channels between programs:
no partial sums to add, no order that could change.

* Numbers are multiplied and added in float32; no matrix unit would be busier than the memory.
* Quantised weights come two and more times as fast, too fast to be turned into numbers one by one. So the activations
  are rounded instead, to int8 with a scale for each piece that a thread holds (16 channels for int8 weights, 32 for
  int4), and one instruction multiplies and adds four pairs of bytes. A scale for so few loses about as much as bfloat16
  does.

What surrounds a product costs no pass of its own. A norm's root belongs to the whole row and can be taken at the end:
``Σ (x·g/r)·w = (Σ x·g·w) / r``, and Σ x² is added up on the way. Rows of gate and of up lie in one program, which so
has both factors of what it writes. The stream is added to where a result is written.

Legend: N output channels · K input channels · P weights in a word (``words.py``)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from axon_llm.fast.gpu.around import gated_by
from axon_llm.fast.gpu.launch import launch
from axon_llm.fast.gpu.words import weights_in_word


@triton.jit
def four_products(w, x, ASSEMBLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of products of the four signed bytes of each word, int32; Triton's interpreter knows no instructions."""
    if ASSEMBLED:
        w, x = tl.broadcast(w, x)
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [w, x], dtype=tl.int32, is_pure=True, pack=1
        )
    total = ((w << 24) >> 24) * ((x << 24) >> 24)
    for b in tl.static_range(1, 4):
        total += ((w << (24 - 8 * b)) >> 24) * ((x << (24 - 8 * b)) >> 24)
    return total


@triton.jit
def _numbers(  # type: ignore[no-untyped-def]
    x, norm, weight, n, K: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, NORMED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """``Σ x·g·w`` for the BN output channels ``n`` and ``Σ x²``, float32; BT pieces of eight numbers at a time."""
    PIECES: tl.constexpr = K // 8
    t, i = tl.arange(0, BT), tl.arange(0, 8)
    # Pieces before channels: so a warp's threads take neighbouring pieces of one channel, here as in a row of x.
    piece = n.to(tl.int64)[None, :] * PIECES + t[:, None]
    rows = weight + piece[:, :, None] * 8 + i[None, None, :]
    ahead = _piece(rows, t, PIECES)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BT, BN), tl.float32)
    squares = tl.zeros((BT, 8), tl.float32)
    for start in range(0, PIECES, BT):
        here = ahead
        ahead = _piece(rows + (start + BT) * 8, t + start + BT, PIECES)
        k = (t + start)[:, None] * 8 + i[None, :]
        a = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if NORMED:
            squares += a * a
            a *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        total += tl.sum(here.to(tl.float32) * a[:, None, :], axis=2)
    return tl.sum(total, axis=0), tl.sum(tl.sum(squares, axis=1), axis=0)


@triton.jit
def _piece(rows, t, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights, which are read once: the first to leave a cache whose room the activations need."""
    return tl.load(rows, mask=(t < PIECES)[:, None, None], other=0.0, eviction_policy="evict_first")


@triton.jit
def _four_rounded(  # type: ignore[no-untyped-def]
    a, b, c, d, inverse
):
    """Four ``[BT, 4]`` as the bytes of words ``[BT, 4]``.

    A sum with 1.5 · 2²³ has the nearest integer in its lowest bits.
    """
    word = (a * inverse + 12582912.0).to(tl.int32, bitcast=True) & 0xFF
    word |= ((b * inverse + 12582912.0).to(tl.int32, bitcast=True) & 0xFF) << 8
    word |= ((c * inverse + 12582912.0).to(tl.int32, bitcast=True) & 0xFF) << 16
    return word | ((d * inverse + 12582912.0).to(tl.int32, bitcast=True) << 24)


@triton.jit
def _activations(  # type: ignore[no-untyped-def]
    x, norm, k, inside, squares, NORMED: tl.constexpr
):
    """Four neighbours of each of BT pieces, float32 ``[BT, 4]``, and their squares added to others.

    With a norm, times its weight. Without, their squares are not asked for, and what is added is 0; but not for what is
    not a number, of which rounding would leave no trace.
    """
    a = tl.load(x + k, mask=inside[:, None], other=0.0).to(tl.float32)
    if NORMED:
        squares += a * a
        a *= tl.load(norm + k, mask=inside[:, None], other=0.0).to(tl.float32)
    else:
        squares += a * 0.0
    return a, squares


@triton.jit
def _integers(  # type: ignore[no-untyped-def]
    x, norm, words, scale, middle, n, K: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    NORMED: tl.constexpr, ASSEMBLED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The same for quantised weights, BT pieces of four words at a time."""
    PIECES: tl.constexpr = K // (4 * P)
    t, i = tl.arange(0, BT), tl.arange(0, 4)
    piece = n.to(tl.int64)[None, :] * PIECES + t[:, None]
    rows = words + piece[:, :, None] * 4 + i[None, None, :]
    ahead = _piece(rows, t, PIECES)
    further = _piece(rows + BT * 4, t + BT, PIECES)  # half the bytes or less: it takes two to bridge the same time
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BT, BN), tl.float32)
    squares = tl.zeros((BT, 4), tl.float32)
    for start in range(0, PIECES, BT):
        here, ahead = ahead, further
        further = _piece(rows + (start + 2 * BT) * 4, t + start + 2 * BT, PIECES)
        inside = t + start < PIECES
        k = (t + start)[:, None] * (4 * P) + i[None, :]
        a, squares = _activations(x, norm, k, inside, squares, NORMED)
        b, squares = _activations(x, norm, k + 4, inside, squares, NORMED)
        c, squares = _activations(x, norm, k + 8, inside, squares, NORMED)
        d, squares = _activations(x, norm, k + 12, inside, squares, NORMED)
        largest = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))
        if P == 4:
            largest = tl.max(largest, axis=1)
            inverse = (127.0 / tl.maximum(largest, 1e-20))[:, None]
            sums = tl.sum(four_products(here, _four_rounded(a, b, c, d, inverse)[:, None, :], ASSEMBLED), axis=2)
            total += sums.to(tl.float32) * (largest / 127.0)[:, None]
        else:
            e, squares = _activations(x, norm, k + 16, inside, squares, NORMED)
            f, squares = _activations(x, norm, k + 20, inside, squares, NORMED)
            g, squares = _activations(x, norm, k + 24, inside, squares, NORMED)
            h, squares = _activations(x, norm, k + 28, inside, squares, NORMED)
            others = tl.maximum(tl.maximum(tl.abs(e), tl.abs(f)), tl.maximum(tl.abs(g), tl.abs(h)))
            largest = tl.max(tl.maximum(largest, others), axis=1)
            inverse = (127.0 / tl.maximum(largest, 1e-20))[:, None]
            low, high = _four_rounded(a, b, c, d, inverse), _four_rounded(e, f, g, h, inverse)
            sums = four_products(here & 0x0F0F0F0F, low[:, None, :], ASSEMBLED)
            sums += four_products((here >> 4) & 0x0F0F0F0F, high[:, None, :], ASSEMBLED)
            sums = tl.sum(sums, axis=2).to(tl.float32)
            ones = tl.full((BT, 4), 0x01010101, tl.int32)
            plain = four_products(ones, low, ASSEMBLED) + four_products(ones, high, ASSEMBLED)
            plain = tl.sum(plain, axis=1).to(tl.float32)[:, None]
            s = tl.load(scale + piece + start, mask=inside[:, None], other=0.0).to(tl.float32)
            z = tl.load(middle + piece + start, mask=inside[:, None], other=0.0).to(tl.float32)
            # w = (q − 8) · scale + middle
            total += (s * (sums - 8.0 * plain) + z * plain) * (largest / 127.0)[:, None]
    y = tl.sum(total, axis=0)
    if P == 4:
        y *= tl.load(scale + n)
    return y, tl.sum(tl.sum(squares, axis=1), axis=0)


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    x, norm, eps, words, scale, middle, n, K: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    NORMED: tl.constexpr, ASSEMBLED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """``Σ x·w`` for the BN output channels ``n``, float32, of the normed row if asked for."""
    if P == 1:
        y, squares = _numbers(x, norm, words, n, K, BN, BT, NORMED, DEPENDENT)
        if scale is not None:
            y *= tl.load(scale + n)
    else:
        y, squares = _integers(x, norm, words, scale, middle, n, K, P, BN, BT, NORMED, ASSEMBLED, DEPENDENT)
    if NORMED:
        y *= tl.rsqrt(squares / K + eps)
    elif P > 1:
        y += squares  # 0, or not a number
    return y


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, norm, eps, words, scale, middle, bias, residual, out, N, K: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, NORMED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr,
    ASSEMBLED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BN output channels of a product, plus a bias, plus the stream."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    y = _sums(x, norm, eps, words, scale, middle, tl.minimum(n, N - 1), K, P, BN, BT, NORMED, ASSEMBLED, DEPENDENT)
    if BIASED:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if ADDED:
        y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def gated(  # type: ignore[no-untyped-def]
    x, norm, eps, words, scale, middle, out, N, K: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    ASSEMBLED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BN / 2 channels of ``silu(gate) · up`` of a normed row; the weights are N rows of gate, then N of up."""
    i = tl.arange(0, BN)
    channel = tl.program_id(0) * (BN // 2) + i // 2
    n = tl.minimum(channel, N - 1) + (i % 2) * N
    y = _sums(x, norm, eps, words, scale, middle, n, K, P, BN, BT, True, ASSEMBLED, DEPENDENT)
    gate, up = tl.split(tl.reshape(y.to(out.dtype.element_ty).to(tl.float32), (BN // 2, 2)))
    y = gated_by(gate, up)
    n = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)


def _sizes(words: Tensor, inputs: int) -> dict[str, int]:
    """Output channels of a program, pieces of a row at a time, warps: a thread holds a piece of each channel."""
    P = weights_in_word(words, inputs)
    pieces = words.shape[1] // (8 if P == 1 else 4)
    warps = 4 if pieces > 64 else 2 if pieces > 32 else 1
    # Four channels of 16 bytes for each thread. More where more is to be done for a piece of x, or bytes are few.
    return {"BN": 8 if P == 8 or words.dtype.itemsize == 1 else 4, "BT": 32 * warps, "warps": warps}


def row_product(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    words: Tensor,
    scale: Tensor | None,
    middle: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """One row ``x`` ``[…, K]`` times the weights of N channels → ``[…, N]`` in x's dtype.

    Args:
        x: a single row, contiguous.
        norm: ``[K]``; the row is normed with it first.
        eps: of the norm.
        words: ``[N, K / P]``, see ``words.py``; or numbers, K a multiple of 8.
        scale: float32 ``[N]`` for int8, ``[N, K / 32]`` for int4.
        middle: ``[N, K / 32]`` for int4.
        bias: ``[N]``.
        residual: ``[…, N]``, added to the result.
    """
    N, K = words.shape[0], x.shape[-1]
    out = torch.empty(*x.shape[:-1], N, device=x.device, dtype=x.dtype)
    sizes = _sizes(words, K)
    launch(
        product, (triton.cdiv(N, sizes["BN"]),), x.device,
        x, norm, eps, words, scale, middle, bias, residual, out, N, K, weights_in_word(words, K),
        NORMED=norm is not None, BIASED=bias is not None, ADDED=residual is not None,
        ASSEMBLED=x.device.type == "cuda", **sizes,
    )  # fmt: skip
    return out


def row_gated(
    x: Tensor, norm: Tensor, eps: float, words: Tensor, scale: Tensor | None, middle: Tensor | None
) -> Tensor:
    """One row ``x`` ``[…, K]``, normed, through gate and up: ``silu(gate) · up`` ``[…, N]``.

    Args:
        x: a single row, contiguous.
        norm: ``[K]``.
        eps: of the norm.
        words: of 2 · N channels, gate first; as for :func:`row_product`, and so are the next two.
        scale: see there.
        middle: see there.
    """
    N, K = words.shape[0] // 2, x.shape[-1]
    out = torch.empty(*x.shape[:-1], N, device=x.device, dtype=x.dtype)
    sizes = _sizes(words, K)
    launch(
        gated, (triton.cdiv(2 * N, sizes["BN"]),), x.device,
        x, norm, eps, words, scale, middle, out, N, K, weights_in_word(words, K),
        ASSEMBLED=x.device.type == "cuda", **sizes,
    )  # fmt: skip
    return out
