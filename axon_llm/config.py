"""A model's dimensions and variations, read strictly from a Hugging Face ``config.json``.

Strictly means: a key that changes the numbers is either understood or refused by name. A model that loads and computes
something slightly different from what its authors trained is worse than one that does not load.

This file knows four families (Llama, Mistral, Qwen2, Qwen3) and turns each into one vocabulary, so that nothing after
it asks which family a model is from. It needs nothing but the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axon_llm.config_keys import Keys, first_id, ids_of, only
from axon_llm.errors import ConfigError
from axon_llm.rope_config import RopeConfig, read_rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# What transformers takes a missing max_position_embeddings for.
_DEFAULT_CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a decoder is made of.

    Attributes:
        family: the ``model_type`` it was read from; only for display.
        vocab_size: rows of the embedding.
        hidden_size: channels of the residual stream.
        intermediate_size: channels inside the feed-forward.
        num_layers: blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; equal to ``num_heads`` (MHA), fewer (GQA) or one (MQA).
        head_dim: channels per head; not always ``hidden_size / num_heads``.
        max_position_embeddings: longest context the model claims, or yarn stretches it to.
        norm_eps: epsilon of every RMSNorm.
        rope: rotary embedding.
        tie_word_embeddings: the output layer is the embedding matrix.
        qkv_bias: biases on the query, key and value projections.
        out_bias: bias on attention's output projection.
        mlp_bias: biases in the feed-forward.
        qk_norm: RMSNorm on each query and key head (Qwen3).
        layer_windows: per layer, the width of its sliding window in tokens, or ``None`` for full attention.
        bos_token_id: first token of every sequence, where the model has one.
        eos_token_ids: tokens that end a sequence.
        dtype: the dtype the weights are stored in, as named in the file; ``""`` if it does not say.
        packed: ``"int8"`` or ``"int4"`` where the linear layers are stored quantised by ``axon quantize``, else ``""``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    family: str = "llama"
    norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = ""
    packed: str = ""

    def __post_init__(self) -> None:
        """Check that the dimensions fit together.

        Raises:
            ConfigError: they do not.
        """
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_layers)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.norm_eps < 1:
            raise ConfigError(f"rms_norm_eps must be from 0 to 1, not {self.norm_eps}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim must be even to be rotated in pairs, not {self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly")
        if len(self.layer_windows) != self.num_layers:
            raise ConfigError(f"layer_types names {len(self.layer_windows)} layers, the model has {self.num_layers}")

    @property
    def num_parameters(self) -> int:
        """Number of learned values; tied embeddings count once."""
        h, kv = self.hidden_size, self.num_kv_heads * self.head_dim
        q = self.num_heads * self.head_dim
        attention = h * (q + 2 * kv) + q * h + (q + 2 * kv) * self.qkv_bias + h * self.out_bias
        attention += 2 * self.head_dim * self.qk_norm
        feed_forward = 3 * h * self.intermediate_size + (2 * self.intermediate_size + h) * self.mlp_bias
        embeddings = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + feed_forward + 2 * h) + h + embeddings

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read a ``config.json``.

        Raises:
            ConfigError: unreadable, not JSON, or not supported; the message names the file.
        """
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist", "A model folder holds config.json and *.safetensors.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds a {type(raw).__name__}, not an object")
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}", error.hint) from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Translate the contents of a ``config.json``.

        Raises:
            ConfigError: a key is missing, malformed, unknown, or set to something that is not supported.
        """
        keys = Keys(raw)
        family = keys.take("model_type", str)
        if family not in FAMILIES:
            raise ConfigError(f"model_type {family!r} is not supported", f"Supported: {', '.join(FAMILIES)}.")
        for name in _REQUIRED:
            if raw.get(name) is None:
                raise ConfigError(f"{name} is missing")
        hidden_size, num_heads = keys.take("hidden_size", int), keys.take("num_attention_heads", int)
        num_layers = keys.take("num_hidden_layers", int)
        stated = keys.take("max_position_embeddings", int, _DEFAULT_CONTEXT[family])
        rope, context = read_rope(keys, stated)
        default_kv_heads = 8 if family == "mistral" and "num_key_value_heads" not in raw else num_heads
        default_head_dim = 128 if family == "qwen3" else hidden_size // max(num_heads, 1)
        attention_bias = keys.take("attention_bias", bool, family == "qwen2")
        if attention_bias != (family == "qwen2") and family in ("mistral", "qwen2"):
            raise ConfigError(f"attention_bias = {attention_bias} is not what {family} computes")
        config = cls(
            family=family,
            vocab_size=keys.take("vocab_size", int),
            hidden_size=hidden_size,
            intermediate_size=keys.take("intermediate_size", int),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=keys.take("num_key_value_heads", int, default_kv_heads),
            head_dim=keys.take("head_dim", int, default_head_dim),
            max_position_embeddings=context,
            norm_eps=keys.take("rms_norm_eps", float, 1e-6),
            rope=rope,
            tie_word_embeddings=keys.take("tie_word_embeddings", bool, False),
            qkv_bias=attention_bias,
            out_bias=attention_bias and family != "qwen2",
            mlp_bias=only(keys, "mlp_bias", False, family, "llama"),
            qk_norm=family == "qwen3",
            layer_windows=_read_windows(keys, family, num_layers),
            bos_token_id=first_id(keys.take("bos_token_id", (int, list), None)),
            eos_token_ids=ids_of(keys.take("eos_token_id", (int, list), None)),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or ""),
            packed=_read_packed(keys),
        )
        keys.take("pad_token_id", (int, list), None)
        keys.refuse_the_rest(family)
        return config


def _read_windows(keys: Keys, family: str, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer. Mistral slides everywhere or nowhere, Qwen in the layers that say so."""
    if family == "llama":
        if keys.take("sliding_window", int, None) is not None:
            raise ConfigError("sliding_window is not something llama computes")
        types = _layer_types(keys)
        if types is not None and set(types) != {"full_attention"}:
            raise ConfigError(f"layer_types = {types!r} is not supported for llama")
        return (None,) * num_layers
    explicit_null = "sliding_window" in keys.raw and keys.raw["sliding_window"] is None
    window = None if explicit_null else keys.take("sliding_window", int, 4096)
    keys.read.add("sliding_window")
    if window is not None and window < 1:
        raise ConfigError(f"sliding_window must be positive, not {window}")
    types = _layer_types(keys)
    if family == "mistral":
        expected = "full_attention" if window is None else "sliding_attention"
        if types is not None and set(types) != {expected}:
            raise ConfigError(f"layer_types = {types!r} is not supported for mistral with sliding_window = {window}")
        return (window,) * num_layers
    if not keys.take("use_sliding_window", bool, False):
        window = None
    first = keys.take("max_window_layers", int, 28)
    if types is not None and "sliding_attention" in types and window is None:
        raise ConfigError("layer_types asks for sliding attention, but no sliding window is in use")
    if types is None:
        return tuple(window if layer >= first else None for layer in range(num_layers))
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(f"layer_types holds {sorted(map(str, unknown))}, which is not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _layer_types(keys: Keys) -> list[str] | None:
    """The kind of each layer's attention, where the file names it."""
    types = keys.take("layer_types", list, None)
    if types is not None and not all(isinstance(kind, str) for kind in types):
        raise ConfigError(f"layer_types must hold strings, not {types!r}")
    return types


def _read_packed(keys: Keys) -> str:
    """How ``axon quantize`` stored the linear layers."""
    marker = keys.take("axon_packed", dict, None)
    if marker is None:
        return ""
    if marker.get("version") != 2 or marker.get("weights") not in ("int8", "int4"):
        raise ConfigError(f"axon_packed = {marker!r} is not a known format", "Run axon quantize again.")
    return str(marker["weights"])
