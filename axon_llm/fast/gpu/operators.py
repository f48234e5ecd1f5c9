"""The GPU kernels as operators, which stay whole when a step is compiled; see ``ops.py``.

Behind a name there is a kernel on a GPU only, and Triton is imported when the first of them is called. Registering them
is this module's only side effect.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from axon_llm.fast.gpu.shapes import SHAPES

OLDEST = (8, 0)  # compute capability from which bfloat16 can be multiplied

_library = torch.library.Library("axon", "FRAGMENT")
_library.define(
    "row_product(Tensor x, Tensor? norm, float eps, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual)"
    " -> Tensor"
)
_library.define("row_gated(Tensor x, Tensor norm, float eps, Tensor weight) -> Tensor")
_GIVEN = "Tensor words, Tensor scale, Tensor? bias, Tensor? residual, bool gated, ScalarType dtype"
_library.define(f"gpu_few_rows(Tensor q, Tensor steps, Tensor? sums, {_GIVEN}) -> Tensor")
_library.define(f"gpu_int8_tiles(Tensor q, Tensor steps, {_GIVEN}) -> Tensor")
_library.define("gpu_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_library.define("round_rows(Tensor x, Tensor? norm, float eps) -> (Tensor q, Tensor steps)")
_library.define("round_groups(Tensor x, Tensor? norm, float eps) -> (Tensor q, Tensor steps, Tensor sums)")
_library.define("as_in_groups(Tensor x) -> Tensor")
_library.define("round_to_fp8(Tensor x) -> (Tensor, Tensor)")
_library.define("as_in_fp8(Tensor x) -> Tensor")
_library.define("gpu_gate(Tensor both) -> Tensor")
_library.define(
    "gpu_turn(Tensor heads, Tensor? q_norm, Tensor? k_norm, float eps, Tensor cos, Tensor sin, Tensor positions,"
    " Tensor(a!) keys, Tensor(b!) values) -> Tensor"
)
_library.define(
    "gpu_step(Tensor heads, Tensor? q_norm, Tensor? k_norm, float eps, Tensor cos, Tensor sin, Tensor positions,"
    " Tensor(a!) keys, Tensor(b!) values, int window) -> Tensor"
)
_library.define("widen(Tensor words, Tensor pairs, ScalarType dtype) -> Tensor")
_library.define("gpu_attention(Tensor q, Tensor keys, Tensor values, Tensor positions, int window) -> Tensor")


def row_product(
    x: Tensor, norm: Tensor | None, eps: float, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """See ``gpu/one_row.py``."""
    from axon_llm.fast.gpu import one_row

    return one_row.row_product(x.contiguous(), norm, eps, weight, scale, bias, residual)


def row_gated(x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
    """See ``gpu/one_row.py``."""
    from axon_llm.fast.gpu import one_row

    return one_row.row_gated(x.contiguous(), norm, eps, weight)


def gpu_few_rows(
    q: Tensor, steps: Tensor, sums: Tensor | None, words: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, gated: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See ``gpu/few_rows.py``."""
    from axon_llm.fast.gpu import few_rows

    stream = None if residual is None else residual.contiguous()
    return few_rows.few_rows_product(q, steps, sums, words, scale, bias, stream, gated, dtype)


def gpu_int8_tiles(
    q: Tensor, steps: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, gated: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See ``gpu/tiles.py``."""
    from axon_llm.fast.gpu import tiles

    stream = None if residual is None else residual.contiguous()
    return tiles.int8_product(q, steps, words, scale, bias, stream, gated, dtype)


def gpu_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``gpu/around.py``."""
    from axon_llm.fast.gpu import around

    return around.rms_norm(x.contiguous(), weight, eps)


def round_rows(x: Tensor, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """See ``gpu/rounding.py``."""
    from axon_llm.fast.gpu import rounding

    return rounding.round_rows(x.contiguous(), norm, eps)


def round_groups(x: Tensor, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See ``gpu/rounding.py``."""
    from axon_llm.fast.gpu import rounding

    return rounding.round_groups(x.contiguous(), norm, eps)


def as_in_groups(x: Tensor) -> Tensor:
    """See ``gpu/rounding.py``."""
    from axon_llm.fast.gpu import rounding

    return rounding.as_in_groups(x.contiguous())


def as_in_fp8(x: Tensor) -> Tensor:
    """See ``gpu/rounding.py``."""
    from axon_llm.fast.gpu import rounding

    return rounding.as_in_fp8(x.contiguous())


def round_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``gpu/rounding.py``."""
    from axon_llm.fast.gpu import rounding

    return rounding.round_to_fp8(x.contiguous())


def gpu_gate(both: Tensor) -> Tensor:
    """See ``gpu/around.py``."""
    from axon_llm.fast.gpu import around

    return around.gate(both.contiguous())


def gpu_turn(
    heads: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    positions: Tensor, keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """See ``gpu/around.py``."""
    from axon_llm.fast.gpu import around

    at = positions.contiguous()
    return around.turn(heads.contiguous(), q_norm, k_norm, eps, cos.contiguous(), sin.contiguous(), at, keys, values)


def gpu_step(
    heads: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    positions: Tensor, keys: Tensor, values: Tensor, window: int,
) -> Tensor:  # fmt: skip
    """See ``gpu/step.py``."""
    from axon_llm.fast.gpu import step

    given = heads.contiguous(), q_norm, k_norm, eps, cos.contiguous(), sin.contiguous(), positions
    return step.attention_step(*given, keys, values, window)


def widen(words: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``gpu/widen.py``."""
    from axon_llm.fast.gpu import widen as widening

    return widening.widen(words, pairs, dtype)


def gpu_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int) -> Tensor:
    """See ``gpu/attention.py``."""
    from axon_llm.fast.gpu import attention

    return attention.attention(q.contiguous(), keys, values, positions.contiguous(), window)


@cache
def gpu_kernels() -> bool:
    """The kernels can be used: Triton is installed, the GPU is Nvidia's and not too old. Where not, stderr says so."""
    reason = ""
    try:
        from axon_llm.fast.gpu import attention, step, tiles  # noqa: F401
    except ImportError as error:
        reason = str(error)
    if torch.version.hip is not None:
        reason = "they are for Nvidia's GPUs"
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST:
        reason = f"they need compute capability {OLDEST[0]}.{OLDEST[1]}"
    if reason:
        print(f"axon: our own GPU kernels are not used, and steps are slower: {reason}", file=sys.stderr)  # noqa: T201
    return not reason


ON_GPU: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        row_product, row_gated, gpu_few_rows, gpu_int8_tiles, widen, round_rows, round_groups,
        as_in_groups, round_to_fp8, as_in_fp8, gpu_norm, gpu_gate, gpu_turn, gpu_step, gpu_attention,
    )
}  # fmt: skip
for _name, _kernel in ON_GPU.items():
    _library.impl(_name, _kernel, "CUDA")
for _name, _shape in SHAPES.items():
    torch.library.register_fake(f"axon::{_name}", _shape, lib=_library)
