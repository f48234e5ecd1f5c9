"""The GPU's kernels for quantised weights, run number by number in Triton's interpreter. Needs Triton, not a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import warnings
warnings.simplefilter("ignore")
import torch
from axon_llm.fast import weight_only
from axon_llm.fast.int4 import Int4WeightLinear
from axon_llm.fast.quantise import dequantise_int4, dequantise_int8, quantise_int4, quantise_int8

torch.manual_seed(0)
for dtype in (torch.float32, torch.float16):
    for rows, channels, inputs in ((1, 96, 160), (1, 40, 2080), (8, 64, 512), (20, 40, 96), (64, 200, 256)):
        weight, x = torch.randn(channels, inputs), torch.randn(rows, inputs).to(dtype)
        q, scale = quantise_int8(weight)
        exact = x.float() @ dequantise_int8(q, scale).T
        error = float((weight_only.int8_few(x, q, scale).float() - exact).norm() / exact.norm())
        assert error < (1e-5 if dtype == torch.float32 else 2e-3), (dtype, rows, channels, inputs, error)
        values = quantise_int4(weight)
        linear = Int4WeightLinear(*values)
        exact = x.float() @ dequantise_int4(*values).T
        y = weight_only.int4_few(x, linear.halves, linear.scale, linear.middle).float()
        error = float((y - exact).norm() / exact.norm())
        assert error < (1e-5 if dtype == torch.float32 else 2e-3), (dtype, rows, channels, inputs, error)
print("as exact as they should be")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_compute_what_the_weights_stand_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "as exact as they should be", done.stderr[-2000:]
