"""Quantised weights: the arithmetic, the kernels against it, and what a neighbour may not change."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_fast import CONFIG, QWEN, prefill_and_decode, random_model

from axon_llm.bench import quality
from axon_llm.checkpoint import load_model
from axon_llm.config import ModelConfig
from axon_llm.errors import CheckpointError, ConfigError, UsageError
from axon_llm.fast import accelerate, describe, native, ops
from axon_llm.fast.fp8 import quantise_fp8
from axon_llm.fast.gpu.words import from_words, to_words
from axon_llm.fast.int4 import Int4Linear, Int4WeightLinear, pack
from axon_llm.fast.int8 import Int8Linear, Int8WeightLinear, quantise_rows
from axon_llm.fast.packed import load_packed, write_packed
from axon_llm.fast.plan import Plan, choose
from axon_llm.fast.quantise import dequantise_int4, dequantise_int8, quantise_int4, quantise_int8
from axon_llm.fast.strips import StripLinear
from axon_llm.model import Transformer


def weights(n: int = 128, k: int = 96) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def test_an_int8_weight_is_at_most_half_a_step_off() -> None:
    w = weights()
    q, scale = quantise_int8(w)
    assert ((dequantise_int8(q, scale) - w).abs() <= scale[:, None] / 2 * 1.0001).all()
    assert q.abs().amax() == 127


def test_an_int4_weight_is_at_most_half_a_step_off_besides_the_rounding_of_scale_and_middle() -> None:
    w = weights()
    q, scale, middle = quantise_int4(w)
    step = scale.float().repeat_interleave(32, dim=1)
    assert ((dequantise_int4(q, scale, middle) - w).abs() <= step * 0.56).all()
    assert (int(q.amin()), int(q.amax())) == (0, 15)


def test_a_row_of_zeros_and_a_constant_group_survive_quantisation() -> None:
    w = weights()
    w[3], w[5] = 0.0, 0.25
    assert dequantise_int8(*quantise_int8(w))[3].abs().amax() == 0
    torch.testing.assert_close(dequantise_int4(*quantise_int4(w))[[3, 5]], w[[3, 5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_to_half_a_step_and_never_wrap_around(dtype: torch.dtype) -> None:
    x = (torch.randn(200, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 4, 200)[:, None]).to(
        dtype
    )
    q, scale = quantise_rows(x)
    back = (q.float() - 128) * scale.float()
    assert ((back - x.float()).abs() <= scale.float() * 0.501).all()


@pytest.mark.skipif(not ops.works("int8"), reason="PyTorch's int8 product is not exact on this processor")
def test_the_int8_kernel_computes_the_product_of_the_rounded_numbers() -> None:
    w, x = weights(), torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    q, scale = quantise_int8(w)
    bytes_, rows = quantise_rows(x)
    exact = ((bytes_.float() - 128) * rows) @ dequantise_int8(q, scale).T
    torch.testing.assert_close(Int8Linear(q, scale)(x), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 200])
@pytest.mark.parametrize("n", [128, 96, 98])
def test_the_int4_kernel_of_pytorch_computes_the_product_with_the_rounded_weights(n: int, count: int) -> None:
    w, x = weights(n), torch.randn(count, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    values = quantise_int4(w)
    exact = x.float() @ dequantise_int4(*values).T
    assert relative(Int4Linear(*pack(*values))(x), exact) < 0.006


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_to_the_last_bit_whatever_its_batch_mates_are(quantize: str, dtype: torch.dtype) -> None:
    w, x = weights(128, 256), torch.randn(16, 256, generator=torch.Generator().manual_seed(3)).to(dtype)
    linear = Int8Linear(*quantise_int8(w)) if quantize == "int8" else Int4Linear(*pack(*quantise_int4(w)))
    alone = linear(x[:1])
    for others in (x[1:] * 1000, x[1:] * 0, x[1:3]):
        assert torch.equal(linear(torch.cat((x[:1], others)))[:1], alone)


def test_the_variants_without_a_cpu_kernel_compute_the_same() -> None:
    w, x = weights(), torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    q, scale = quantise_int8(w)
    torch.testing.assert_close(Int8WeightLinear(q, scale)(x), x @ dequantise_int8(q, scale).T, rtol=1e-4, atol=1e-4)
    values = quantise_int4(w)
    torch.testing.assert_close(Int4WeightLinear(*values)(x), x @ dequantise_int4(*values).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["llama", "biases-and-qk-norm"])
@pytest.mark.parametrize(("quantize", "bound"), [("int8", 0.03), ("int4", 0.3)])
def test_a_quantised_model_stays_close_to_the_exact_one(quantize: str, bound: float, config: ModelConfig) -> None:
    model = random_model(config)
    exact = prefill_and_decode(model, torch.float32)
    actual = prefill_and_decode(accelerate(copy.deepcopy(model), quantize), torch.float32)
    assert 1e-4 < relative(actual, exact) < bound


def test_what_was_quantised_is_described_with_its_bytes() -> None:
    small, large = describe(accelerate(random_model(CONFIG), "int8")), describe(random_model(CONFIG))
    assert list(small["kernels"].values()) == [4 * CONFIG.num_layers + 1]
    assert next(iter(small["kernels"])) in ("int8", "int8-strips")
    assert 0.25 < small["linear_bytes"] / large["linear_bytes"] < 0.36  # strips are filled up: 160 channels to 192


@pytest.mark.parametrize("kernel", ["int4-strips", "int4"])
def test_int4_takes_a_vocabulary_of_any_size(kernel: Literal["int4-strips", "int4"]) -> None:
    """Groups run along the input channels; a chat model's added tokens make 32002 output channels of 32000."""
    if kernel == "int4-strips" and not native.load():
        pytest.skip("there are no kernels of our own here")
    whole, odd = (replace(QWEN, vocab_size=size) for size in (3200, 3202))
    model = random_model(odd)
    smaller = random_model(whole)
    smaller.load_state_dict({name: value[:3200] for name, value in model.state_dict().items()})
    plan = Plan(kernel, True, "", "", 5)
    exact, exact_smaller = (prefill_and_decode(each, torch.float32) for each in (model, smaller))
    logits, fewer = (prefill_and_decode(accelerate(each, plan=plan), torch.float32) for each in (model, smaller))
    assert relative(logits, exact) == pytest.approx(relative(fewer, exact_smaller), rel=0.02)
    assert relative(logits[..., 3200:], exact[..., 3200:]) < 0.3
    torch.testing.assert_close(logits[..., :3200], fewer)


def test_int4_refuses_sizes_it_cannot_group() -> None:
    config = ModelConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=160,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )
    with pytest.raises(UsageError, match="multiples of 32"):
        accelerate(random_model(config), "int4")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch imports its own deprecated parts when it compiles
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_compiled_quantised_step_gives_the_same_logits(quantize: str) -> None:
    model = accelerate(random_model(CONFIG, torch.bfloat16), quantize)
    tokens, positions = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 2]])
    with torch.inference_mode():
        step = torch.compile(lambda t, p: model(t, p), fullgraph=True)
        assert relative(step(tokens, positions), model(tokens, positions)) < 0.05


RAW = {
    "model_type": "qwen3", "vocab_size": 130, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
    "attention_bias": True, "sliding_window": None, "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with float weights."""
    model = random_model(ModelConfig.from_dict(RAW))
    source = tmp_path / "float"
    source.mkdir()
    names = {name: name if name.startswith("lm_head") else f"model.{name}" for name in model.state_dict()}
    save_file({names[k]: v.clone() for k, v in model.state_dict().items()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(RAW))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    return source


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_packed_checkpoint_gives_the_logits_of_quantising_at_load(folder: Path, quantize: str) -> None:
    target = folder.parent / quantize
    written = write_packed(folder, target, quantize)
    config = ModelConfig.from_file(target / "config.json")
    assert config.packed == quantize
    assert (target / "chat_template.jinja").is_file()
    assert written < 0.5 * (folder / "model.safetensors").stat().st_size
    cpu = torch.device("cpu")
    at_load = accelerate(load_model(folder, ModelConfig.from_file(folder / "config.json"), cpu), quantize)
    packed = load_packed(target, config, cpu)
    assert torch.equal(prefill_and_decode(packed, torch.float32), prefill_and_decode(at_load, torch.float32))
    assert accelerate(packed, quantize) is packed
    in_bf16 = [
        accelerate(load_model(folder, ModelConfig.from_file(folder / "config.json"), cpu, "bfloat16"), quantize),
        load_packed(target, config, cpu, "bfloat16"),
        load_packed(target, config, cpu, "bfloat16", mapped=True),
    ]
    assert len({type(model.layers) for model in in_bf16}) == 1
    in_strips = any(isinstance(module, StripLinear) for module in in_bf16[2].modules())
    assert [_lies_in_file(model) for model in in_bf16] == [False, False, in_strips]
    at_load_logits, copied, mapped = [prefill_and_decode(model, torch.bfloat16) for model in in_bf16]
    assert torch.equal(copied, mapped)
    assert (copied - at_load_logits).norm() < 0.1 * copied.norm()  # its weights were rounded to bfloat16 before


@pytest.mark.parametrize("says", [True, False])
def test_what_is_not_packed_stays_in_the_type_it_was_stored_in(folder: Path, says: bool) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(RAW | {"dtype": "float16" if says else None}))
    target = folder.parent / "packed"
    write_packed(folder, target, "int8")
    stored = load_file(target / "model.safetensors")
    assert stored["embed_tokens.weight"].dtype == stored["norm.weight"].dtype == torch.float16
    config = ModelConfig.from_file(target / "config.json")
    assert load_packed(target, config, torch.device("cpu")).embed_tokens.weight.dtype == torch.float32
    assert load_packed(target, config, torch.device("cpu"), "float16").norm.weight.dtype == torch.float16


def _lies_in_file(model: Transformer) -> bool:
    """Whether the first strips are in a mapped file; a model without strips has none that are."""
    strips = next((module.strips for module in model.modules() if isinstance(module, StripLinear)), None)
    if strips is None:
        return False
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= strips.data_ptr() < end:
            return line.rstrip().endswith(".safetensors")
    raise AssertionError("memory that is not mapped")


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_packed_weights_serve_a_machine_without_the_kernels(
    folder: Path, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = folder.parent / quantize
    write_packed(folder, target, quantize)
    config, cpu = ModelConfig.from_file(target / "config.json"), torch.device("cpu")
    expected = prefill_and_decode(load_packed(target, config, cpu), torch.float32)
    monkeypatch.setattr(native, "load", lambda: False)
    other = load_packed(target, config, cpu)
    assert not any("strips" in kind for kind in describe(other)["kernels"])
    assert relative(prefill_and_decode(other, torch.float32), expected) < 0.05


def test_a_packed_checkpoint_is_refused_where_it_does_not_fit(folder: Path) -> None:
    target = folder.parent / "int8"
    write_packed(folder, target, "int8")
    config, cpu = ModelConfig.from_file(target / "config.json"), torch.device("cpu")
    with pytest.raises(UsageError, match="cannot become int4"):
        load_packed(target, config, cpu, quantize="int4")
    with pytest.raises(UsageError, match="not an empty folder"):
        write_packed(folder, target, "int8")
    with pytest.raises(CheckpointError, match="packed already"):
        write_packed(target, folder.parent / "again", "int8")
    tensors = load_file(target / "model.safetensors")
    tensors["layers.0.mlp.down_proj.scale"] = tensors["layers.0.mlp.down_proj.scale"][:-1].clone()
    save_file(tensors, target / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj\.scale is \[63\], should be \[64\]"):
        load_packed(target, config, cpu)
    del tensors["layers.0.mlp.down_proj.scale"]
    save_file(tensors, target / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks layers\.0\.mlp\.down_proj\.scale"):
        load_packed(target, config, cpu)


@pytest.mark.parametrize("name", ["layers.0.mlp.down_proj.strips", "layers.0.mlp.down_proj.scale", "norm.weight"])
def test_a_packed_checkpoint_of_other_types_is_refused(folder: Path, name: str) -> None:
    target = folder.parent / "int8"
    write_packed(folder, target, "int8")
    tensors = load_file(target / "model.safetensors")
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, target / "model.safetensors")
    config = ModelConfig.from_file(target / "config.json")
    with pytest.raises(CheckpointError, match=r"is torch\.int8, should be"):
        load_packed(target, config, torch.device("cpu"))


def test_packing_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, **more: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("no space left on device")

    monkeypatch.setattr("axon_llm.fast.packed.save_file", full)
    target, there = folder.parent / "new", folder.parent / "there"
    there.mkdir()
    for each in (target, there):
        with pytest.raises(CheckpointError, match="no space left"):
            write_packed(folder, each, "int8")
    assert not target.exists()
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("already", ["int8", None])
def test_a_model_that_has_its_weights_is_not_quantised_otherwise(already: str | None) -> None:
    model = accelerate(random_model(ModelConfig.from_dict(RAW), torch.bfloat16), already)
    with pytest.raises(UsageError, match="cannot become int4"):
        accelerate(model, "int4")


@pytest.mark.parametrize("kernel", ["int8-strips", "int4-strips", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_model_that_is_converted_to_what_it_is_keeps_its_scales(kernel: str, dtype: torch.dtype) -> None:
    if kernel.endswith("-strips") and not native.load():
        pytest.skip("there are no kernels of our own here")
    plan = Plan(kernel, True, "", "", 8)  # type: ignore[arg-type]
    model = accelerate(random_model(ModelConfig.from_dict(RAW), dtype), plan=plan)
    before = prefill_and_decode(model, dtype)
    assert torch.equal(prefill_and_decode(model.to(dtype), dtype), before)


def test_an_unknown_packed_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="axon_packed"):
        ModelConfig.from_dict({**RAW, "axon_packed": {"version": 3, "weights": "int8"}})


def test_fp8_keeps_weights_to_within_a_sixteenth_and_is_refused_where_there_is_none() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    q, scale = quantise_fp8(weight)
    assert (q.dtype, q.shape, scale.shape) == (torch.float8_e4m3fn, weight.shape, torch.Size([64]))
    error = (q.float() * scale[:, None] - weight).abs()
    assert (error <= weight.abs() / 16 + scale[:, None] * 2**-9).all()
    with pytest.raises(UsageError, match="multiples of 16"):
        quantise_fp8(weight[:60])
    with pytest.raises(UsageError, match="Hopper"):
        accelerate(random_model(CONFIG), "fp8")
    with pytest.raises(UsageError, match="Hopper"):
        choose(device="cuda", dtype="float32", rows=1, quantize="fp8", amx=False, fp8=True)
    assert choose(device="cuda", dtype="bfloat16", rows=1, quantize="fp8", amx=False, fp8=True).kernel == "fp8"


def test_a_checkpoint_is_packed_in_known_ways_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp8"):
        write_packed(tmp_path, tmp_path / "packed", "fp8")


@pytest.mark.parametrize(("quantize", "bound"), [(None, 1e-4), ("int8", 0.03), ("int4", 0.3)])
def test_a_pytorch_without_the_private_operators_is_slow_and_right_and_says_so_once(
    quantize: str | None, bound: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Lacking:
        def __getattr__(self, name: str) -> object:
            raise AttributeError(f"there is no {name}")

    model = random_model(CONFIG)
    expected = prefill_and_decode(model, torch.float32)
    for namespace in ("mkldnn", "onednn"):
        monkeypatch.setattr(torch.ops, namespace, Lacking(), raising=False)
    if quantize == "int4":
        monkeypatch.setattr(torch.ops, "aten", Lacking())
    monkeypatch.setattr(native, "load", lambda: False)
    ops.works.cache_clear()
    try:
        fast = accelerate(copy.deepcopy(model), quantize)
        assert relative(prefill_and_decode(fast, torch.float32), expected) < bound
    finally:
        monkeypatch.undo()
        ops.works.cache_clear()
    assert describe(fast)["fused"]
    assert capsys.readouterr().err.count("does not serve them") == 1


def test_the_words_that_a_gpu_reads_hold_what_was_quantised() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    for q, per_word in ((quantise_int8(weight)[0], 4), (quantise_int4(weight)[0], 8)):
        words = to_words(q)
        assert words.shape == (64, 96 // per_word)
        assert torch.equal(from_words(words, per_word), q.to(torch.int8))
        # byte b of word i is channel 4 · b + i: the first four channels are the lowest bits of the first four words
        assert torch.equal(words[:, :4] & (255 if per_word == 4 else 15), q[:, :4].to(torch.int32) & 255)


def test_activations_are_rounded_to_half_a_step_of_the_largest_of_their_piece() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, 5)[:, None]
    x[2, :32] = 0
    for piece in (32, 64):
        step = (x.unflatten(1, (-1, piece)).abs().amax(2, keepdim=True) / 127).expand(-1, -1, piece).flatten(1)
        rounded = quality.round_activations(x, piece)
        assert ((rounded - x).abs() <= step / 2 * 1.001).all()
        steps = rounded / step.clamp_min(1e-20)
        torch.testing.assert_close(steps, steps.round(), rtol=1e-4, atol=1e-4)
        assert not torch.equal(rounded, x)


@pytest.mark.parametrize(("quantize", "piece"), [("int8", 64), ("int4", 32)])
def test_a_model_as_on_a_gpu_multiplies_rounded_weights_and_rounded_activations(quantize: str, piece: int) -> None:
    exact = random_model(CONFIG)
    name, linear = next(
        (n, m) for n, m in exact.named_modules() if isinstance(m, torch.nn.Linear) and m.in_features == 64
    )
    model = quality.as_on_a_gpu(copy.deepcopy(exact), quantize)
    weight = linear.weight.detach()
    stands_for = {
        "int8": lambda: dequantise_int8(*quantise_int8(weight)),
        "int4": lambda: dequantise_int4(*quantise_int4(weight)),
    }[quantize]()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    wanted = quality.round_activations(x, piece) @ stands_for.T
    bias = 0 if linear.bias is None else linear.bias.detach()
    with torch.inference_mode():
        torch.testing.assert_close(model.get_submodule(name)(x), wanted + bias, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(linear(x), wanted + bias, rtol=1e-4, atol=1e-4)
