"""int4 weights of a GPU as numbers: for many rows cuBLAS multiplies, and weights are converted before, every time.

Legend: N output channels · K input channels
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from axon_llm.fast.gpu.few_rows import scale_and_middle
from axon_llm.fast.gpu.launch import launch


@triton.jit
def _widen(  # type: ignore[no-untyped-def]
    words, pairs, out, COUNT, BT: tl.constexpr, DEPENDENT: tl.constexpr
):
    """BT of COUNT pieces.

    Turning integers into floats is slow. So their bits become the lowest ones of a float's fraction, above which stands
    a large power of two, and that is subtracted.
    """
    piece, i = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, 4)
    inside = piece < COUNT
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    here = tl.load(words + piece[:, None] * 4 + i[None, :], mask=inside[:, None], other=0)
    scale, middle = scale_and_middle(tl.load(pairs + piece, mask=inside, other=0))
    shift = 4 * tl.arange(0, 2)[:, None] + 8 * i[None, :]
    q = (here[:, None, None, :] >> shift[None, :, :, None]) & 15  # [BT, half, b, i]
    q = tl.reshape((q | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0, (BT, 32))
    w = q * scale[:, None] + middle[:, None]
    at = piece[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out + at, w.to(out.dtype.element_ty), mask=inside[:, None])


def widen(words: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """int4 weights as numbers, ``[N, K]``.

    Args:
        words: int32 ``[N, K / 8]``, see ``words.py``.
        pairs: int32 ``[N, K / 32]``, see there.
        dtype: of the result.
    """
    out = torch.empty(words.shape[0], words.shape[1] * 8, device=words.device, dtype=dtype)
    count = pairs.numel()
    launch(_widen, (triton.cdiv(count, 64),), words.device, words, pairs, out, count, BT=64, warps=4)
    return out
