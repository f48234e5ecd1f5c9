"""The dimensions of well-known models, for runs on random weights: ``--model random:llama-3.2-1b``.

Speed, memory and the shape of every curve depend on a model's dimensions and not on what it has learned, so the effect
of a cache can be seen at real sizes without a download. Figures are those of the ``config.json`` published with each
model on the Hugging Face Hub.
"""

from __future__ import annotations

from typing import Any

from axon_llm.config import ModelConfig
from axon_llm.errors import ModelNotFound

PREFIX = "random:"
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(
    family: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    context: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape("llama", 64, 176, 2, 4, 2, 512, 2048, tie_word_embeddings=True),
    "smollm2-135m": _shape("llama", 576, 1536, 30, 9, 3, 49152, 8192, rope_theta=100000, tie_word_embeddings=True),
    "smollm2-360m": _shape("llama", 960, 2560, 32, 15, 5, 49152, 8192, rope_theta=100000, tie_word_embeddings=True),
    "smollm2-1.7b": _shape("llama", 2048, 8192, 24, 32, 32, 49152, 8192, rope_theta=130000, tie_word_embeddings=True),
    "tinyllama-1.1b": _shape("llama", 2048, 5632, 22, 32, 4, 32000, 2048),
    "llama-2-7b": _shape("llama", 4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-3.2-1b": _shape(
        "llama",
        2048,
        8192,
        16,
        32,
        8,
        128256,
        131072,
        head_dim=64,
        rope_theta=500000,
        rope_scaling={**_LLAMA3_ROPE, "factor": 32.0},
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": _shape(
        "llama",
        3072,
        8192,
        28,
        24,
        8,
        128256,
        131072,
        head_dim=128,
        rope_theta=500000,
        rope_scaling={**_LLAMA3_ROPE, "factor": 32.0},
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": _shape(
        "llama", 4096, 14336, 32, 32, 8, 128256, 131072, rope_theta=500000, rope_scaling={**_LLAMA3_ROPE, "factor": 8.0}
    ),
    "mistral-7b": _shape("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, rope_theta=1000000, sliding_window=None),
    "qwen2.5-0.5b": _shape(
        "qwen2", 896, 4864, 24, 14, 2, 151936, 32768, rope_theta=1000000, rms_norm_eps=1e-6, tie_word_embeddings=True
    ),
    "qwen2.5-1.5b": _shape(
        "qwen2", 1536, 8960, 28, 12, 2, 151936, 131072, rope_theta=1000000, rms_norm_eps=1e-6, tie_word_embeddings=True
    ),
    "qwen3-0.6b": _shape(
        "qwen3",
        1024,
        3072,
        28,
        16,
        8,
        151936,
        40960,
        head_dim=128,
        rope_theta=1000000,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
    "qwen3-1.7b": _shape(
        "qwen3",
        2048,
        6144,
        28,
        16,
        8,
        151936,
        40960,
        head_dim=128,
        rope_theta=1000000,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
}


def shape_config(name: str) -> ModelConfig:
    """The configuration of a named shape, with or without the ``random:`` in front.

    Raises:
        ModelNotFound: no such shape; the hint lists them.
    """
    name = name.removeprefix(PREFIX).lower()
    if name not in SHAPES:
        raise ModelNotFound(f"no shape named {name!r}", f"Shapes: {', '.join(SHAPES)}.")
    return ModelConfig.from_dict(SHAPES[name])
