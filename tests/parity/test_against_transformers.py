"""The same numbers as transformers: every family, every variation, and random combinations of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASE, CLASSES, make_reference

from axon_llm.cache import KVCache
from axon_llm.checkpoint import load_model
from axon_llm.config import ModelConfig
from axon_llm.engine.generate import greedy
from axon_llm.layers.rope import rope_frequencies
from axon_llm.model import Transformer

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama with a KV head for each query head": ("llama", {"num_key_value_heads": 4}),
    "llama with six query heads to two": ("llama", {"num_attention_heads": 6, "head_dim": 14}),
    "llama with head_dim of its own": ("llama", {"head_dim": 22}),
    "llama with tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "llama with attention and feed-forward biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with another rope base and epsilon": ("llama", {"rope_theta": 500000.0, "rms_norm_eps": 1e-3}),
    "llama with linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama with llama3 rope": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama with yarn rope": ("llama", {"rope_scaling": YARN}),
    "llama with yarn rope and every parameter": (
        "llama",
        {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.3}},
    ),
    "llama with yarn rope and mscale": (
        "llama",
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False}},
    ),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "mistral with a window shorter than the prompt": ("mistral", {"sliding_window": 9}),
    "mistral with a window of one": ("mistral", {"sliding_window": 1}),
    "mistral with head_dim of its own": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2 with tied embeddings": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows in its upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2 with yarn rope": ("qwen2", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 with one KV head, biases and tied embeddings": (
        "qwen3",
        {"head_dim": 20, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3 with windows in every other layer": (
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def assert_same_numbers(reference: Any, folder: Path, length: int = 70) -> None:
    """Logits within 1e-4 in one piece, in chunks and token by token; 64 greedy tokens the same."""
    config = ModelConfig.from_file(folder / "config.json")
    model = load_model(folder, config, torch.device("cpu"), "float32")
    tokens = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(length).expand(2, length)
    with torch.inference_mode():
        expected = reference(tokens).logits
        assert expected.std() > 0.1, "a reference that says nothing cannot be disagreed with"
        for name, cuts in {
            "uncached": None,
            "in one piece": [0, length],
            "in chunks": [0, 3, length // 2, length - 1, length],
            "token by token": list(range(length + 1)),
        }.items():
            cache = None if cuts is None else KVCache(config, slots=2, max_seq_len=length + 10)
            parts = [
                model(tokens[:, start:end], positions[:, start:end], cache)
                for start, end in zip((cuts or [0, length])[:-1], (cuts or [0, length])[1:], strict=True)
            ]
            difference = (torch.cat(parts, dim=1) - expected).abs().max().item()
            assert difference < 1e-4, f"{name}: logits differ by {difference}"
        assert greedy_tokens(model, tokens[0, :20].tolist()) == reference_greedy(reference, tokens[:1, :20])


def greedy_tokens(model: Transformer, prompt: list[int]) -> list[int]:
    return list(greedy(model, prompt, 64, KVCache(model.config, max_seq_len=len(prompt) + 64)))


def reference_greedy(reference: Any, tokens: torch.Tensor) -> list[int]:
    start = tokens.shape[1]
    for _ in range(64):
        tokens = torch.cat((tokens, reference(tokens).logits[:, -1:].argmax(-1)), dim=1)
    return tokens[0, start:].tolist()


@pytest.mark.parametrize("name", VARIATIONS)
def test_the_numbers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, settings = VARIATIONS[name]
    assert_same_numbers(make_reference(tmp_path, family, **settings), tmp_path)


def random_variation(seed: int) -> tuple[str, dict[str, Any]]:
    """A configuration nobody wrote down."""
    pick = random.Random(seed)
    family = pick.choice(["llama", "mistral", "qwen2", "qwen3"])
    heads = pick.choice([2, 3, 4, 6])
    head_dim = pick.choice([8, 10, 16, 26])
    settings: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": pick.choice([n for n in (1, 2, 3, heads) if heads % n == 0]),
        "hidden_size": heads * head_dim,
        "intermediate_size": pick.choice([40, 77, 128]),
        "num_hidden_layers": pick.choice([1, 2, 4]),
        "vocab_size": pick.choice([101, 256, 333]),
        "tie_word_embeddings": pick.random() < 0.5,
        "rms_norm_eps": pick.choice([1e-6, 1e-5, 1e-2]),
        "eos_token_id": pick.choice([2, [2, 7]]),
    }
    settings["head_dim"] = head_dim if family in ("qwen2",) else pick.choice([head_dim, 12, 24])
    rope = pick.choice(
        [None, {"rope_type": "linear", "factor": 2.5}, LLAMA3, YARN, {**YARN, "truncate": False, "beta_fast": 8.0}]
    )
    theta = pick.choice([1000.0, 10000.0, 1000000.0])
    if pick.random() < 0.5:
        settings["rope_parameters"] = {"rope_theta": theta, **(rope or {"rope_type": "default"})}
    else:
        settings |= {"rope_theta": theta, "rope_scaling": rope}
    if family == "mistral":
        settings["sliding_window"] = pick.choice([None, 3, 30, 300])
    if family in ("qwen2", "qwen3") and pick.random() < 0.6:
        settings |= {
            "use_sliding_window": True,
            "sliding_window": pick.choice([2, 11, 64]),
            "max_window_layers": pick.choice([0, 1, 9]),
        }
    if family in ("llama", "qwen3"):
        settings["attention_bias"] = pick.random() < 0.5
    if family == "llama":
        settings["mlp_bias"] = pick.random() < 0.5
    return family, settings


@pytest.mark.parametrize("seed", range(24))
def test_the_numbers_are_those_of_transformers_on_random_configurations(seed: int, tmp_path: Path) -> None:
    family, settings = random_variation(seed)
    assert_same_numbers(make_reference(tmp_path, family, seed, **settings), tmp_path, length=40)


def test_published_and_newer_spellings_of_rope_give_the_same_model(tmp_path: Path) -> None:
    make_reference(tmp_path, "llama", rope_scaling=LLAMA3, rope_theta=500000.0)
    newer = json.loads((tmp_path / "config.json").read_text())
    parameters = newer.pop("rope_parameters")
    older = {**newer, "rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    oldest = {
        **older,
        "rope_scaling": {"type": parameters["rope_type"], **{k: v for k, v in parameters.items() if k != "rope_type"}},
    }
    spelled = [
        ModelConfig.from_dict({**newer, "rope_parameters": {**parameters, "rope_theta": 500000.0}}),
        ModelConfig.from_dict(older),
        ModelConfig.from_dict(oldest),
    ]
    assert spelled[0] == spelled[1] == spelled[2]
    assert spelled[0].rope.kind == "llama3"


@pytest.mark.parametrize(("family", "stated"), [("qwen2", 32768), ("qwen3", 40960)])
def test_yarn_as_qwen_tells_to_add_it_turns_by_the_frequencies_of_transformers(family: str, stated: int) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    sizes = {**BASE, "hidden_size": 512, "head_dim": 128, "rope_theta": 1000000.0, "max_position_embeddings": stated}
    theirs = CLASSES[family][0](**sizes, rope_scaling=dict(yarn))
    reference = {"qwen2": Qwen2RotaryEmbedding, "qwen3": Qwen3RotaryEmbedding}[family](theirs)
    config = ModelConfig.from_dict({**sizes, "model_type": family, "rope_scaling": yarn})
    frequencies, scale = rope_frequencies(config.rope, config.head_dim)
    assert torch.equal(torch.tensor(frequencies), reference.inv_freq)
    assert scale == reference.attention_scaling != 1.0
    assert config.max_position_embeddings == 131072


def test_a_sharded_checkpoint_is_the_same_as_a_whole_one(tmp_path: Path) -> None:
    reference = make_reference(tmp_path / "whole", "qwen2")
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_same_numbers(reference, tmp_path / "sharded", length=30)


def test_a_checkpoint_saved_over_a_sharded_one_is_the_later_one(tmp_path: Path) -> None:
    make_reference(tmp_path, "qwen2").save_pretrained(tmp_path, max_shard_size="60KB")
    reference = make_reference(tmp_path, "qwen2", seed=1)
    assert_same_numbers(reference, tmp_path, length=30)


def test_old_checkpoints_with_rotary_tables_inside_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    reference = make_reference(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_numbers(reference, tmp_path, length=30)
