"""Attention over the static cache on a GPU: each key and value is read once, and what is hidden is not read at all.

A program takes some queries of one KV head and walks along the positions that they may see, with a running maximum and
sum (Dao et al., 2022, "FlashAttention"). Which positions those are it learns from the queries' own positions, on the
device: there is no mask to read, and the unused tail of the cache costs nothing, so one captured step serves every
length. The G query heads that share a KV head are rows of one product.

The positions of few queries are split between SPLITS programs, evenly whatever the length: in a short pass, heads and
sequences alone are too few programs to keep the memory busy (Dao et al., 2023, "Flash-Decoding"). Then a second kernel
puts the parts together.

``step.py`` is the same for one new token of each sequence.

Legend: B slots · T new tokens of each · Hq/Hkv query and KV heads · G = Hq / Hkv · S positions · D head_dim
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from axon_llm.fast.gpu.launch import launch, processors, stages_for

LOG2_E = 1.4426950408889634
FEW_QUERIES = 64  # rows of one program where positions are split


@triton.jit
def together(  # type: ignore[no-untyped-def]
    parts, sums, one, row, real, used, D: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr
):
    """The weighted mean of what ``used`` programs found for rows of head ``one``, counted over all slots."""
    i, d = tl.arange(0, SPLITS), tl.arange(0, D)
    part = (one * SPLITS + i[None, :]) * BM + row[:, None]  # [rows, SPLITS]
    known = real[:, None] & (i < used)[None, :]
    # Not out of the first-level cache: other multiprocessors wrote this.
    largest = tl.load(sums + part * 2, mask=known, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(sums + part * 2 + 1, mask=known, other=0.0, cache_modifier=".cg")
    there = parts + part[:, :, None] * D + d[None, None, :]
    mean = tl.load(there, mask=known[:, :, None], other=0.0, cache_modifier=".cg")
    weight = tl.exp2(largest - tl.max(largest, axis=1)[:, None])
    return tl.sum(mean * weight[:, :, None], axis=1) / tl.sum(total * weight, axis=1)[:, None]


@triton.jit
def look(  # type: ignore[no-untyped-def]
    q, keys, values, positions, out, parts, sums, scale, key_slot, key_head, key_place, value_slot, value_head,
    value_place, T, HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr,
    BS: tl.constexpr, SPLITS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BM rows, each a query head of a token, of one KV head of one slot; one of SPLITS shares of their positions."""
    split, tile = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    head, slot = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tile * BM + tl.arange(0, BM)
    token = row // G
    real = token < T
    d = tl.arange(0, D)
    at = tl.load(positions + slot * T + token, mask=real, other=-1).to(tl.int32)  # -1 sees nothing
    first, end = 0, tl.max(at, axis=0) + 1
    if WINDOW > 0:
        first = tl.maximum(tl.min(tl.where(real, at, end), axis=0) - WINDOW + 1, 0)
    share = tl.cdiv(tl.cdiv(end - first, SPLITS), BS) * BS
    first += split * share
    end = tl.minimum(end, first + share)

    place = ((slot * T + token) * HKV + head) * G + row % G
    query = tl.load(q + place[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
    keys += slot * key_slot + head * key_head
    values += slot * value_slot + head * value_head
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    mean = tl.zeros((BM, D), tl.float32)
    for start in range(first, end, BS):
        s = start + tl.arange(0, BS)
        k = tl.load(keys + s[:, None] * key_place + d[None, :], mask=(s < end)[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision="ieee") * scale
        seen = (s[None, :] <= at[:, None]) & (s < end)[None, :]
        if WINDOW > 0:
            seen &= s[None, :] > at[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        reference = tl.where(larger == float("-inf"), 0.0, larger)  # of a row that has seen nothing yet
        weights = tl.exp2(scores - reference[:, None])
        kept = tl.exp2(largest - reference)
        v = tl.load(values + s[:, None] * value_place + d[None, :], mask=(s < end)[:, None], other=0.0)
        total = total * kept + tl.sum(weights, axis=1)
        mean = tl.dot(weights.to(query.dtype), v.to(query.dtype), mean * kept[:, None], input_precision="ieee")
        largest = larger

    if SPLITS == 1:
        y = mean / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + place[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=real[:, None])
    else:
        part = ((slot * HKV + head) * SPLITS + split) * BM + row
        tl.store(parts + part[:, None] * D + d[None, :], mean, mask=real[:, None])
        tl.store(sums + part * 2, largest, mask=real)
        tl.store(sums + part * 2 + 1, total, mask=real)


@triton.jit
def gather(  # type: ignore[no-untyped-def]
    parts, sums, out, T, HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One row of the above: the weighted mean of its parts."""
    row, head, slot = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    y = together(parts, sums, slot * HKV + head, row, row < T * G, SPLITS, D, BM, SPLITS)
    place = ((slot * T + row // G) * HKV + head) * G + row % G
    tl.store(out + place[:, None] * D + tl.arange(0, D)[None, :], y.to(out.dtype.element_ty))


def splits_for(programs: int, positions: int, device: torch.device) -> int:
    """Shares of the positions at most, a power of two: a program or two for each multiprocessor, and work for each."""
    wanted = processors(device) * (2 if positions > 4096 else 1) // programs
    return max(1, min(32, 1 << max(wanted, 1).bit_length() - 1, triton.next_power_of_2(triton.cdiv(positions, 64))))


def attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int) -> Tensor:
    """Softmax attention over the cache, ``softmax(q · kᵀ / √D) · v``.

    Args:
        q: ``[B, T, Hq, D]``, contiguous; D a power of two from 16 on.
        keys: of one layer, ``[B, Hkv, S, D]``; those of the new tokens among them.
        values: likewise.
        positions: of the new tokens, ``[B, T]`` int64, contiguous.
        window: positions that a token sees at most; 0 for all.

    Returns:
        ``[B, T, Hq, D]`` in q's dtype.
    """
    (B, T, Hq, D), (_, Hkv, S, _) = q.shape, keys.shape
    G = Hq // Hkv
    out = torch.empty_like(q)
    few = T * G <= FEW_QUERIES
    block = max(16, triton.next_power_of_2(T * G)) if few else 128 if D <= 128 and q.dtype.itemsize == 2 else 64
    tiles = triton.cdiv(T * G, block)
    splits = splits_for(B * Hkv, S, q.device) if few else 1
    parts = sums = out
    if splits > 1:
        parts = torch.empty(B, Hkv, splits, block, D, device=q.device, dtype=torch.float32)
        sums = torch.empty(B, Hkv, splits, block, 2, device=q.device, dtype=torch.float32)
    at_once = 64 if q.dtype.itemsize == 2 else 32
    launch(
        look, (tiles * splits, Hkv, B), q.device,
        q, keys, values, positions, out, parts, sums, LOG2_E / D**0.5, *keys.stride()[:3], *values.stride()[:3], T,
        Hkv, G, D, WINDOW=window, BM=block, BS=at_once, SPLITS=splits,
        warps=4 if block <= 64 else 8,
        stages=stages_for(q.device, 2 * at_once * D * q.dtype.itemsize, 3, beside=block * D * q.dtype.itemsize),
    )  # fmt: skip
    if splits > 1:
        launch(
            gather, (T * G, Hkv, B), q.device, parts, sums, out, T, Hkv, G, D, BM=block, SPLITS=splits, warps=4
        )  # fmt: skip
    return out
