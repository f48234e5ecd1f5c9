"""Shapes and dtypes of what the operators of ``operators.py`` return: all that a compiler asks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _row_product(
    x: Tensor, norm: Tensor | None, eps: float, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _row_gated(x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


def _gpu_few_rows(
    q: Tensor, steps: Tensor, sums: Tensor | None, words: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, gated: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _gpu_int8_tiles(q, steps, words, scale, bias, residual, gated, dtype)


def _gpu_int8_tiles(
    q: Tensor, steps: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, gated: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape[0], words.shape[0] // (2 if gated else 1), dtype=dtype)


def _gpu_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _round_rows(x: Tensor, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(rows, x.shape[-1], dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)


def _round_groups(x: Tensor, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, groups = x.numel() // x.shape[-1], x.shape[-1] // 32
    steps, sums = (x.new_empty(rows, groups, dtype=torch.float32) for _ in range(2))
    return x.new_empty(rows, x.shape[-1], dtype=torch.int8), steps, sums


def _as_in_groups(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _as_in_fp8(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _round_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def _gpu_gate(both: Tensor) -> Tensor:
    return both.new_empty(*both.shape[:-1], both.shape[-1] // 2)


def _gpu_turn(
    heads: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    positions: Tensor, keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    return heads.new_empty(*heads.shape[:2], heads.shape[2] - 2 * keys.shape[1], heads.shape[3])


def _gpu_step(
    heads: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    positions: Tensor, keys: Tensor, values: Tensor, window: int,
) -> Tensor:  # fmt: skip
    return heads.new_empty(*heads.shape[:2], heads.shape[2] - 2 * keys.shape[1], heads.shape[3])


def _widen(words: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    return words.new_empty(words.shape[0], words.shape[1] * 8, dtype=dtype)


def _gpu_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int) -> Tensor:
    return q.new_empty(q.shape)


SHAPES: dict[str, Callable[..., Any]] = {
    each.__name__[1:]: each
    for each in (
        _row_product, _row_gated, _gpu_few_rows, _gpu_int8_tiles, _gpu_norm, _round_rows, _round_groups,
        _as_in_groups, _as_in_fp8, _round_to_fp8, _gpu_gate, _gpu_turn, _gpu_step, _widen, _gpu_attention,
    )
}  # fmt: skip
