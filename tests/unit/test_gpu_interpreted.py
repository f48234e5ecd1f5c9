"""The GPU's kernels, run number by number in Triton's interpreter. Needs Triton, not a GPU.

The interpreter knows no bfloat16 products and nothing of what runs beside what; ``tests/gpu`` does.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
numpy = tuple(int(part) for part in version("numpy").split(".")[:2])
HEAD = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, "tests/unit")
import torch
from torch.nn import functional as F
from axon_llm.bench.quality import round_activations
from axon_llm.fast.gpu import attention, linear, one_row, operators, rounding, step, widen, words
from axon_llm.fast.quantise import dequantise_int4, dequantise_int8, quantise_int4, quantise_int8

for name, kernel in operators.ON_GPU.items():
    operators._library.impl(name, kernel, "CPU")
torch.manual_seed(0)
step.processors = lambda device: 132
attention.splits_for = step.splits_for = lambda *given: 4  # of sequences this short there would be one

def close(y, exact, dtype=torch.float32, most=5e-5):
    error = float((y.double() - exact.double()).norm() / exact.double().norm())
    assert error < (most if dtype == torch.float32 else 2e-3), (dtype, tuple(exact.shape), error)
"""
PRODUCTS = """
for dtype in (torch.float32, torch.float16):
    for channels, inputs in ((96, 160), (41, 1040), (32, 2304)):
        x, w = torch.randn(1, 1, inputs).to(dtype), (torch.randn(channels, inputs) / inputs**0.5).to(dtype)
        norm, bias, stream = (torch.randn(*shape).to(dtype) for shape in ((inputs,), (channels,), (1, 1, channels)))
        normed = torch.rsqrt(x.double().square().mean() + 1e-5) * x.double() * norm.double()
        close(one_row.row_product(x, None, 0.0, w, None, None, None), x.double() @ w.double().T, dtype)
        y = one_row.row_product(x, norm, 1e-5, w, None, bias, stream)
        close(y, normed @ w.double().T + bias.double() + stream.double(), dtype)
        if channels % 2 == 0:
            gate, up = (normed @ w.double().T).chunk(2, dim=-1)
            close(one_row.row_gated(x, norm, 1e-5, w), F.silu(gate) * up, dtype)
"""
INTEGERS = """
def normed_as_it_rounds(x, norm):
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    return (y.to(x.dtype).float() * norm.float()).to(x.dtype)

def every_way(linear, x, stands_for, piece):
    \"\"\"A product, one added to the stream, and one of a normed row gated, in turn by every kernel there is.\"\"\"
    norm, stream = torch.randn(x.shape[-1]).to(x.dtype), torch.randn(len(x), linear.out_features).to(x.dtype)
    exact = round_activations(x.float(), piece).double() @ stands_for.double().T
    bias = 0 if linear.bias is None else linear.bias.double()
    again = round_activations(normed_as_it_rounds(x, norm).float(), piece).double() @ stands_for.double().T + bias
    # what lies between two of 127 steps may be rounded to either
    close(linear(x), exact + bias, x.dtype, 3e-4)
    close(linear.normed(x, norm, 1e-5), again, x.dtype, 3e-4)
    close(linear.add(x, stream), exact + bias + stream.double(), x.dtype, 3e-4)
    if linear.out_features % 2 == 0:
        gate, up = again.chunk(2, dim=-1)
        close(linear.gated(x, norm, 1e-5), F.silu(gate) * up, x.dtype, 3e-4)
    broken = x.clone()
    broken[0, 7] = torch.nan
    assert linear(broken)[0].isnan().all() and not linear(broken)[1:].isnan().any()

with torch.inference_mode():
    for dtype, channels, inputs in ((torch.float32, 96, 320), (torch.float16, 41, 1056), (torch.float32, 32, 2304)):
        w = torch.randn(channels, inputs) / inputs**0.5
        bias = torch.randn(channels).to(dtype)
        int8, int4 = quantise_int8(w), quantise_int4(w)
        in8, in4 = linear.GpuInt8Linear(*int8, bias), linear.GpuInt4Linear(*int4, bias)
        assert torch.equal(words.from_words(in8.words, 4), int8[0])
        assert torch.equal(words.from_words(in4.words, 8), int4[0].to(torch.int8))
        close(widen.widen(in4.words, in4.pairs, torch.float32), dequantise_int4(*int4))
        for rows in (1, 2, 4, 7, 20, 70):
            x = torch.randn(rows, inputs).to(dtype)
            every_way(in8, x, dequantise_int8(*int8), inputs)
            every_way(in4, x, dequantise_int4(*int4), 32)
        x = torch.randn(20, inputs).to(dtype)
        assert torch.equal(in8(x)[:1], in8(x[:1])) and torch.equal(in8(x)[3:5], in8(x[3:5]))
        close(rounding.as_in_groups(x), round_activations(x.float(), 32), dtype, 3e-4)
"""
BLOCKS = """
import copy
from dataclasses import replace
from tiny import tiny_model
from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
from axon_llm.fast.gpu.block import GpuBlock, GpuNorm
from axon_llm.fast.gpu.linear import GpuInt8Linear, GpuPlainLinear
from axon_llm.fast.linear import PlainLinear

def on_kernels(model, of_integers):
    \"\"\"Of integers, but for the output of attention, which is a linear that knows nothing of norms and streams.\"\"\"
    def linear(*parts):
        weight = torch.cat([part.weight for part in parts])
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        return GpuInt8Linear(*quantise_int8(weight), bias) if of_integers else GpuPlainLinear(weight, bias)

    for index, block in enumerate(model.layers):
        a, m = block.self_attn, block.mlp
        out = PlainLinear(a.o_proj.weight, a.o_proj.bias) if of_integers else linear(a.o_proj)
        parts = linear(a.q_proj, a.k_proj, a.v_proj), out, linear(m.gate_proj, m.up_proj), linear(m.down_proj)
        model.layers[index] = GpuBlock(block, *parts, model.config.layer_windows[index] or 0)
    model.norm = GpuNorm(model.norm)
    return model

config = ModelConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
    max_position_embeddings=256,
)
with torch.inference_mode():
    for config in (
        replace(config, num_heads=6, num_kv_heads=2), replace(config, qk_norm=True, qkv_bias=True),
        replace(config, layer_windows=(20, None)),
    ):
        for of_integers in (False, True):
            exact = tiny_model(config, scale=0.1)
            ours = on_kernels(copy.deepcopy(exact), of_integers)
            most = 0.05 if of_integers else 5e-5
            tokens = torch.randint(0, 64, (2, 60))
            later = torch.arange(5, 14).expand(2, 9)
            close(ours(tokens[:, :9], later), exact(tokens[:, :9], later), most=most)
            for rows in (1, 2):
                caches = [KVCache(config, slots=3, max_seq_len=64).view(slots=rows) for _ in range(2)]
                for start, end in ((0, 40), (40, 41), (41, 42), (42, 44), (44, 60)):
                    at = torch.arange(start, end).expand(rows, end - start)
                    given = tokens[:rows, start:end]
                    close(ours(given, at, caches[0]), exact(given, at, caches[1]), most=most)
                    close(caches[0].k, caches[1].k, most=most)
                    close(caches[0].v, caches[1].v, most=most)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(numpy >= (2, 4), reason="Triton's interpreter wants a numpy before 2.4")
@pytest.mark.parametrize("program", [PRODUCTS, INTEGERS, BLOCKS], ids=["products", "integers", "blocks"])
def test_the_kernels_compute_what_the_readable_path_does(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + program + "print('as exact as they should be')"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "as exact as they should be", done.stderr[-2000:]
