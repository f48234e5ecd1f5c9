"""The fast variants on a CUDA device against the readable path on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_model
from torch.nn import functional as F

from axon_llm.bench.quality import round_activations
from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
from axon_llm.engine.runner import Runner
from axon_llm.fast import accelerate, describe
from axon_llm.fast.fp8 import Fp8Linear, quantise_fp8
from axon_llm.fast.gpu.linear import GpuLinear
from axon_llm.fast.quantise import dequantise_int4, dequantise_int8, quantise_int4, quantise_int8
from axon_llm.fast.replace import build
from axon_llm.layers.attention import attend
from axon_llm.layers.rope import rotate
from axon_llm.model import Transformer, causal_mask

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


@torch.inference_mode()
def logits(model: Transformer, device: str, rows: int = 2) -> torch.Tensor:
    cache = KVCache(model.config, slots=rows, max_seq_len=32, device=device, dtype=model.embed_tokens.weight.dtype)
    tokens = torch.arange(12, device=device).view(2, 6)[:rows]
    positions = torch.arange(6, device=device).expand(rows, 6)
    first = model(tokens[:, :5], positions[:, :5], cache)
    return torch.cat((first, model(tokens[:, 5:], positions[:, 5:], cache)), dim=1).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2])
def test_logits_stay_those_of_the_cpu(rows: int, quantize: str | None, dtype: torch.dtype) -> None:
    model = tiny_model(CONFIG, scale=0.1)
    exact = logits(model, "cpu", rows)
    fast = accelerate(copy.deepcopy(model).to("cuda", dtype), quantize)
    assert describe(fast)["fused"]
    error = float((logits(fast, "cuda", rows) - exact).norm() / exact.norm())
    assert error < {None: 1e-3, "int8": 0.05, "int4": 0.3}[quantize] + (0.03 if dtype == torch.bfloat16 else 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "channels", "inputs"),
    [
        (1, 96, 160), (1, 8256, 2048), (1, 2048, 8192), (2, 96, 160), (4, 2048, 8192), (5, 96, 160), (8, 8256, 2048),
        (9, 96, 160), (33, 2048, 8192), (64, 8256, 2048), (65, 96, 160), (300, 2048, 8192),
    ],
)  # fmt: skip
def test_products_are_those_of_what_the_weights_stand_for(
    rows: int, channels: int, inputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(channels, inputs, device="cuda"), torch.randn(rows, inputs, device="cuda").to(dtype)
    bias, residual, norm = (
        torch.randn(*shape, device="cuda").to(dtype) for shape in ((channels,), (rows, channels), (inputs,))
    )
    wide = x.float()
    normed = ((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype).float() * norm).to(dtype)
    for linear, stands_for, piece in (
        (GpuLinear.where_it_suits((weight.to(dtype),), bias), weight.to(dtype), 0),
        (build("int8", values := quantise_int8(weight), bias), dequantise_int8(*values), inputs),
        (build("int4", values4 := quantise_int4(weight), bias), dequantise_int4(*values4), 32),
    ):
        assert isinstance(linear, GpuLinear)
        product, of_normed = (
            (round_activations(each.float(), piece) if piece else each).double() @ stands_for.double().T + bias.double()
            for each in (x, normed)
        )
        gate, up = of_normed.chunk(2, dim=-1)
        # what lies between two of 127 steps may be rounded to either
        tolerance = 1e-2 if dtype == torch.bfloat16 else 5e-3 if piece else 2e-4
        for found, exact in (
            (linear(x), product),
            (linear.add(x, residual), product + residual),
            (linear.normed(x, norm, 1e-5), of_normed),
            (linear.gated(x, norm, 1e-5), F.silu(gate) * up),
        ):
            assert float((found.double() - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("channels", "inputs"), [(96, 160), (4096, 14336)])
def test_a_row_of_int8_is_the_same_to_the_last_bit_whatever_its_batch_mates(
    channels: int, inputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    bias, norm, stream, x = (
        torch.randn(*shape, device="cuda").to(dtype)
        for shape in ((channels,), (inputs,), (600, channels), (600, inputs))
    )
    linear = build("int8", quantise_int8(torch.randn(channels, inputs, device="cuda")), bias)
    assert isinstance(linear, GpuLinear)

    def every_way(rows: slice) -> tuple[torch.Tensor, ...]:
        here = x[rows]
        return (
            linear(here),
            linear.normed(here, norm, 1e-5),
            linear.add(here, stream[rows]),
            linear.gated(here, norm, 1e-5),
        )

    every = every_way(slice(0, 600))
    for count in (1, 2, 5, 20, 40, 100):
        rows = slice(3, 3 + count)
        for found, of_all in zip(every_way(rows), every, strict=True):
            assert torch.equal(found, of_all[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("B", "T", "Hq", "Hkv", "D"), [(1, 1, 32, 8, 128), (3, 1, 8, 8, 64), (2, 5, 6, 2, 32), (1, 300, 8, 2, 128)]
)
@pytest.mark.parametrize("window", [0, 100])
def test_attention_is_that_of_the_readable_path(
    B: int, T: int, Hq: int, Hkv: int, D: int, window: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    for start in (0, 7, 650):
        q = torch.randn(B, T, Hq, D, device="cuda").to(dtype)
        keys, values = torch.randn(2, B + 2, Hkv, 1024, D, device="cuda").to(dtype)[:, :B, :, :1000].unbind(0)
        at = start + torch.arange(T, device="cuda").expand(B, T) + torch.arange(B, device="cuda")[:, None]
        y = torch.ops.axon.gpu_attention(q, keys, values, at, window)
        mask = causal_mask(at, torch.arange(1000, device="cuda")[None], window or None)
        exact = attend(*(each.double() for each in (q.transpose(1, 2), keys, values)), mask).transpose(1, 2)
        assert float((y.double() - exact).norm() / exact.norm()) < {torch.bfloat16: 1e-2, torch.float32: 1e-5}[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("B", "Hkv", "G", "D"), [(1, 8, 4, 128), (3, 2, 7, 64), (1, 4, 1, 256), (2, 2, 3, 16)])
@pytest.mark.parametrize("window", [0, 100])
def test_a_step_of_attention_is_the_readable_paths(
    B: int, Hkv: int, G: int, D: int, window: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    for at, S in ((0, 700), (5, 700), (650, 700), (4500, 5000)):
        heads = torch.randn(B, 1, (G + 2) * Hkv, D, device="cuda").to(dtype)
        keys, values = torch.randn(2, B + 1, Hkv, S, D, device="cuda").to(dtype)[:, :B].unbind(0)
        positions = at + torch.arange(B, device="cuda")[:, None]
        angles = torch.rand(B, 1, 1, D // 2, device="cuda").repeat(1, 1, 1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        turned = rotate(heads[:, :, : (G + 1) * Hkv].transpose(1, 2).double(), cos.double(), sin.double())
        k, v = keys.double(), values.double()
        rows = torch.arange(B, device="cuda")
        k[rows, :, positions[:, 0]] = turned[:, G * Hkv :, 0].to(dtype).double()
        v[rows, :, positions[:, 0]] = heads[:, 0, (G + 1) * Hkv :].double()
        mask = causal_mask(positions, torch.arange(S, device="cuda")[None], window or None)
        exact = attend(turned[:, : G * Hkv], k, v, mask).transpose(1, 2)
        y = torch.ops.axon.gpu_step(heads, None, None, 0.0, cos, sin, positions, keys, values, window)
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
        assert float((y.double() - exact).norm() / exact.norm()) < tolerance
        assert float((keys.double() - k).norm() / k.norm()) < tolerance
        assert torch.equal(values.double(), v)


def test_what_is_not_a_number_stays_so() -> None:
    x = torch.randn(1, 320, device="cuda").bfloat16()
    x[0, 77] = torch.nan
    weight = torch.randn(64, 320, device="cuda")
    for linear in (build("int8", quantise_int8(weight), None), build("int4", quantise_int4(weight), None)):
        for rows in (1, 2, 7, 20):
            assert linear(x.expand(rows, -1)).isnan().all()
            assert linear(x.nan_to_num(torch.inf).expand(rows, -1)).isnan().all()


def test_with_triton_our_own_kernels_are_used() -> None:
    pytest.importorskip("triton")
    for quantize, kind in ((None, "plain"), ("int8", "int8"), ("int4", "int4")):
        model = accelerate(tiny_model(CONFIG).cuda(), quantize)
        assert set(describe(model)["kernels"]) == {f"{kind}-triton"}
        assert {type(block).__name__ for block in model.layers} == {"GpuBlock"}


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_step_gives_the_same_numbers_every_time(quantize: str | None) -> None:
    """Kernels that begin before the one in front has ended must not read what it has yet to write."""
    config = ModelConfig(
        vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_layers=6, num_heads=16, num_kv_heads=4,
        head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    model = accelerate(tiny_model(config, scale=0.05).to("cuda", torch.bfloat16), quantize)
    for rows in (1, 2, 8, 16):
        runner = Runner(model, slots=rows, max_seq_len=400)
        runner.cache.k.normal_()  # so many positions that several programs share them
        runner.cache.v.normal_()
        first: list[torch.Tensor] = []
        for _ in range(20):
            found = [runner.decode([step] * rows, [300 + step] * rows, 400).clone() for step in range(40)]
            first = first or found
            assert all(torch.equal(one, other) for one, other in zip(first, found, strict=True))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("rows", [2, 16])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_steps_captured_give_the_tokens_of_the_same_model_uncaptured(
    quantize: str, rows: int, compile: bool
) -> None:
    model = accelerate(tiny_model(CONFIG).cuda(), quantize)
    runners = [Runner(model, slots=rows, max_seq_len=48, compile=compile and on, capture=on) for on in (False, True)]
    for step in range(12):
        tokens = [(7 * step + row) % CONFIG.vocab_size for row in range(rows)]
        exact, captured = (runner.decode(tokens, [step] * rows, 48).clone() for runner in runners)
        torch.testing.assert_close(captured, exact, rtol=1e-3, atol=1e-3)


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU that has fp8"
)


@hopper
@pytest.mark.parametrize("rows", [1, 2, 8, 64, 300])
def test_fp8_products_are_close_to_those_of_the_weights(rows: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(512, 2048, device="cuda"), torch.randn(rows, 2048, device="cuda").bfloat16()
    linear = Fp8Linear(*quantise_fp8(weight))
    exact = x.double() @ weight.double().T
    assert float((linear(x).double() - exact).norm() / exact.norm()) < 0.05
    # the tile a row falls into may be another with other rows; nothing else of them may matter
    torch.testing.assert_close(linear(x)[:1], linear(x[:1]), rtol=2e-2, atol=2e-2 * float(exact.std()))


@hopper
def test_an_fp8_model_runs_captured_and_compiled() -> None:
    model = accelerate(tiny_model(CONFIG).to("cuda", torch.bfloat16), "fp8")
    assert set(describe(model)["kernels"]) == {"fp8"}
    runners = [Runner(model, slots=2, max_seq_len=48, compile=on, capture=on) for on in (False, True)]
    for step in range(8):
        exact, captured = (runner.decode([step, 7 * step], [step, step], 48).clone() for runner in runners)
        assert captured.isfinite().all()
        assert float((captured - exact).norm() / exact.norm()) < 0.2
    assert runners[1].compiled
    assert runners[1].captured
