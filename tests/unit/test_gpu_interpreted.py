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
from axon_llm.fast.gpu import around, attention, few_rows, one_row, rounding, step, words
from axon_llm.fast.quantise import dequantise_int4, dequantise_int8, quantise_int4, quantise_int8

torch.manual_seed(0)
step.processors = lambda device: 132
attention.splits_for = step.splits_for = lambda *given: 4  # of sequences this short there would be one

def close(y, exact, dtype=torch.float32):
    error = float((y.double() - exact.double()).norm() / exact.double().norm())
    assert error < (5e-5 if dtype == torch.float32 else 2e-3), (dtype, tuple(exact.shape), error)
"""
PRODUCTS = """
for dtype in (torch.float32, torch.float16):
    for channels, inputs in ((96, 160), (41, 1040), (32, 2304)):
        x, w = torch.randn(1, 1, inputs).to(dtype), (torch.randn(channels, inputs) / inputs**0.5).to(dtype)
        norm, bias, stream = (torch.randn(*shape).to(dtype) for shape in ((inputs,), (channels,), (1, 1, channels)))
        root = torch.rsqrt(x.double().square().mean() + 1e-5)
        int8 = quantise_int8(w.float())
        forms = [((w, None, None), w, None), ((words.to_words(int8[0]), int8[1], None), dequantise_int8(*int8), 16)]
        assert torch.equal(words.from_words(forms[1][0][0], 4), int8[0])
        if channels % 32 == 0:
            int4 = quantise_int4(w.float())
            forms.append(((words.to_words(int4[0]), *int4[1:]), dequantise_int4(*int4), 32))
            assert torch.equal(words.from_words(forms[2][0][0], 8), int4[0].to(torch.int8))
        for given, weight, piece in forms:
            weight = weight.double()
            plain, normed = x.double(), x.double() * norm.double()
            if piece:
                plain, normed = (round_activations(each, piece).double() for each in (plain, normed))
            close(one_row.row_product(x, None, 0.0, *given, None, None), plain @ weight.T, dtype)
            y = one_row.row_product(x, norm, 1e-5, *given, bias, stream)
            close(y, root * normed @ weight.T + bias.double() + stream.double(), dtype)
            if channels % 2 == 0:
                gate, up = (root * normed @ weight.T).chunk(2, dim=-1)
                close(one_row.row_gated(x, norm, 1e-5, *given), F.silu(gate) * up, dtype)
            if piece:
                many = torch.randn(3, inputs).to(dtype)
                close(rounding.round_pieces(many, piece), round_activations(many.float(), piece), dtype)
                broken = x.clone()
                broken[0, 0, 7] = torch.nan
                assert one_row.row_product(broken, None, 0.0, *given, None, None).isnan().all()
                for rows in (3, 40):
                    many = torch.randn(rows, inputs).to(dtype)
                    close(few_rows.few_rows_product(many, *given), many.double() @ weight.T, dtype)
                close(few_rows.widen(*given, inputs, torch.float32), weight)
"""
BLOCKS = """
import copy
from dataclasses import replace
from tiny import tiny_model
from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
from axon_llm.fast.gpu import operators
from axon_llm.fast.gpu.block import GpuBlock, GpuNorm
from axon_llm.fast.gpu.linear import GpuLinear

for name, kernel in operators.ON_GPU.items():
    operators._library.impl(name, kernel, "CPU")

def on_kernels(model):
    linear = lambda *parts: GpuLinear(
        torch.cat([part.weight for part in parts]), parts[0].in_features,
        bias=None if parts[0].bias is None else torch.cat([part.bias for part in parts]),
    )
    for index, block in enumerate(model.layers):
        a, m = block.self_attn, block.mlp
        parts = linear(a.q_proj, a.k_proj, a.v_proj), linear(a.o_proj), linear(m.gate_proj, m.up_proj), linear(m.down_proj)
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
        exact = tiny_model(config, scale=0.1)
        ours = on_kernels(copy.deepcopy(exact))
        tokens = torch.randint(0, 64, (2, 60))
        later = torch.arange(5, 14).expand(2, 9)
        close(ours(tokens[:, :9], later), exact(tokens[:, :9], later))
        for rows in (1, 2):
            caches = [KVCache(config, slots=3, max_seq_len=64).view(slots=rows) for _ in range(2)]
            for start, end in ((0, 40), (40, 41), (41, 42), (42, 44), (44, 60)):
                at = torch.arange(start, end).expand(rows, end - start)
                given = tokens[:rows, start:end]
                close(ours(given, at, caches[0]), exact(given, at, caches[1]))
                close(caches[0].k, caches[1].k)
                close(caches[0].v, caches[1].v)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(numpy >= (2, 4), reason="Triton's interpreter wants a numpy before 2.4")
@pytest.mark.parametrize("program", [PRODUCTS, BLOCKS], ids=["products", "blocks"])
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
