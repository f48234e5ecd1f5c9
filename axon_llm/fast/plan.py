"""Which kernel multiplies by the weights: the one place where that is decided, from device, dtype and rows.

Rows are the tokens that go through a linear layer together: slots in a decode step, chunk length in a prefill. A decode
step reads every weight to use it a few times, so it is bound by memory bandwidth; a prefill uses each weight hundreds
of times, so it is bound by arithmetic. The measurements behind each choice are in ``docs/performance.md``.

This file imports nothing but the standard library and knows no kernel's code: ``linear.py`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from axon_llm.errors import UsageError

QUANTIZE = ("int8", "int4", "fp8")
# Rows up to which a GPU multiplies words of a quantised weight; more go through the matrix unit. Measured on an H200.
INT8_FEW, INT4_FEW = 4, 8


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice of kernel.

    Attributes:
        kernel: which class in ``linear.py`` or its neighbours holds the weights.
        fuse: one linear for query, key and value, and one for gate and up.
        decode: how one row is multiplied, in words.
        prefill: how many rows are multiplied, in words.
        bits: stored bits per weight, scales included.
    """

    kernel: Literal[
        "plain", "gpu", "packed", "int8", "int4", "fp8", "bf16-strips", "int8-strips", "int4-strips", "reference"
    ]
    fuse: bool
    decode: str
    prefill: str
    bits: float


def choose(
    *,
    device: str,
    dtype: str,
    rows: int,
    quantize: str | None,
    amx: bool,
    fp8: bool = False,
    strips: bool = False,
    products: str = "bfloat16",
    once: bool = False,
) -> Plan:
    """Decide how weights are stored and multiplied.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the activations, ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        rows: rows of a decode step (slots).
        quantize: ``"int8"``, ``"int4"``, ``"fp8"`` or ``None``.
        amx: PyTorch's kernels use the CPU's matrix unit (Intel AMX).
        fp8: the device multiplies fp8 (Nvidia Hopper and later).
        strips: there are kernels of our own for this CPU (``native.py``).
        products: how those multiply bfloat16 fastest: ``"bfloat16"``, ``"float32"`` or ``"tiles"``.
        once: for one answer only, which copying all weights into another layout would delay by more than it saves.

    Raises:
        UsageError: a quantisation that does not exist, or not here.
    """
    if quantize is not None and quantize not in QUANTIZE:
        raise UsageError(f"--quantize {quantize!r} is not known", f"Known: {', '.join(QUANTIZE)}.")
    if quantize == "fp8":
        if not fp8 or dtype != "bfloat16":
            raise UsageError(
                f"--quantize fp8 needs an Nvidia GPU from Hopper on, and bfloat16; here are {device} and {dtype}",
                "--quantize int8 works everywhere.",
            )
        how = "cuBLAS or CUTLASS fp8, one activation scale per row"
        return Plan("fp8", True, "one row: our own kernel (without Triton: the next); more: " + how, how, 8)
    width = 32 if dtype == "float32" else 16
    if device != "cpu":
        if quantize is None:
            return Plan("gpu", True, "one row: our own kernel (without Triton: cuBLAS); more: cuBLAS", "cuBLAS", width)
        if quantize == "int8":
            how = "our own kernels, activations rounded to int8 by row (without Triton: widened, then cuBLAS)"
            return Plan("int8", True, how, how, 8)
        many = "activations rounded by group of 32, widened, then cuBLAS"
        few = f"up to {INT4_FEW} rows: our own kernels, activations rounded to int8 by group of 32; more: {many}"
        return Plan("int4", True, f"{few} (without Triton: widened, then cuBLAS)", many, 5)
    strips = strips and dtype != "float16"
    tiles = products == "tiles"
    unit = ", by the matrix unit" if tiles else ""
    if strips and quantize == "int4":
        how = "strips, activations rounded to int8 by row and group of 32"
        return Plan("int4-strips", True, how, "strips, widened to bfloat16" + unit if tiles else how, 5)
    if strips and quantize == "int8":
        how = "strips, activations rounded to int8 by row" + unit
        return Plan("int8-strips", True, how, how, 8)
    if strips and dtype == "bfloat16":
        how = unit or f", products in {products}"
        if once:
            return Plan(
                "plain", True, "our own kernel, on the weights as stored", "laid in strips on the fly" + how, width
            )
        return Plan("bf16-strips", True, "strips" + how, "strips" + how, width)
    if quantize == "int8":
        how = "oneDNN u8·s8, one activation scale per row"
        return Plan("int8", True, how, how, 8)
    if quantize == "int4":
        return Plan("int4", True, "PyTorch's int4 kernel", "PyTorch's int4 kernel, slow", 5)
    if dtype == "float16":
        return Plan("reference", False, "F.linear", "F.linear", width)
    if dtype == "bfloat16" and rows == 1 and amx:
        return Plan("plain", False, "matrix · vector on the weights as stored", "oneDNN, packed on the fly", width)
    return Plan("packed", True, "oneDNN, packed once", "oneDNN, packed once", width)


def attention_kernel(*, device: str, dtype: str, strips: bool) -> Literal["fused", "strips"]:
    """Decide how attention is computed over the cache.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of queries, keys and values.
        strips: there are kernels of our own for this CPU.
    """
    return "strips" if device == "cpu" and dtype == "bfloat16" and strips else "fused"
