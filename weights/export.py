"""Write a trained model as a Hugging Face checkpoint folder, with the checksum of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from axon_llm.config import ModelConfig


def config_json(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a model of this shape, in the words of Hugging Face's Llama."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta, "tie_word_embeddings": config.tie_word_embeddings, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids),
        "torch_dtype": "bfloat16",
    }  # fmt: skip


def export(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Write ``config.json``, ``generation_config.json``, ``model.safetensors`` in bfloat16 and ``SHA256SUMS``.

    Args:
        folder: where to; tokenizer files are there already or come later.
        config: shape of the model.
        weights: the ``state_dict`` of our ``Transformer``; a tied output layer is left out, as Hugging Face does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        (name if name.startswith("lm_head") else f"model.{name}"): tensor.detach()
        .to("cpu", torch.bfloat16)
        .contiguous()
        for name, tensor in weights.items()
        if not (config.tie_word_embeddings and name.startswith("lm_head"))
    }
    generation = {
        "bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.eos_token_ids[0], "do_sample": True, "temperature": 0.7, "top_p": 0.95,
    }  # fmt: skip
    _write_json(folder / "config.json", config_json(config))
    _write_json(folder / "generation_config.json", generation)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file keeps the file to its owner
    checksum = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{checksum}  model.safetensors\n", encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
