"""The fast variants against the readable path they replace."""

import copy

import pytest
import torch

from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
from axon_llm.errors import UsageError
from axon_llm.fast import accelerate, describe, linear, ops
from axon_llm.fast import attention as fast_attention
from axon_llm.fast.attention import attend_by_products, attend_widened
from axon_llm.fast.linear import PackedLinear
from axon_llm.fast.plan import WIDE_ROWS, Plan, attention_kernel, choose
from axon_llm.layers.attention import attend
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
QWEN = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=64,
    qkv_bias=True,
    qk_norm=True,
)
PLANS = [
    Plan("plain", False, "", "", 32),
    Plan("plain", True, "", "", 32),
    Plan("packed", False, "", "", 32),
    Plan("packed", True, "", "", 32),
]


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


@torch.inference_mode()
def prefill_and_decode(model: Transformer, dtype: torch.dtype, rows: int = 1) -> torch.Tensor:
    """Logits of a prefill and of two decode steps after it, one below the other."""
    cache = KVCache(model.config, slots=rows, max_seq_len=32, dtype=dtype)
    tokens = torch.randint(0, 96, (rows, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(9).expand(rows, 9)
    parts = [model(tokens[:, :7], positions[:, :7], cache)]
    parts += [model(tokens[:, t : t + 1], positions[:, t : t + 1], cache) for t in (7, 8)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["llama", "biases-and-qk-norm"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.kernel}-{'fused' if plan.fuse else 'separate'}")
def test_fast_linears_give_the_logits_of_the_readable_path(plan: Plan, config: ModelConfig) -> None:
    model = random_model(config)
    expected = prefill_and_decode(model, torch.float32)
    actual = prefill_and_decode(accelerate(copy.deepcopy(model), plan=plan), torch.float32)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.kernel}-{'fused' if plan.fuse else 'separate'}")
def test_in_bfloat16_the_fast_path_is_as_close_to_float32_as_the_readable_one(plan: Plan, rows: int) -> None:
    model = random_model(CONFIG, torch.bfloat16)
    exact = prefill_and_decode(copy.deepcopy(model).float(), torch.float32, rows)
    readable = (prefill_and_decode(model, torch.bfloat16, rows) - exact).norm()
    fast = (prefill_and_decode(accelerate(copy.deepcopy(model), plan=plan), torch.bfloat16, rows) - exact).norm()
    assert 0 < fast < 1.5 * readable


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 96).bfloat16()], ids=["no-bias", "bias"])
def test_many_rows_are_multiplied_in_float32_where_that_is_faster(
    bias: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator).bfloat16()
    x = torch.randn(2, WIDE_ROWS // 2, 64, generator=generator).bfloat16()
    monkeypatch.setattr(ops, "wide_products", lambda: True)
    wide = PackedLinear(weight, bias)
    exact = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert torch.equal(wide(x), exact.bfloat16())  # rounded once, at the end
    monkeypatch.setattr(ops, "wide_products", lambda: False)
    torch.testing.assert_close(PackedLinear(weight, bias)(x), wide(x), rtol=0.02, atol=0.05)
    monkeypatch.setattr(linear, "LARGEST_WIDE", 4)
    monkeypatch.setattr(ops, "wide_products", lambda: True)
    assert PackedLinear(weight).wide_from > WIDE_ROWS
    assert PackedLinear(weight.float()).wide_from > WIDE_ROWS


def test_the_plan_says_where_weights_are_converted() -> None:
    def prefill(dtype: str, quantize: str | None, wide: bool) -> str:
        return choose(device="cpu", dtype=dtype, rows=1, quantize=quantize, amx=False, wide=wide).prefill

    assert "float32" in prefill("bfloat16", None, True)
    assert "float32" in prefill("bfloat16", "int4", True)
    assert "float32" not in prefill("bfloat16", None, False) + prefill("bfloat16", "int4", False)
    assert prefill("float32", None, True) == prefill("float32", None, False)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("T", "S"), [(1, 9), (5, 40), (16, 16)])
def test_attention_by_other_ways_is_the_readable_attention(
    dtype: torch.dtype, close: float, T: int, S: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 6, T, 8, generator=generator).to(dtype)
    k, v = torch.randn(2, 3, 2, S, 8, generator=generator).to(dtype)
    last = torch.randint(0, S, (3, 1, T, 1), generator=generator)  # each slot sees another number of positions
    mask = torch.arange(S) <= last
    torch.testing.assert_close(attend_by_products(q, k, v, mask), attend(q, k, v, mask), rtol=close, atol=close)
    monkeypatch.setattr(fast_attention, "WIDE_TOKENS", 5)
    torch.testing.assert_close(attend_widened(q, k, v, mask), attend(q, k, v, mask), rtol=close, atol=close)
    if T >= 5:
        exact = attend(q.float(), k.float(), v.float(), mask)
        assert torch.equal(attend_widened(q, k, v, mask), exact.to(dtype))  # rounded once, at the end


def test_attention_goes_by_products_only_where_the_fused_kernel_has_no_matrix_unit() -> None:
    def chosen(**changes: object) -> str:
        usual = {"device": "cpu", "dtype": "bfloat16", "amx": False, "bf16_products": True, "wide": False}
        return attention_kernel(**{**usual, **changes})

    assert chosen() == "products"
    assert chosen(wide=True) == "widened"
    for change in ({"amx": True}, {"bf16_products": False}, {"dtype": "float32"}, {"device": "cuda"}):
        assert chosen(**change) == "fused"


def test_the_original_linears_are_gone_and_described() -> None:
    model = accelerate(random_model(CONFIG), plan=PLANS[3])
    described = describe(model)
    assert described["kernels"] == {"packed": 4 * CONFIG.num_layers + 1}
    assert described["fused"] is True
    assert described["plain_linears"] == 0
    per_layer = (4 + 2 * 2) * 32 * 64 + 4 * 32 * 64 + 3 * 64 * 160
    assert described["linear_bytes"] == 4 * (CONFIG.num_layers * per_layer + 96 * 64)


def test_a_model_that_was_not_accelerated_is_described_as_such() -> None:
    described = describe(random_model(CONFIG))
    assert described["kernels"] == {}
    assert described["plain_linears"] == 7 * CONFIG.num_layers + 1


def test_the_default_choice_works_whatever_this_machine_is() -> None:
    model = random_model(CONFIG)
    expected = prefill_and_decode(model, torch.float32)
    torch.testing.assert_close(prefill_and_decode(accelerate(model), torch.float32), expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_quantisation_is_refused() -> None:
    with pytest.raises(UsageError, match="int3"):
        choose(device="cpu", dtype="bfloat16", rows=1, quantize="int3", amx=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch imports its own deprecated parts when it compiles
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.kernel}-{'fused' if plan.fuse else 'separate'}")
def test_a_compiled_decode_step_is_one_graph_and_gives_the_same_logits(plan: Plan) -> None:
    model = accelerate(random_model(CONFIG), plan=plan)
    cache = KVCache(CONFIG, slots=1, max_seq_len=16)
    tokens, positions = torch.tensor([[5]]), torch.tensor([[0]])
    with torch.inference_mode():
        expected = model(tokens, positions, cache)
        step = torch.compile(lambda t, p: model(t, p, cache), fullgraph=True)
        torch.testing.assert_close(step(tokens, positions), expected, rtol=1e-4, atol=1e-4)
