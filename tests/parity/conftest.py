"""The reference: transformers, on tiny random configurations, saved as a user would save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.needs import need_module

transformers = need_module("transformers")  # the reference implementation

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
BASE = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def make_reference(folder: Path, family: str, seed: int = 0, **settings: Any) -> Any:
    """A random transformers model with weights large enough to matter, saved into ``folder``."""
    config_class, model_class = CLASSES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**BASE, **settings})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 0.12)
    model.save_pretrained(folder)
    return model
