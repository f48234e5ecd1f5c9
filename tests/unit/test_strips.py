"""Our own CPU kernels against plain PyTorch, and what a neighbour may not change."""

import copy
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fast import CONFIG, QWEN, prefill_and_decode, random_model

from axon_llm.cache import KVCache
from axon_llm.config import ModelConfig
from axon_llm.engine.sampling import likeliest
from axon_llm.errors import UsageError
from axon_llm.fast import accelerate, describe, native, ops
from axon_llm.fast.attention import RopeAtOnce, attend_in_strips
from axon_llm.fast.blocks import StripBlocks, StripHead, StripTransformer
from axon_llm.fast.linear import PlainLinear
from axon_llm.fast.plan import Plan, attention_kernel, choose
from axon_llm.fast.quantise import dequantise_int4, dequantise_int8, quantise_int4, quantise_int8
from axon_llm.fast.strips import (
    Bf16Strips,
    Int4Strips,
    Int8Strips,
    StripEmbedding,
    StripLinear,
    lay_bf16,
    lay_int4,
    lay_int8,
    read_int4,
    read_int8,
)
from axon_llm.layers.attention import attend
from axon_llm.layers.rope import Rope
from axon_llm.model import Blocks, Transformer
from axon_llm.rope_config import RopeConfig

MISSING = sorted(set(native.NARROW) - native.processor_flags())
kernels = pytest.mark.skipif(bool(MISSING), reason=f"this processor has no {', '.join(MISSING)}")
FORMATS = ["bf16", "int8", "int4"]
# What rounding the activations costs: half a step of 1/127 of the row's, or the group's, largest.
CLOSE = {"bf16": 0.004, "int8": 0.02, "int4": 0.01}


@pytest.fixture(params=list(ops.Products), ids=lambda way: way.name.lower())
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ops.Products:
    """Each way to multiply that this processor has, as if it were the fastest."""
    chosen: ops.Products = request.param
    if MISSING:
        pytest.skip(f"this processor has no {', '.join(MISSING)}")
    if chosen == ops.Products.TILES and not native.tiles():
        pytest.skip("this processor has no matrix unit")
    monkeypatch.setattr(ops, "products", lambda: chosen)
    return chosen


def plan_of(kind: str) -> Plan:
    """One that multiplies by weights of a format, or as they are stored."""
    return Plan("plain" if kind == "stored" else f"{kind}-strips", True, "", "", 16)  # type: ignore[arg-type]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def linear_and_weight(kind: str, n: int, k: int, w: torch.Tensor | None = None) -> tuple[StripLinear, torch.Tensor]:
    """A linear layer in strips, and the weights it stands for."""
    assert native.load()
    w = (numbers(n, k) * 0.1).bfloat16() if w is None else w
    if kind == "int8":
        q, scale = quantise_int8(w)
        return Int8Strips(lay_int8(q), scale, k), dequantise_int8(q, scale)
    if kind == "int4":
        values = quantise_int4(w)
        return Int4Strips(lay_int4(*values), k, n), dequantise_int4(*values)
    return Bf16Strips([w]), w.float()


def test_what_was_laid_in_strips_can_be_read_back() -> None:
    w = numbers(50, 96)
    assert torch.equal(read_int8(lay_int8(quantise_int8(w)[0]), 50, 96), quantise_int8(w)[0])
    values = quantise_int4(w)
    for back, given in zip(read_int4(lay_int4(*values), 50, 96), values, strict=True):
        assert torch.equal(back, given)


def test_a_strip_holds_the_same_word_of_sixteen_channels_side_by_side() -> None:
    w = torch.arange(32 * 64, dtype=torch.float32).view(32, 64).bfloat16()
    strips = lay_bf16([w])
    assert strips.shape == (2, 32, 16)
    assert torch.equal(strips[1, 3, 5:6].view(torch.bfloat16), w[16 + 5, 6:8])


@kernels
@pytest.mark.parametrize("sizes", [(32, 16), (20, 30), (7,)])
@pytest.mark.parametrize("k", [64, 6, 200])
def test_kernels_lay_strips_as_pytorch_does(sizes: tuple[int, ...], k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.load()
    parts = [numbers(n, k, seed=n).bfloat16() for n in sizes]
    laid = lay_bf16(parts)
    monkeypatch.setattr(native, "loaded", lambda: False)
    assert torch.equal(laid, lay_bf16(parts))
    assert torch.equal(laid, lay_bf16([torch.cat(parts)]))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 16, 33, 64, 131, 600])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (96, 1056), (40, 32), (17, 96), (1072, 64)])
def test_the_kernels_compute_the_product(kind: str, rows: int, n: int, k: int) -> None:
    linear, weight = linear_and_weight(kind, n, k)
    x = numbers(rows, k, seed=1).bfloat16()
    exact = x.float() @ weight.T
    assert linear(x).shape == exact.shape
    assert relative(linear(x), exact) < CLOSE[kind]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("k", [1, 2, 31, 33, 63, 100])
def test_sizes_that_fill_no_block_are_multiplied_right(k: int) -> None:
    for kind in ("bf16", "int8"):
        linear, weight = linear_and_weight(kind, 33, k)
        x = numbers(5, k, seed=1).bfloat16()
        assert relative(linear(x), x.float() @ weight.T) < CLOSE[kind]


@pytest.mark.parametrize("kind", FORMATS)
def test_no_rows_have_no_results(kind: str, way: ops.Products) -> None:
    linear, weight = linear_and_weight(kind, 48, 128)
    none = torch.empty(2, 0, 128, dtype=torch.bfloat16)
    assert linear(none).shape == (2, 0, 48)
    assert torch.ops.axon.bf16_stored(none, weight.bfloat16(), way).shape == (2, 0, 48)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_float32_activations_stay_float32(kind: str, rows: int) -> None:
    linear, weight = linear_and_weight(kind, 48, 128)
    x = numbers(rows, 2, 128, seed=1)
    y = linear(x)
    assert y.dtype == torch.float32
    assert relative(y, x @ weight.T) < CLOSE[kind]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(96, 256), (80, 2112)], ids=["strips-by-twos", "an-odd-strip"])
def test_a_row_is_the_same_to_the_last_bit_whatever_its_batch_mates_are(
    n: int, k: int, kind: str, way: ops.Products
) -> None:
    # What is summed cancels, and what is left is how sums were rounded: another order would show.
    w, x = (numbers(count, k // 2, seed=seed).bfloat16() for count, seed in ((n, 0), (1100, 3)))
    linear, _ = linear_and_weight(kind, n, k, torch.cat((w, w), dim=-1))
    x = torch.cat((x, -x), dim=-1)
    if kind == "int4" and way == ops.Products.TILES:  # more are not rounded
        x = x[:63]
    alone = linear(x[:1])
    assert kind == "int8" or k < 1000 or alone.any()
    for others in (x[1:], x[1:64], x[1:65], x[1:60], x[1:18], x[1:4] * 1000, x[1:3], x[1:8] * 0):
        for place in (0, len(others)):
            batch = torch.cat((others[:place], x[:1], others[place:]))
            assert torch.equal(linear(batch)[place : place + 1], alone)


@kernels
def test_int8_by_the_matrix_unit_is_int8_by_the_vector_unit_to_the_last_bit() -> None:
    if not native.tiles():
        pytest.skip("this processor has no matrix unit")
    linear, _ = linear_and_weight("int8", 100, 200)
    for rows in (1, 5, 40, 600):
        x = numbers(rows, 200).bfloat16()
        both = [
            torch.ops.axon.int8_strips(x, linear.strips, linear.scale, 100, way)
            for way in (ops.Products.PAIRS, ops.Products.TILES)
        ]
        assert torch.equal(*both)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_a_number_is_not_rounded_to_one(kind: str, rows: int, broken: float) -> None:
    linear, _ = linear_and_weight(kind, 32, 128)
    x = numbers(rows, 128).bfloat16()
    clean = linear(x)
    x[2, 17] = broken
    y = linear(x)
    others = [row for row in range(rows) if row != 2]
    assert not y[2].isfinite().any()
    assert torch.equal(y[others], clean[others])


@kernels
def test_a_bias_is_added() -> None:
    assert native.load()
    w, bias = numbers(32, 64).bfloat16(), numbers(32, seed=2).bfloat16()
    x = numbers(4, 64, seed=1).bfloat16()
    torch.testing.assert_close(Bf16Strips([w], bias)(x), Bf16Strips([w])(x) + bias)


@pytest.mark.parametrize(
    ("B", "Hq", "Hkv", "T", "S", "D"),
    [
        (1, 4, 2, 1, 9, 8),  # less than a piece
        (3, 6, 2, 5, 40, 8),
        (2, 8, 8, 16, 16, 64),  # a KV head for each query head
        (2, 8, 1, 100, 200, 64),  # one KV head for all
        (4, 9, 3, 1, 333, 64),
        (1, 2, 2, 70, 140, 33),  # an odd head size
        (1, 4, 2, 3, 65, 128),
        (1, 8, 2, 1, 192, 64),  # four rows for each KV head, and whole pieces
        (1, 14, 2, 1, 192, 64),
        (2, 8, 1, 1, 192, 96),
        (1, 9, 1, 1, 192, 32),
    ],
)
@pytest.mark.parametrize("window", [None, 7, 64])
def test_attention_is_the_readable_attention(
    B: int, Hq: int, Hkv: int, T: int, S: int, D: int, window: int | None, way: ops.Products
) -> None:
    assert native.load()
    q = numbers(B, Hq, T, D).bfloat16()
    k, v = (numbers(B, Hkv, S + 7, D, seed=seed).bfloat16()[:, :, :S] for seed in (1, 2))  # as in a cache's view
    ends = torch.randint(T - 1, S, (B,), generator=torch.Generator().manual_seed(3))  # each slot is elsewhere
    positions = ends[:, None] - T + 1 + torch.arange(T)  # [B, T]
    distance = positions[:, None, :, None] - torch.arange(S)
    mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    exact = attend(q.float(), k.float(), v.float(), mask)
    assert relative(attend_in_strips(way)(q, k, v, mask), exact) < 0.005


@pytest.mark.parametrize(
    ("Hq", "D"),
    [(8, 64), (16, 64), (10, 64), (6, 128), (8, 128), (12, 128), (16, 128), (14, 96), (16, 96), (2, 32), (8, 40)],
)
def test_a_token_sees_the_same_to_the_last_bit_whatever_looks_with_it(Hq: int, D: int, way: ops.Products) -> None:
    q, (k, v) = numbers(1, Hq, 30, D).bfloat16(), numbers(2, 1, 2, 1500, D, seed=1).bfloat16()
    mask = torch.ones(30, 1500, dtype=torch.bool).tril(1450)[None, None]
    all_of_them = attend_in_strips(way)(q, k, v, mask)
    for t in (0, 17, 29):
        alone = attend_in_strips(way)(q[:, :, t : t + 1], k, v, mask[:, :, t : t + 1])
        assert torch.equal(alone, all_of_them[:, :, t : t + 1])


def test_attention_takes_keys_and_values_that_lie_apart(way: ops.Products) -> None:
    both = numbers(1, 2, 192, 160).bfloat16()
    k, v, q = both[..., :64], both[..., 64:128], numbers(1, 8, 1, 64, seed=1).bfloat16()
    mask = torch.ones(1, 1, 1, 192, dtype=torch.bool)
    assert torch.equal(
        attend_in_strips(way)(q, k, v, mask), attend_in_strips(way)(q, k.contiguous(), v.contiguous(), mask)
    )


def test_attention_does_not_depend_on_what_the_mask_hides(way: ops.Products) -> None:
    q, k, v = (numbers(1, 4, T, 64, seed=T).bfloat16() for T in (2, 300, 301))
    v = v[:, :, :300]
    mask = (torch.arange(300) < 130).expand(1, 1, 2, 300)
    expected = attend_in_strips(way)(q, k, v, mask)
    k[:, :, 130:], v[:, :, 130:] = 1e4, -1e4
    assert torch.equal(attend_in_strips(way)(q, k, v, mask), expected)


@pytest.mark.parametrize("factor", [2.0**10, 2.0**34])
def test_large_scores_do_not_overflow(factor: float, way: ops.Products) -> None:
    q, k, v = (numbers(1, 2, T, 64, seed=T).bfloat16() for T in (1, 200, 201))
    v, mask = v[:, :, :200], torch.ones(1, 1, 1, 200, dtype=torch.bool)
    exact = attend(q.float() * factor, k.float(), v.float(), mask)
    assert relative(attend_in_strips(way)(q * factor, k, v, mask), exact) < 0.01


@kernels
@pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["llama", "biases-and-qk-norm"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_in_strips_is_as_close_to_float32_as_the_readable_one(config: object, rows: int) -> None:
    model = random_model(config, torch.bfloat16)  # type: ignore[arg-type]
    exact = prefill_and_decode(copy.deepcopy(model).float(), torch.float32, rows)
    readable = (prefill_and_decode(model, torch.bfloat16, rows) - exact).norm()
    fast = accelerate(copy.deepcopy(model), plan=Plan("bf16-strips", True, "", "", 16))
    assert describe(fast)["kernels"] == {"bf16-strips": 4 * CONFIG.num_layers + 1}
    assert 0 < (prefill_and_decode(fast, torch.bfloat16, rows) - exact).norm() < 1.5 * readable


@kernels
@pytest.mark.parametrize("k", [64, 30, 33])
def test_an_embedding_that_is_the_output_layer_is_kept_once_and_gives_its_rows(k: int) -> None:
    assert native.load()
    w = numbers(50, k).bfloat16()
    output = Bf16Strips([w])
    embedding = StripEmbedding(output)
    tokens = torch.tensor([[0, 49, 17], [16, 15, 3]])
    assert torch.equal(embedding(tokens), w[tokens])
    assert embedding.strips.data_ptr() == output.strips.data_ptr()
    assert embedding.weight.dtype == torch.bfloat16


@kernels
def test_a_tied_model_in_strips_holds_its_largest_matrix_once() -> None:
    tied, untied = (
        accelerate(random_model(config, torch.bfloat16), plan=Plan("bf16-strips", True, "", "", 16))
        for config in (CONFIG, QWEN)
    )
    assert CONFIG.tie_word_embeddings
    assert not QWEN.tie_word_embeddings
    assert isinstance(tied.embed_tokens, StripEmbedding)
    assert tied.embed_tokens.strips.data_ptr() == tied.lm_head.linear.strips.data_ptr()
    assert isinstance(untied.embed_tokens, torch.nn.Embedding)


@kernels
def test_an_embedding_that_was_untied_by_hand_stays_one() -> None:
    assert native.load()
    model = random_model(CONFIG, torch.bfloat16)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    fast = accelerate(model, plan=Plan("bf16-strips", True, "", "", 16))
    assert isinstance(fast.embed_tokens, torch.nn.Embedding)


@kernels
def test_weights_as_stored_give_the_same_products_and_are_not_copied() -> None:
    assert native.load()
    model = random_model(QWEN, torch.bfloat16)
    exact = prefill_and_decode(copy.deepcopy(model).float(), torch.float32)
    readable = (prefill_and_decode(model, torch.bfloat16) - exact).norm()
    places = {parameter.data_ptr() for parameter in model.parameters() if parameter.dim() == 2}
    fast = accelerate(model, once=True, plan=None)
    assert describe(fast)["kernels"] == {"plain": 7 * QWEN.num_layers + 1}
    assert {p.data_ptr() for p in fast.parameters() if p.dim() == 2} == places
    assert fast.layers[0].self_attn.skips_hidden
    assert 0 < (prefill_and_decode(fast, torch.bfloat16) - exact).norm() < 1.5 * readable


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 9, 50, 600])
@pytest.mark.parametrize(("n", "k"), [(33, 1), (64, 100), (40, 2048), (16, 129)])
def test_rows_times_weights_as_stored(n: int, k: int, rows: int, way: ops.Products) -> None:
    w, x = numbers(n, k).bfloat16(), numbers(2, rows, k, seed=1).bfloat16()
    exact = x.float() @ w.float().T
    assert relative(torch.ops.axon.bf16_stored(x, w, way), exact) < 0.004


@kernels
def test_the_reader_reads_every_word() -> None:
    assert native.load()
    words = torch.randint(-(2**31), 2**31 - 1, (128 * 1000,), dtype=torch.int32)
    total = int(words.sum()) % 2**32
    assert int(torch.ops.axon.read_words(words)) % 2**32 == total
    words[77_777] += 1
    assert int(torch.ops.axon.read_words(words)) % 2**32 == (total + 1) % 2**32


@kernels
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("vocab_size", [1, 15, 16, 1024, 1025, 5000])
def test_the_likeliest_token_is_the_one_pytorch_finds(rows: int, vocab_size: int) -> None:
    assert native.load()
    scores = numbers(rows, vocab_size) - 3
    ties = (scores * 2).round()
    apart = numbers(rows, vocab_size + 8)[:, :vocab_size]
    for given in (
        scores,
        ties,
        apart,
        apart.t().contiguous().t(),
        scores[:, :1].expand(rows, vocab_size),
        -scores.exp() * 1e30,
    ):
        assert_same_choice(given)
    for value in (math.nan, math.inf, -math.inf):
        for place in {0, vocab_size // 2, vocab_size - 1}:
            broken = scores.clone()
            broken[-1, place] = value
            assert_same_choice(broken)
    assert_same_choice(torch.full((rows, vocab_size), -math.inf))


def assert_same_choice(scores: torch.Tensor) -> None:
    """Our kernel finds the same as plain PyTorch."""
    for ours, plain in zip(StripTransformer.likeliest(scores), likeliest(scores), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)


@kernels
def test_what_the_kernels_cannot_take_is_refused() -> None:
    assert native.load()
    output = Bf16Strips([numbers(32, 64).bfloat16()])
    with pytest.raises(RuntimeError, match="no activations of this type"):
        output(numbers(2, 64))
    with pytest.raises(RuntimeError, match="no weights for 96 inputs"):
        output(numbers(2, 96).bfloat16())
    for token in (-1, 32):
        with pytest.raises(RuntimeError, match="there is no row"):
            StripEmbedding(output)(torch.tensor([[token]]))
    q, mask = numbers(1, 2, 1, 64), torch.ones(1, 1, 1, 9, dtype=torch.bool)
    k = numbers(1, 2, 9, 64).bfloat16()
    with pytest.raises(RuntimeError, match="bfloat16 heads"):
        torch.ops.axon.bf16_attention(q, k, k, mask, 0)
    for scores, message in ((k[0, 0], "scores"), (torch.zeros(2, 3, 4), "scores"), (torch.zeros(2, 0), "nothing")):
        with pytest.raises(RuntimeError, match=message):
            StripTransformer.likeliest(scores)


def test_a_score_that_is_not_a_number_shows(way: ops.Products) -> None:
    q, k, v = (numbers(1, 2, T, 64, seed=T).bfloat16() for T in (1, 70, 71))
    k[0, 0, 3, 5] = math.nan
    y = attend_in_strips(way)(q, k, v[:, :, :70], torch.ones(1, 1, 1, 70, dtype=torch.bool))
    assert y[0, 0].isnan().all()
    assert y[0, 1].isfinite().all()


@kernels
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch imports its own deprecated parts when it compiles
def test_a_compiled_step_in_strips_is_one_graph_and_gives_the_same_logits() -> None:
    from axon_llm.cache import KVCache

    assert native.load()
    model = accelerate(random_model(CONFIG, torch.bfloat16), plan=Plan("bf16-strips", True, "", "", 16))
    caches = [KVCache(CONFIG, slots=1, max_seq_len=16, dtype=torch.bfloat16) for _ in range(2)]
    prompt, positions = torch.arange(1, 8)[None], torch.arange(7)[None]
    step = torch.compile(lambda t, p: model(t, p, caches[1]), fullgraph=True)
    with torch.inference_mode():
        for cache in caches:
            model(prompt, positions, cache)
        for token, position in ((5, 7), (9, 8)):  # with something in the cache to look at
            one, at = torch.tensor([[token]]), torch.tensor([[position]])
            assert relative(step(one, at), model(one, at, caches[0])) < 0.02


def test_the_plan_takes_strips_where_there_are_kernels() -> None:
    def kernel(dtype: str, quantize: str | None, **changes: bool) -> str:
        given = {"amx": False, "strips": True, **changes}
        return choose(device="cpu", dtype=dtype, rows=1, quantize=quantize, **given).kernel  # type: ignore[arg-type]

    assert kernel("bfloat16", None) == kernel("bfloat16", None, amx=True) == "bf16-strips"
    assert kernel("bfloat16", "int8") == kernel("float32", "int8") == "int8-strips"
    assert kernel("bfloat16", "int4") == "int4-strips"
    assert kernel("bfloat16", None, once=True) == "plain"
    assert kernel("float32", None) == "packed"
    assert kernel("float16", "int8") == "int8"
    assert kernel("bfloat16", None, strips=False) == "packed"
    assert kernel("bfloat16", None, strips=False, amx=True) == "plain"


@pytest.mark.parametrize(
    ("products", "quantize", "said"),
    [("float32", None, "float32"), ("tiles", None, "matrix unit"), ("tiles", "int8", "matrix unit")],
)
def test_the_plan_says_how_strips_are_multiplied(products: str, quantize: str | None, said: str) -> None:
    plan = choose(device="cpu", dtype="bfloat16", rows=1, quantize=quantize, amx=False, strips=True, products=products)
    assert said in plan.decode
    assert said in plan.prefill


def test_attention_is_ours_only_in_bfloat16_on_a_cpu_with_kernels() -> None:
    def chosen(**changes: object) -> str:
        usual = {"device": "cpu", "dtype": "bfloat16", "strips": True}
        return attention_kernel(**{**usual, **changes})  # type: ignore[arg-type]

    assert chosen() == "strips"
    for change in ({"strips": False}, {"dtype": "float32"}, {"device": "cuda"}):
        assert chosen(**change) == "fused"


@pytest.mark.parametrize("kind", [*FORMATS, "stored"])
@pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["llama", "biases-and-qk-norm"])
@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_in_one_call_give_what_the_products_one_by_one_do(
    kind: str, config: ModelConfig, rows: int, way: ops.Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fast() -> Transformer:
        return accelerate(random_model(config, torch.bfloat16), plan=plan_of(kind))

    together = fast()
    monkeypatch.setattr(StripBlocks, "where_they_suit", lambda *_: None)
    one_by_one = fast()
    assert isinstance(together.layers, StripBlocks)
    assert not isinstance(one_by_one.layers, StripBlocks)
    logits = [prefill_and_decode(model, torch.bfloat16, rows) for model in (together, one_by_one)]
    assert 0 < relative(*logits) < (0.02 if kind in ("bf16", "stored") else 0.05)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_token_comes_out_of_all_blocks_the_same_whatever_comes_after_it(kind: str, way: ops.Products) -> None:
    plan = Plan(f"{kind}-strips", True, "", "", 16)  # type: ignore[arg-type]
    model = accelerate(random_model(CONFIG, torch.bfloat16), plan=plan)
    assert isinstance(model.layers, StripBlocks)

    def first(tokens: int) -> torch.Tensor:
        positions = torch.arange(tokens)[None]
        cache = KVCache(CONFIG, slots=1, max_seq_len=640, dtype=torch.bfloat16)
        return model((3 * positions + 5) % CONFIG.vocab_size, positions, cache, logits_at=torch.tensor([0]))

    alone = first(1)
    assert alone.any()
    for tokens in (3, 60) if kind == "int4" else (3, 60, 70, 600):  # many rows of int4 are multiplied in bfloat16
        assert torch.equal(first(tokens), alone), tokens


@kernels
@pytest.mark.parametrize("tokens", [1, 5])
def test_keys_and_values_are_remembered_as_the_cache_itself_does(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []
    positions = torch.stack([torch.arange(tokens), torch.arange(7, 7 + tokens)])  # [B, T]
    for together in (True, False):
        if not together:
            monkeypatch.setattr(StripBlocks, "where_they_suit", lambda *_: None)
        model = accelerate(random_model(CONFIG, torch.bfloat16))
        caches.append(KVCache(CONFIG, slots=3, max_seq_len=16, dtype=torch.bfloat16))
        model(positions % CONFIG.vocab_size, positions, caches[-1].view(slots=2, length=12))
    for one, other in ((caches[0].k, caches[1].k), (caches[0].v, caches[1].v)):
        assert one.any()
        assert torch.equal(one != 0, other != 0)
        assert torch.equal(one[0], other[0])  # the first layer's are the same product; later ones follow attention
        assert relative(one.float(), other.float()) < 0.02


@kernels
@pytest.mark.parametrize("window", [3, 64, 70])
def test_a_block_sees_as_far_as_its_window(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def last(config: ModelConfig) -> torch.Tensor:
        model = accelerate(random_model(config, torch.bfloat16))
        cache = KVCache(config, slots=2, max_seq_len=200, dtype=torch.bfloat16)
        positions = torch.stack([torch.arange(150), torch.arange(20, 170)])
        model((7 * positions) % config.vocab_size, positions, cache)
        return model(torch.tensor([[1], [2]]), positions[:, -1:] + 1, cache)

    windows = (window,) + (None,) * (CONFIG.num_layers - 1)
    narrow, wide = last(replace(CONFIG, layer_windows=windows)), last(CONFIG)
    monkeypatch.setattr(StripBlocks, "where_they_suit", lambda *_: None)
    masked = last(replace(CONFIG, layer_windows=windows))
    assert relative(narrow, masked) < 0.02
    assert relative(wide, masked) > 0.02


@kernels
@pytest.mark.parametrize("kind", [*FORMATS, "stored"])
@pytest.mark.parametrize("rows", [1, 3])
def test_scores_are_those_of_norm_and_output_layer_but_not_rounded(kind: str, rows: int, way: ops.Products) -> None:
    config = replace(QWEN, vocab_size=QWEN.vocab_size - 5)  # untied; not whole strips
    head = accelerate(random_model(config, torch.bfloat16), plan=plan_of(kind)).lm_head
    assert isinstance(head, StripHead)
    x = torch.randn(rows, 1, config.hidden_size).bfloat16()
    scores, rounded = head(x), head.linear(head.norm(x))
    assert scores.shape == (rows, 1, config.vocab_size)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    assert relative(rounded, scores) < 0.01


@kernels
def test_blocks_that_differ_in_more_than_weights_are_not_one_call() -> None:
    def blocks() -> Blocks:
        return Blocks(accelerate(random_model(CONFIG, torch.bfloat16)).layers, CONFIG.layer_windows)

    assert StripBlocks.where_they_suit(blocks()) is not None
    other_norm, biased, other_format, half_a_strip = blocks(), blocks(), blocks(), blocks()
    other_norm[1].input_layernorm.eps *= 2
    biased[0].mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(CONFIG.hidden_size))
    other_format[1].mlp.down_proj.strip_kind = 1
    half_a_strip[0].mlp.down_proj.in_features -= 8
    stored = Blocks(accelerate(random_model(CONFIG, torch.bfloat16), once=True).layers, CONFIG.layer_windows)
    assert StripBlocks.where_they_suit(stored) is not None
    stored[0].self_attn.qkv_proj.linears[0].out_features -= 8
    stacked = Blocks(accelerate(random_model(CONFIG, torch.bfloat16), once=True).layers, CONFIG.layer_windows)
    stacked[0].mlp.gate_up_proj = PlainLinear(torch.zeros(2 * CONFIG.intermediate_size, CONFIG.hidden_size).bfloat16())
    for each in (other_norm, biased, other_format, half_a_strip, stored, stacked):
        assert StripBlocks.where_they_suit(each) is None


@kernels
@pytest.mark.parametrize("once", [False, True])
def test_blocks_that_were_copied_or_converted_compute_with_what_they_have_now(once: bool) -> None:
    model = accelerate(random_model(CONFIG, torch.bfloat16), once=once)
    expected = prefill_and_decode(model, torch.bfloat16)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(prefill_and_decode(twin, torch.bfloat16), expected)
    twin._apply(lambda tensor: tensor * 0 if tensor.is_floating_point() else tensor)
    assert not prefill_and_decode(twin, torch.bfloat16).any()


@kernels
@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (6, [], "scales are wanted for int8"),
        (6, torch.ones(1), "float32 scales for whole strips"),
        (7, torch.ones(1).bfloat16(), "bfloat16 numbers are wanted"),
        (4, torch.ones(CONFIG.hidden_size), "bfloat16 numbers are wanted"),
        (10, 4, "no kind of weights"),
    ],
    ids=["no-scales", "short-scales", "short-biases", "float32-norms", "unknown-kind"],
)
def test_weights_of_another_size_or_type_are_refused(place: int, wrong: object, message: str) -> None:
    plan = Plan("int8-strips", True, "", "", 16)
    model = accelerate(random_model(QWEN, torch.bfloat16), plan=plan)
    given = list(model.layers.given)
    given[place] = [wrong] * len(given[place]) if isinstance(wrong, torch.Tensor) else wrong
    model.layers.given = tuple(given)
    model._gather()
    cache = KVCache(QWEN, slots=1, max_seq_len=8, dtype=torch.bfloat16)
    for forward in (StripTransformer.forward, Transformer.forward):
        with pytest.raises(RuntimeError, match=message):
            forward(model, torch.tensor([[1]]), torch.tensor([[0]]), cache)


@kernels
@pytest.mark.parametrize("wrong", ["type", "inputs", "outputs", "half a strip", "gate"])
def test_weights_as_stored_of_another_size_or_type_are_refused(wrong: str) -> None:
    model = accelerate(random_model(QWEN, torch.bfloat16), plan=plan_of("stored"))
    given = list(model.layers.given)
    weights = list(given[5])
    query = weights[0]
    weights[0] = {
        "type": query.float(),
        "inputs": query[:, 1:].contiguous(),
        "outputs": query[16:],
        "half a strip": query[8:],
        "gate": query,
    }[wrong]
    if wrong == "gate":  # as many rows in all
        gate, up = weights[4:6]
        weights[4:6] = torch.cat((gate, up[:16])), up[16:].contiguous()
    given[5] = weights
    model.layers.given = tuple(given)
    model._gather()
    cache = KVCache(QWEN, slots=1, max_seq_len=8, dtype=torch.bfloat16)
    for forward in (StripTransformer.forward, Transformer.forward):
        with pytest.raises(
            RuntimeError, match=r"bfloat16 rows as long as|a row for each channel|as many rows of a gate"
        ):
            forward(model, torch.tensor([[1]]), torch.tensor([[0]]), cache)


@pytest.mark.parametrize("kind", [*FORMATS, "stored"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("slots", "tokens"), [(1, 1), (2, 1), (3, 1), (2, 5), (1, 70)])
def test_a_step_in_one_call_gives_what_its_parts_do(
    kind: str, tied: bool, slots: int, tokens: int, way: ops.Products
) -> None:
    config = replace(CONFIG, tie_word_embeddings=tied)
    model = accelerate(random_model(config, torch.bfloat16), plan=plan_of(kind))
    assert isinstance(model, StripTransformer)
    ids = torch.randint(0, config.vocab_size, (slots, tokens))
    positions = torch.stack([torch.arange(3 * slot, 3 * slot + tokens) for slot in range(slots)])
    caches = [KVCache(config, slots=slots, max_seq_len=80, dtype=torch.bfloat16) for _ in range(2)]
    together, by_parts = model(ids, positions, caches[0]), Transformer.forward(model, ids, positions, caches[1])
    assert together.dtype == torch.float32
    assert torch.equal(together, by_parts)
    assert torch.equal(caches[0].k, caches[1].k)
    only = torch.full((slots,), tokens - 1)
    last = [forward(model, ids, positions, caches[0], only) for forward in (type(model).forward, Transformer.forward)]
    assert torch.equal(*last)


@kernels
def test_a_step_of_unlike_norms_or_of_tokens_that_do_not_exist_is_refused() -> None:
    model = accelerate(random_model(CONFIG, torch.bfloat16))
    assert StripTransformer.where_it_suits(model) is not None
    cache = KVCache(CONFIG, slots=1, max_seq_len=8, dtype=torch.bfloat16)
    for token in (-1, CONFIG.vocab_size + 16):
        with pytest.raises(RuntimeError, match=f"no (row|token) {token}"):
            model(torch.tensor([[token]]), torch.tensor([[0]]), cache)
    model.lm_head.norm.eps *= 2
    assert StripTransformer.where_it_suits(model) is None


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# A gate of more channels than are kept before they become results.
WIDE = replace(CONFIG, intermediate_size=1120)


@kernels
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["narrow", "wide"])
def test_a_step_is_the_same_whatever_the_number_of_threads(
    kind: str, tokens: int, config: ModelConfig, threads: Callable[[int], None]
) -> None:
    model = accelerate(random_model(config, torch.bfloat16), plan=plan_of(kind))
    ids, positions = torch.randint(0, config.vocab_size, (1, tokens)), torch.arange(tokens)[None]
    scores = []
    for count in (1, 2, 3, 16):
        threads(count)
        scores.append(model(ids, positions, KVCache(config, slots=1, max_seq_len=80, dtype=torch.bfloat16)))
    assert all(torch.equal(scores[0], others) for others in scores[1:])


@kernels
def test_a_step_is_the_same_beside_busy_neighbours(threads: Callable[[int], None]) -> None:
    model = accelerate(random_model(CONFIG, torch.bfloat16))
    ids, positions = torch.randint(0, CONFIG.vocab_size, (1, 3)), torch.arange(3)[None]

    def scores() -> torch.Tensor:
        return model(ids, positions, KVCache(CONFIG, slots=1, max_seq_len=80, dtype=torch.bfloat16))

    expected = scores()
    threads(4)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        assert all(
            torch.equal(scores(), expected) for _ in range(50)
        )  # threads wait asleep for each other now and then
    finally:
        for process in busy:
            process.kill()
            process.wait()


@kernels
def test_a_failure_on_any_thread_is_raised_and_the_next_step_is_right(threads: Callable[[int], None]) -> None:
    config = replace(CONFIG, tie_word_embeddings=True)  # whose embeddings threads gather together
    model = accelerate(random_model(config, torch.bfloat16))
    positions = torch.arange(64)[None]
    right = torch.randint(0, config.vocab_size, (1, 64))

    def scores(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, positions, KVCache(config, slots=1, max_seq_len=64, dtype=torch.bfloat16))

    expected = scores(right)
    threads(3)
    for at in (slice(0, 1), slice(31, 32), slice(63, 64), slice(None)):  # one of them; whichever thread comes first
        wrong = right.clone()
        wrong[0, at] = -7
        with pytest.raises(RuntimeError, match="no row -7"):
            scores(wrong)
        assert torch.equal(scores(right), expected)


@kernels
def test_a_step_ends_with_fewer_threads_than_were_asked_for() -> None:
    """OpenMP may give fewer: a part is then larger than one, and there are fewer to wait for."""
    program = """
import torch
from test_strips import CONFIG, KVCache, accelerate, random_model
model = accelerate(random_model(CONFIG, torch.bfloat16))
ids, positions = torch.arange(70)[None] % CONFIG.vocab_size, torch.arange(70)[None]
scores = []
for count in (1, 2, 4, 5, 16):
    torch.set_num_threads(count)
    scores.append(model(ids, positions, KVCache(CONFIG, slots=1, max_seq_len=80, dtype=torch.bfloat16)))
assert all(torch.equal(scores[0], others) for others in scores[1:])
"""
    folders = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[2])))
    environment = {**os.environ, "PYTHONPATH": folders, "OMP_THREAD_LIMIT": "3"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


@kernels
def test_steps_of_several_callers_at_once_do_not_disturb_each_other(threads: Callable[[int], None]) -> None:
    threads(3)
    model = accelerate(random_model(CONFIG, torch.bfloat16))
    ids = torch.arange(4)[:, None] + torch.arange(9)

    def scores(row: int) -> torch.Tensor:
        cache = KVCache(CONFIG, slots=1, max_seq_len=16, dtype=torch.bfloat16)
        return model(ids[row : row + 1], torch.arange(9)[None], cache)

    expected = [scores(row) for row in range(4)]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(20):
            found = callers.map(scores, range(4))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@kernels
@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=10000.0),
        RopeConfig(
            kind="yarn", theta=10000.0, factor=4.0, original_max_position_embeddings=4096, attention_factor=1.14
        ),
    ],
    ids=["plain", "scaled"],
)
def test_angles_in_one_call_are_those_of_the_readable_layer(rope: RopeConfig) -> None:
    plain = Rope(replace(CONFIG, rope=rope))
    positions = torch.stack([torch.arange(3000), torch.randint(0, 131072, (3000,))])
    for dtype in (torch.bfloat16, torch.float32):
        for one, other in zip(RopeAtOnce(plain)(positions, dtype), plain(positions, dtype), strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype == dtype
            assert (one.view(torch.int16) != other.view(torch.int16)).float().mean() < 1e-4
            assert (one - other).abs().max() < 0.01


@kernels
def test_nothing_is_remembered_beyond_the_cache() -> None:
    model = accelerate(random_model(CONFIG, torch.bfloat16))
    cache = KVCache(CONFIG, slots=1, max_seq_len=8, dtype=torch.bfloat16)
    for position in (-1, 8):
        with pytest.raises(RuntimeError, match=f"no position {position}"):
            model(torch.tensor([[1]]), torch.tensor([[position]]), cache)
    assert not cache.k.any()


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_take_a_cache_of_another_type_and_none(dtype: torch.dtype) -> None:
    model = accelerate(random_model(CONFIG, torch.bfloat16))
    assert isinstance(model.layers, StripBlocks)
    tokens = torch.arange(9)[None] % CONFIG.vocab_size
    positions = torch.arange(9)[None]
    cache = KVCache(CONFIG, slots=1, max_seq_len=16, dtype=dtype)
    cached = torch.cat([model(tokens[:, t : t + 1], positions[:, t : t + 1], cache) for t in range(9)], dim=1)
    assert relative(model(tokens, positions), cached) < 0.02


def run_builder(cache: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "axon_llm.fast.native"],
        env={"PATH": "/usr/bin:/bin", "AXON_KERNEL_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@kernels
@pytest.mark.slow
def test_kernels_are_compiled_once_and_kept(tmp_path: Path) -> None:
    first, second = run_builder(tmp_path), run_builder(tmp_path)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "compiling kernels" in first.stderr
    assert second.stderr == ""
    assert first.stdout == second.stdout
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".lock", ".so"]


@kernels
@pytest.mark.slow
def test_kernels_that_were_cut_off_are_compiled_again(tmp_path: Path) -> None:
    assert run_builder(tmp_path).returncode == 0
    [library] = tmp_path.glob("*.so")
    whole = library.read_bytes()
    for size in (0, 4096, len(whole) - 1):
        library.write_bytes(whole[:size])
        assert not native._is_whole(library)
    assert "compiling kernels" in run_builder(tmp_path).stderr
    assert library.stat().st_size == len(whole)


@kernels
def test_kernels_are_not_kept_where_anybody_could_change_them(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "axon").mkdir(parents=True)
    (home / "axon").chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-m", "axon_llm.fast.native"],
        env={"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "anybody may change it" in done.stderr


@kernels
@pytest.mark.parametrize(
    ("compiler", "said"),
    [("/bin/false", "/bin/false failed"), ("/no/such/compiler", "No such file"), ("g++ '", "CXX is no command")],
)
def test_without_a_working_compiler_it_says_so_and_goes_on(
    compiler: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AXON_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    native.load.cache_clear()
    try:
        assert not native.load()
        model = accelerate(random_model(CONFIG, torch.bfloat16), "int8")
    finally:
        native.load.cache_clear()
    assert not any("strips" in kind for kind in describe(model)["kernels"])
    err = capsys.readouterr().err
    assert err.count("PyTorch's own kernels are used") == 1
    assert said in err


def compiler_that_copies(folder: Path, refuses: str = "") -> str:
    """A program that gives the library there is for whatever it is to compile, but knows no flags that begin so."""
    path = folder / "compiler"
    path.write_text(
        "#!/bin/sh\n"
        f'for word; do case "$word" in {refuses or "-none"}*) echo "c++: error: unrecognized command-line option '
        """'$word'; never heard of it" >&2; exit 1;; esac\n"""
        f'[ "$before" = -o ] && cp {native.built()} "$word"; before=$word; done\n'
    )
    path.chmod(0o755)
    return str(path)


@kernels
@pytest.mark.skipif(not native.processor_flags().issuperset(native.WIDE), reason="it has no flags to do without")
def test_a_compiler_that_does_not_know_the_newest_flags_is_asked_for_less(tmp_path: Path) -> None:
    flags = frozenset({*native.WIDE, "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"})
    code = f"from axon_llm.fast import native\nnative.processor_flags = lambda: {flags!r}\nprint(*native._found()[1])"
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "AXON_KERNEL_CACHE": str(tmp_path), "CXX": compiler_that_copies(tmp_path, "-mamx")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [*native.WIDE, "avx512_bf16"]
        said.append(done.stderr)
    assert all("do without amx_tile, amx_bf16, amx_int8: " in each for each in said)
    assert ["compiling kernels" in each for each in said] == [True, False]


@kernels
@pytest.mark.skipif(not native.processor_flags().issuperset(native.WIDE), reason="it has no flags to do without")
def test_kernels_for_less_do_not_stand_in_for_better_ones_that_can_be_made(tmp_path: Path) -> None:
    code = (
        "from axon_llm.fast import native\n"
        "native.processor_flags = lambda: frozenset({FLAGS})\n"
        "print(*native._found()[1])"
    )
    environment = {**os.environ, "AXON_KERNEL_CACHE": str(tmp_path), "CXX": compiler_that_copies(tmp_path)}
    for flags in (native.WIDE, (*native.WIDE, "avx512_bf16"), native.WIDE):  # machines that share a cache
        done = subprocess.run(
            [sys.executable, "-c", code.replace("{FLAGS}", repr(flags))],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split() == list(flags)


@kernels
def test_a_library_whose_bytes_have_changed_is_made_anew(tmp_path: Path) -> None:
    environment = {**os.environ, "AXON_KERNEL_CACHE": str(tmp_path), "CXX": compiler_that_copies(tmp_path)}
    command = [sys.executable, "-c", "from axon_llm.fast import native; print(native.load())"]
    assert subprocess.run(command, env=environment, capture_output=True, check=True).stdout == b"True\n"
    [library] = tmp_path.glob("*.so")
    whole = library.read_bytes()
    library.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    said = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert said.stdout == b"True\n"
    assert said.stderr.count(b"compiling kernels") == 1
    assert library.read_bytes() == whole


@kernels
def test_a_library_that_does_not_load_here_is_named_and_done_without(tmp_path: Path) -> None:
    environment = {**os.environ, "AXON_KERNEL_CACHE": str(tmp_path), "CXX": compiler_that_copies(tmp_path)}
    command = [sys.executable, "-c", "from axon_llm.fast import native; print(native.load())"]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    [library] = tmp_path.glob("*.so")
    library.write_bytes(b"no library" + sha256(b"no library").digest())
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"
    assert str(library) in said.stderr


@kernels
def test_what_a_compiler_says_in_another_encoding_is_no_failure_of_ours(tmp_path: Path) -> None:
    (tmp_path / "compiler").write_text("#!/bin/sh\nprintf 'error: \\351\\n' >&2; exit 1\n")
    (tmp_path / "compiler").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", "from axon_llm.fast import native; print(native.load())"],
        env={**os.environ, "AXON_KERNEL_CACHE": str(tmp_path), "CXX": str(tmp_path / "compiler")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
    assert done.stderr.count("PyTorch's own kernels are used") == 1


@kernels
@pytest.mark.parametrize("kind", ["bf16-strips", "int8-strips", "int4-strips"])
def test_sequences_may_share_one_row_of_positions(kind: str) -> None:
    assert native.load()
    model = accelerate(random_model(CONFIG, torch.bfloat16), plan=plan_of(kind.removesuffix("-strips")))
    tokens = torch.randint(0, CONFIG.vocab_size, (4, 9))
    positions = torch.arange(9)[None]
    assert torch.equal(model(tokens, positions), model(tokens, positions.expand(4, 9)))


@kernels
def test_a_model_that_cannot_be_quantised_so_is_left_as_it_was() -> None:
    assert native.load()
    odd = replace(CONFIG, intermediate_size=176)
    model = random_model(odd, torch.bfloat16)
    tokens, positions = torch.arange(5)[None], torch.arange(5)[None]
    expected = model(tokens, positions)
    with pytest.raises(UsageError, match="multiples of 32"):
        accelerate(model, "int4")
    assert torch.equal(model(tokens, positions), expected)
    assert accelerate(model, "int8")(tokens, positions).isfinite().all()


@kernels
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("once", [False, True])
def test_weights_loaded_into_an_accelerated_model_are_the_ones_it_computes_with(once: bool, assign: bool) -> None:
    assert native.load()
    source, target = (
        accelerate(random_model(QWEN, torch.bfloat16, seed=seed), once=once, plan=None if once else plan_of("bf16"))
        for seed in (1, 2)
    )
    target.load_state_dict({name: tensor.clone() for name, tensor in source.state_dict().items()}, assign=assign)
    assert torch.equal(prefill_and_decode(target, torch.bfloat16), prefill_and_decode(source, torch.bfloat16))


@kernels
def test_an_accelerated_model_survives_pickling() -> None:
    assert native.load()
    model = accelerate(random_model(CONFIG, torch.bfloat16))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(prefill_and_decode(again, torch.bfloat16), prefill_and_decode(model, torch.bfloat16))


def _refused_products() -> list[tuple[str, tuple[Any, ...]]]:
    q, k = torch.zeros(2, 4, 3, 64, dtype=torch.bfloat16), torch.zeros(2, 2, 8, 64, dtype=torch.bfloat16)
    mask = torch.ones(2, 1, 3, 8, dtype=torch.bool)
    x, strips = torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(2, 32, 16, dtype=torch.int32)
    angles = torch.zeros(1, 1, 3, 64, dtype=torch.bfloat16)
    turned = q.transpose(1, 2)
    words = torch.zeros(32, 32, dtype=torch.int32)
    return [
        ("bf16_attention", (q, k, k[:, :, :7], mask, 0)),
        ("bf16_attention", (q, k[:1], k[:1], mask, 0)),
        ("bf16_attention", (q, k[:, :0], k[:, :0], mask, 0)),
        ("bf16_attention", (q, k[..., :32], k[..., :32], mask, 0)),
        ("bf16_attention", (q[:, :3], k, k, mask, 0)),
        ("bf16_attention", (q, k, k, mask.float(), 0)),
        ("bf16_attention", (q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), mask, 0)),
        ("bf16_strips", (x[:, :0], strips, 32, 0)),
        ("bf16_strips", (torch.zeros((), dtype=torch.bfloat16), strips, 32, 0)),
        ("bf16_strips", (x, strips.transpose(0, 2), 32, 0)),
        ("bf16_rotate", (turned, angles[:, :, :2], angles[:, :, :2])),
        ("bf16_rotate", (turned, angles, angles.float())),
        ("lay_strips", (words, strips[:1])),
        ("lay_strips", (words, strips[:, :16].contiguous())),
        ("strip_rows", (strips, torch.zeros(1, dtype=torch.int64), 33)),
    ]


@kernels
@pytest.mark.parametrize(("name", "given"), _refused_products())
def test_operators_refuse_what_they_would_read_beyond(name: str, given: tuple[Any, ...]) -> None:
    assert native.load()
    with pytest.raises(RuntimeError, match=r"wanted|without input|no weights"):
        getattr(torch.ops.axon, name)(*given)


@pytest.mark.slow
@pytest.mark.skipif(not native.processor_flags().issuperset(native.WIDE), reason="this processor's are the narrow ones")
@pytest.mark.parametrize("plugin", ["narrow", "tiles", "no_tiles"])
def test_the_kernels_for_other_processors_pass_these_tests_too(plugin: str) -> None:
    if plugin != "narrow" and native.tiles() == (plugin == "tiles"):
        pytest.skip(f"the matrix unit is {'there' if native.tiles() else 'missing'} without this plugin")
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", plugin, "-m", "not slow", here]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(here.parent)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert ("no matrix unit" in done.stdout) == (plugin != "tiles")
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 400  # type: ignore[index]


@pytest.mark.parametrize(
    ("present", "used"),
    [
        (native.NARROW, native.NARROW),
        ((*native.NARROW, "avx512f", "avx512_bf16"), native.NARROW),
        ((*native.NARROW, *native.WIDE, "amx_tile"), native.WIDE),
        ((*native.NARROW, *native.WIDE, "avx512_bf16"), (*native.WIDE, "avx512_bf16")),
    ],
)
def test_the_best_instructions_of_which_all_are_there_are_used(
    present: tuple[str, ...], used: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "processor_flags", lambda: frozenset(present))
    assert native.instructions() == list(used)


@pytest.mark.parametrize(
    ("vendor", "family", "model", "zen4"),
    [
        ("AuthenticAMD", "25", "1", False),  # Zen 3
        ("AuthenticAMD", "25", "80", False),
        ("AuthenticAMD", "25", "17", True),
        ("AuthenticAMD", "25", "160", True),
        ("AuthenticAMD", "26", "17", False),  # Zen 5
        ("GenuineIntel", "6", "17", False),
        ("", "", "", False),  # nobody says
    ],
)
def test_a_zen_4_is_known_whatever_is_hidden_of_it(
    vendor: str, family: str, model: str, zen4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"vendor_id": vendor, "cpu family": family, "model": model} if vendor else {}
    monkeypatch.setattr(native, "processor", lambda: said)
    assert native.is_zen4() == zen4


@pytest.mark.parametrize("zen4", [False, True])
def test_a_zen_4_has_kernels_of_its_own(zen4: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_zen4", lambda: zen4)
    assert ("-DAXON_ZEN4" in native._flags()) == zen4


def test_what_the_processor_says_of_itself_is_read_by_whole_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "cpuinfo"
    said.write_text("processor\t: 0\nmodel name\t: Some CPU\nmodel\t\t: 17\nflags\t\t: fma avx2\n\nmodel\t\t: 18\n")
    monkeypatch.setattr(native, "Path", lambda _: said)
    read = native.processor.__wrapped__  # which keeps nothing
    assert (read()["model"], read()["flags"], read().get("cpu family")) == ("17", "fma avx2", None)
    monkeypatch.setattr(native, "Path", lambda _: tmp_path / "nothing")
    assert read() == {}


def test_a_processor_without_the_instructions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "processor_flags", lambda: frozenset({"sse4_2", "fma"}))
    with pytest.raises(native.Unavailable, match="has no avx2"):
        native.built()
