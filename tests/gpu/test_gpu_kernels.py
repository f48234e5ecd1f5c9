"""The fast variants on a CUDA device against the readable path on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_model

from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
from axon_llm.engine.runner import Runner
from axon_llm.fast import accelerate, describe
from axon_llm.fast.fp8 import Fp8Linear, quantise_fp8
from axon_llm.fast.int4 import Int4WeightLinear
from axon_llm.fast.int8 import Int8WeightLinear
from axon_llm.fast.quantise import dequantise_int4, dequantise_int8, quantise_int4, quantise_int8
from axon_llm.model import Transformer

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
def logits(model: Transformer, device: str) -> torch.Tensor:
    cache = KVCache(model.config, slots=2, max_seq_len=32, device=device, dtype=model.embed_tokens.weight.dtype)
    tokens = torch.arange(12, device=device).view(2, 6)
    positions = torch.arange(6, device=device).expand(2, 6)
    first = model(tokens[:, :5], positions[:, :5], cache)
    return torch.cat((first, model(tokens[:, 5:], positions[:, 5:], cache)), dim=1).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_logits_stay_those_of_the_cpu(quantize: str | None, dtype: torch.dtype) -> None:
    model = tiny_model(CONFIG, scale=0.1)
    exact = logits(model, "cpu")
    fast = accelerate(copy.deepcopy(model).to("cuda", dtype), quantize)
    assert describe(fast)["fused"]
    error = float((logits(fast, "cuda") - exact).norm() / exact.norm())
    assert error < {None: 1e-3, "int8": 0.03, "int4": 0.3}[quantize] + (0.03 if dtype == torch.bfloat16 else 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 16, 33, 64, 65])
@pytest.mark.parametrize(("channels", "inputs"), [(96, 160), (2048, 8192), (8256, 2048)])
def test_products_with_quantised_weights_are_those_of_what_the_weights_stand_for(
    rows: int, channels: int, inputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(channels, inputs, device="cuda"), torch.randn(rows, inputs, device="cuda").to(dtype)
    for linear, stands_for in (
        (Int8WeightLinear(*(values := quantise_int8(weight))), dequantise_int8(*values)),
        (Int4WeightLinear(*(values4 := quantise_int4(weight))), dequantise_int4(*values4)),
    ):
        exact = x.double() @ stands_for.double().T
        error = float((linear(x).double() - exact).norm() / exact.norm())
        assert error < {torch.bfloat16: 1e-2, torch.float32: 1e-4}[dtype]


def test_with_triton_the_kernels_for_few_rows_are_used() -> None:
    pytest.importorskip("triton")
    for quantize in ("int8", "int4"):
        assert set(describe(accelerate(tiny_model(CONFIG).cuda(), quantize))["kernels"]) == {f"{quantize}-triton"}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_steps_captured_give_the_tokens_of_the_same_model_uncaptured(quantize: str, compile: bool) -> None:
    model = accelerate(tiny_model(CONFIG).cuda(), quantize)
    runners = [Runner(model, slots=2, max_seq_len=48, compile=compile and on, capture=on) for on in (False, True)]
    for step in range(12):
        exact, captured = (runner.decode([step, 7 * step], [step, step], 48).clone() for runner in runners)
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
