"""The fast variants against the readable path they replace."""

import copy

import pytest
import torch

from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
from axon_llm.errors import UsageError
from axon_llm.fast import accelerate, describe, ops
from axon_llm.fast.plan import Plan, choose
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


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
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
    if plan.kernel == "packed" and not ops.works("packed"):
        pytest.skip("oneDNN packs no bfloat16 weights on this processor")
    model = random_model(CONFIG, torch.bfloat16)
    exact = prefill_and_decode(copy.deepcopy(model).float(), torch.float32, rows)
    readable = (prefill_and_decode(model, torch.bfloat16, rows) - exact).norm()
    fast = (prefill_and_decode(accelerate(copy.deepcopy(model), plan=plan), torch.bfloat16, rows) - exact).norm()
    assert 0 < fast < 1.5 * readable


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
    prompt, positions = torch.arange(1, 8)[None], torch.arange(7)[None]
    caches = [KVCache(CONFIG, slots=1, max_seq_len=16) for _ in range(2)]
    step = torch.compile(lambda t, p: model(t, p, caches[1]), fullgraph=True)
    with torch.inference_mode():
        for cache in caches:
            model(prompt, positions, cache)
        for token, position in ((5, 7), (9, 8)):  # with something in the cache to look at
            one, at = torch.tensor([[token]]), torch.tensor([[position]])
            torch.testing.assert_close(step(one, at), model(one, at, caches[0]), rtol=1e-4, atol=1e-4)
