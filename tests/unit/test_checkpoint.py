"""Loading weights: strict, safe, and within the memory that the weights themselves take."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from axon_llm.checkpoint import load, load_model, random_model, resolve_device, resolve_dtype, tensor_headers
from axon_llm.config import ModelConfig
from axon_llm.errors import CheckpointError, UsageError
from axon_llm.tokenizer import byte_tokenizer

CPU = torch.device("cpu")
RAW = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "float32",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint in Hugging Face layout."""
    model = random_model(ModelConfig.from_dict(RAW), CPU, torch.float32, seed=3)
    names = {name: name if name.startswith("lm_head") else f"model.{name}" for name in model.state_dict()}
    save_file({names[k]: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer()._backend.to_str())
    return tmp_path


def read(folder: Path) -> None:
    load_model(folder, ModelConfig.from_file(folder / "config.json"), CPU)


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **change}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def test_a_folder_loads_as_it_is(folder: Path) -> None:
    model, tokenizer = load(folder, device="cpu")
    assert torch.equal(model.embed_tokens.weight, load_file(folder / "model.safetensors")["model.embed_tokens.weight"])
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"


def test_weights_are_converted_to_the_wanted_dtype_and_rope_stays_exact(folder: Path) -> None:
    model, _ = load(folder, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.rope.inv_freq.dtype == torch.float32
    assert model.to(torch.bfloat16).rope.inv_freq[1].item() == pytest.approx(10_000 ** (-2 / 8), rel=1e-6)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, {"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks layers\.1\.mlp\.up_proj\.weight"):
        read(folder)


def test_an_extra_tensor_is_named(folder: Path) -> None:
    rewrite(folder, {"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)})
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.2\.mlp\.up_proj\.weight"):
        read(folder)


def test_a_tied_output_layer_may_be_stored_too_if_it_is_the_same(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**RAW, "tie_word_embeddings": True}))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, {"lm_head.weight": embedding.clone()})
    read(folder)
    rewrite(folder, {"lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match=r"another lm_head\.weight"):
        read(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, {"model.norm.weight": torch.zeros(31)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[31\], should be \[32\]"):
        read(folder)


def test_an_integer_tensor_is_refused(folder: Path) -> None:
    rewrite(folder, {"model.norm.weight": torch.zeros(32, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match="I8"):
        read(folder)


def test_a_bias_that_the_configuration_does_not_know_is_an_extra_tensor(folder: Path) -> None:
    rewrite(folder, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
    with pytest.raises(CheckpointError, match=r"q_proj\.bias"):
        read(folder)


def damaged(kind: str, whole: bytes) -> bytes:
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    if kind == "truncated":
        return whole[: len(whole) - 100]
    if kind == "only a length":
        return whole[:8]
    if kind == "empty":
        return b""
    if kind == "a header of 2^63 bytes":
        return struct.pack("<Q", 2**63) + whole[8:]
    if kind == "a header longer than the file":
        return struct.pack("<Q", len(whole) * 2) + whole[8:]
    if kind == "a header that is not JSON":
        return whole[:8] + b"x" * length + whole[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    if kind == "overlapping offsets":
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    if kind == "offsets beyond the file":
        header[names[-1]]["data_offsets"] = [10**9, 10**9 + 128]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + length :]


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "only a length",
        "empty",
        "a header of 2^63 bytes",
        "a header longer than the file",
        "a header that is not JSON",
        "overlapping offsets",
        "offsets beyond the file",
    ],
)
def test_a_damaged_file_is_one_clear_error(kind: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damaged(kind, path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a sound safetensors file"):
        read(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_refused_by_name_and_never_opened(name: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match=name):
        read(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {
        "weight_map": {
            "model.norm.weight": "model-00001-of-00002.safetensors",
            "lm_head.weight": "model-00002-of-00002.safetensors",
        }
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        read(folder)


def test_a_whole_file_is_preferred_to_the_index_of_shards_it_has_replaced(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    read(folder)
    assert tensor_headers(folder)["model.norm.weight"] == ("F32", (32,))


@pytest.mark.parametrize(
    "index", ["{}", "[]", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 1}}', "x"]
)
def test_a_nonsense_index_is_one_clear_error(index: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="index"):
        read(folder)


def test_headers_are_read_without_weights(folder: Path) -> None:
    assert tensor_headers(folder)["model.norm.weight"] == ("F32", (32,))


def test_an_unknown_device_or_dtype_is_a_usage_error() -> None:
    for device in ("gpu", "cuda:99", "mps"):
        with pytest.raises(UsageError):
            resolve_device(device)
    with pytest.raises(UsageError, match="int8"):
        resolve_dtype("int8", "float32", CPU)


def test_random_weights_are_never_zero_and_the_same_for_the_same_seed() -> None:
    config = ModelConfig.from_dict(RAW)
    one, two, other = (random_model(config, CPU, torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.layers[1].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_no_more_memory_than_the_weights_and_a_little(dtype: str, tmp_path: Path) -> None:
    raw = {**RAW, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "vocab_size": 4096}
    config = ModelConfig.from_dict(raw)
    model = random_model(config, CPU, torch.float32)
    save_file(
        {f"model.{k}" if not k.startswith("lm_head") else k: v for k, v in model.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(raw))
    del model
    program = f"""
import torch
from pathlib import Path
from axon_llm.checkpoint import load_model
from axon_llm.config import ModelConfig
def figure(name):
    return int(next(l for l in open('/proc/self/status') if l.startswith(name)).split()[1]) * 1024
folder = Path({str(tmp_path)!r})
config = ModelConfig.from_file(folder / 'config.json')
torch.randn(64, 64) @ torch.randn(64, 64)
before = figure('VmRSS')
model = load_model(folder, config, torch.device('cpu'), {dtype!r})
sum(p.float().sum() for p in model.parameters() if p.numel() < 100_000)
for p in model.parameters():
    for row in p.flatten().split(1 << 16):
        row.sum()
print(figure('VmHWM') - before, sum(p.nbytes for p in model.parameters()))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    grown, weights = map(int, out)
    assert weights > 300_000_000
    assert grown <= 1.15 * weights
