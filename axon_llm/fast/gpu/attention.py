"""Attention over the static cache on a GPU: each key and value is read once, and what is hidden is not read at all.

A program takes some queries of one KV head and walks along the positions that they may see, with a running maximum and
sum (Dao et al., 2022, "FlashAttention"). Which positions those are it learns from the queries' own positions, on the
device: there is no mask to read, and the unused tail of the cache costs nothing, so one captured step serves every
length. The G query heads that share a KV head are rows of one product.

``look`` is for several new tokens of a sequence; they are in the cache already. ``step`` is for one new token of each
sequence, and does all there is to do between two products: it norms and turns queries and the new key, writes key and
value to the cache, and attends. What earlier steps wrote it asks for before the kernel in front has ended.

In a step, heads and sequences are too few programs to keep the memory busy. So the positions are split between SPLITS
programs, evenly whatever the length (Dao et al., 2023, "Flash-Decoding"), and the last to arrive puts the parts
together, in the same order whichever it is.

Legend: B slots · T new tokens of each · Hq/Hkv query and KV heads · G = Hq / Hkv · S positions · D head_dim
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from axon_llm.fast.gpu.launch import launch

LOG2_E = 1.4426950408889634
FEW_QUERIES = 64  # rows of one program where positions are split
MOST_HEADS = 1 << 16  # KV heads of all sequences of a step


@triton.jit
def _together(  # type: ignore[no-untyped-def]
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
def step(  # type: ignore[no-untyped-def]
    heads, q_norm, k_norm, eps, cos, sin, positions, keys, values, out, parts, sums, arrived, scale, key_slot, key_head,
    key_place, value_slot, value_head, value_place, HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, NORMED: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The G queries of one KV head of one slot: one of SPLITS shares of the positions before the new one."""
    split, head, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = tl.load(positions + slot).to(tl.int32)
    first = tl.maximum(at - WINDOW + 1, 0) if WINDOW > 0 else 0
    share = tl.cdiv(tl.cdiv(at - first, SPLITS), BS) * BS
    used = tl.maximum(tl.cdiv(at - first, tl.maximum(share, 1)), 1)  # shares with something to look at
    if split >= used:
        return
    first += split * share
    end = tl.minimum(at, first + share)
    d, s = tl.arange(0, D), tl.arange(0, BS)
    keys += slot * key_slot + head * key_head
    values += slot * value_slot + head * value_head
    k = tl.load(keys + (first + s)[:, None] * key_place + d[None, :], mask=(first + s < end)[:, None], other=0.0)
    v = tl.load(values + (first + s)[:, None] * value_place + d[None, :], mask=(first + s < end)[:, None], other=0.0)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()

    row = tl.arange(0, BM)
    real = row < G
    opposite = (d + D // 2) % D  # the other channel of a pair
    c = tl.load(cos + slot * D + d).to(tl.float32)
    n = tl.load(sin + slot * D + d).to(tl.float32)
    n = tl.where(d < D // 2, -n, n)
    heads += slot * (G + 2) * HKV * D
    mine = heads + (head * G + row)[:, None] * D
    q = tl.load(mine + d[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    q_opposite = tl.load(mine + opposite[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    mine = heads + (HKV * G + head) * D
    new, new_opposite = tl.load(mine + d).to(tl.float32), tl.load(mine + opposite).to(tl.float32)
    new_value = tl.load(mine + HKV * D + d)
    if NORMED:
        q_root = tl.rsqrt(tl.sum(q * q, axis=1) / D + eps)[:, None]
        q *= q_root * tl.load(q_norm + d).to(tl.float32)[None, :]
        q_opposite *= q_root * tl.load(q_norm + opposite).to(tl.float32)[None, :]
        root = tl.rsqrt(tl.sum(new * new, axis=0) / D + eps)
        new *= root * tl.load(k_norm + d).to(tl.float32)
        new_opposite *= root * tl.load(k_norm + opposite).to(tl.float32)
    query = (q * c[None, :] + q_opposite * n[None, :]).to(heads.dtype.element_ty)
    new_key = (new * c + new_opposite * n).to(keys.dtype.element_ty)
    new_value = new_value.to(values.dtype.element_ty)
    if split == 0:
        tl.store(keys + at * key_place + d, new_key)
        tl.store(values + at * value_place + d, new_value)

    # The first share looks at the new token too, out of registers.
    score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1) * scale
    largest = tl.where(split == 0, score, float("-inf"))
    total = tl.where(split == 0, 1.0, 0.0) + tl.zeros((BM,), tl.float32)
    mean = tl.where(split == 0, new_value.to(tl.float32), 0.0)[None, :] + tl.zeros((BM, D), tl.float32)
    for start in range(first, end, BS):
        here_k, here_v = k.to(query.dtype), v.to(query.dtype)
        following = start + BS + s
        k = tl.load(keys + following[:, None] * key_place + d[None, :], mask=(following < end)[:, None], other=0.0)
        v = tl.load(values + following[:, None] * value_place + d[None, :], mask=(following < end)[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(here_k), input_precision="ieee") * scale
        scores = tl.where((start + s < end)[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - larger[:, None])
        kept = tl.exp2(largest - larger)
        total = total * kept + tl.sum(weights, axis=1)
        mean = tl.dot(weights.to(query.dtype), here_v, mean * kept[:, None], input_precision="ieee")
        largest = larger

    there = out + (slot * HKV * G + head * G + row)[:, None] * D + d[None, :]
    if SPLITS == 1:
        tl.store(there, (mean / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])
    else:
        one = slot * HKV + head
        part = (one * SPLITS + split) * BM + row
        tl.store(parts + part[:, None] * D + d[None, :], mean, mask=real[:, None])
        tl.store(sums + part * 2, largest, mask=real)
        tl.store(sums + part * 2 + 1, total, mask=real)
        tl.debug_barrier()  # all of them, before this program says that it has arrived
        if tl.atomic_add(arrived + one, 1, sem="acq_rel") == used - 1:
            tl.store(arrived + one, 0)  # for the next layer
            for some in tl.static_range(0, G, ROWS):
                g = some + tl.arange(0, ROWS)
                y = _together(parts, sums, one, g, g < G, used, D, BM, SPLITS)
                place = out + (one * G + g)[:, None] * D + d[None, :]
                tl.store(place, y.to(out.dtype.element_ty), mask=(g < G)[:, None])


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
    y = _together(parts, sums, slot * HKV + head, row, row < T * G, SPLITS, D, BM, SPLITS)
    place = ((slot * T + row // G) * HKV + head) * G + row % G
    tl.store(out + place[:, None] * D + tl.arange(0, D)[None, :], y.to(out.dtype.element_ty))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _stages(device: torch.device, block: int, at_once: int, head_dim: int, itemsize: int) -> int:
    """Pieces of K and V on their way at a time: three, or as many as there is shared memory for beside the queries."""
    if device.type != "cuda":
        return 1
    properties: Any = torch.cuda.get_device_properties(device)  # whose stubs know less than it
    room = properties.shared_memory_per_block_optin - block * head_dim * itemsize
    return max(1, min(3, room // (2 * at_once * head_dim * itemsize)))


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros, where programs that share a head count each other; each kernel leaves zeros, and one runs at a time."""
    return torch.zeros(MOST_HEADS, device=device, dtype=torch.int32)


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
        stages=_stages(q.device, block, at_once, D, q.dtype.itemsize),
    )  # fmt: skip
    if splits > 1:
        launch(
            gather, (T * G, Hkv, B), q.device, parts, sums, out, T, Hkv, G, D, BM=block, SPLITS=splits, warps=4
        )  # fmt: skip
    return out


def attention_step(
    heads: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
) -> Tensor:
    """One new token of each sequence: norm and turn it, write it to the cache, and attend.

    Args:
        heads: ``[B, 1, Hq + 2 · Hkv, D]``, contiguous: queries, keys, values.
        q_norm: ``[D]``, or ``None`` where queries and keys are not normed first.
        k_norm: likewise.
        eps: of both norms.
        cos: ``[B, 1, 1, D]``, contiguous.
        sin: likewise.
        positions: ``[B, 1]`` int64, contiguous.
        keys: of one layer, ``[B, Hkv, S, D]``; written.
        values: likewise.
        window: positions that a token sees at most; 0 for all.

    Returns:
        ``[B, 1, Hq, D]``.
    """
    (B, _, H, D), (_, Hkv, S, _) = heads.shape, keys.shape
    G = H // Hkv - 2
    out = torch.empty(B, 1, Hkv * G, D, device=heads.device, dtype=heads.dtype)
    block = max(16, triton.next_power_of_2(G))
    splits = splits_for(B * Hkv, S, heads.device) if B * Hkv <= MOST_HEADS else 1
    parts = sums = arrived = out
    if splits > 1:
        parts = torch.empty(B, Hkv, splits, block, D, device=heads.device, dtype=torch.float32)
        sums = torch.empty(B, Hkv, splits, block, 2, device=heads.device, dtype=torch.float32)
        arrived = _counters(heads.device)
    launch(
        step, (splits, Hkv, B), heads.device,
        heads, q_norm, k_norm, eps, cos, sin, positions, keys, values, out, parts, sums, arrived, LOG2_E / D**0.5,
        *keys.stride()[:3], *values.stride()[:3], Hkv, G, D, WINDOW=window, NORMED=q_norm is not None, BM=block,
        BS=16 if heads.dtype.itemsize > 2 else 64, SPLITS=splits,
        ROWS=min(triton.next_power_of_2(G), max(1, 64 // splits)), warps=4,
    )  # fmt: skip
    return out
