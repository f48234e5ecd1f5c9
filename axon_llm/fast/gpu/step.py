"""All of attention that lies between two products of a decode step, in one kernel: one new token of each sequence.

It norms and turns queries and the new key, writes key and value to the cache, and has the G queries of each KV head
look at everything their sequence holds, as ``attention.py`` does. The positions are split between up to SPLITS
programs, and the last to arrive puts the parts together, in the same order whichever it is.

What earlier steps wrote it asks for before the kernel in front has ended: keys, values, and where the new token stands.
That is an exception to the rule of ``launch.py``, and sound as long as a step begins with kernels that are launched in
the usual way, which wait for all of the step before: the embedding's, and those of the rotary angles.

Legend: B slots · Hq/Hkv query and KV heads · G = Hq / Hkv · S positions · D head_dim
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from axon_llm.fast.gpu.attention import LOG2_E, splits_for, together
from axon_llm.fast.gpu.launch import launch, processors


@triton.jit
def step(  # type: ignore[no-untyped-def]
    heads, q_norm, k_norm, eps, cos, sin, positions, each, keys, values, out, parts, sums, arrived, scale, key_slot,
    key_head, key_place, value_slot, value_head, value_place, HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, NORMED: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The G queries of one KV head of one slot: one of SPLITS shares of the positions before the new one."""
    split, head, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = tl.load(positions + slot * each).to(tl.int32)
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
                y = together(parts, sums, one, g, g < G, used, D, BM, SPLITS)
                place = out + (one * G + g)[:, None] * D + d[None, :]
                tl.store(place, y.to(out.dtype.element_ty), mask=(g < G)[:, None])


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros, where programs that share a head count each other; each kernel leaves zeros, and one runs at a time.

    So a process runs its steps on one stream. Heads are split while they are fewer than there are programs to fill.
    """
    return torch.zeros(2 * processors(device), device=device, dtype=torch.int32)


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
        positions: ``[B, 1]`` int64.
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
    splits = splits_for(B * Hkv, S, heads.device)
    parts = sums = arrived = out
    if splits > 1:
        parts = torch.empty(B, Hkv, splits, block, D, device=heads.device, dtype=torch.float32)
        sums = torch.empty(B, Hkv, splits, block, 2, device=heads.device, dtype=torch.float32)
        arrived = _counters(heads.device)
    launch(
        step, (splits, Hkv, B), heads.device,
        heads, q_norm, k_norm, eps, cos, sin, positions, positions.stride(0), keys, values, out, parts, sums, arrived,
        LOG2_E / D**0.5,
        *keys.stride()[:3], *values.stride()[:3], Hkv, G, D, WINDOW=window, NORMED=q_norm is not None, BM=block,
        BS=16 if heads.dtype.itemsize > 2 else 64, SPLITS=splits,
        ROWS=min(triton.next_power_of_2(G), max(1, 64 // splits)), warps=4,
    )  # fmt: skip
    return out
