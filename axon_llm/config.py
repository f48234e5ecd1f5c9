"""A model's dimensions and variations, read strictly from a Hugging Face ``config.json``.

Strictly means: a key that changes the numbers is either understood or refused by name. A model that loads and computes
something slightly different from what its authors trained is worse than one that does not load.

This file knows four families (Llama, Mistral, Qwen2, Qwen3) and turns each into one vocabulary, so that nothing after
it asks which family a model is from. It imports nothing but the standard library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axon_llm.errors import ConfigError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Keys with no bearing on what the forward pass computes here. Anything outside this list and outside those that
# `from_dict` reads is refused.
_HARMLESS = frozenset(
    # where the file comes from, how it is stored and how other software should run it
    "architectures auto_map transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash "
    "_attn_implementation _attn_implementation_autoset attn_implementation experts_implementation use_cache "
    "torchscript _flash_attn_2_enabled "
    "transformers.js_config transformers_js_config is_llama_config unsloth_version unsloth_fixed unsloth_lazy_install "
    "use_bfloat16 tf_legacy_loss tokenizer_class prefix model_name finetuning_task task_specific_params "
    "base_model_tp_plan base_model_pp_plan base_model_ep_plan pretraining_tp return_dict "
    "return_dict_in_generate output_attentions "
    "output_hidden_states output_scores problem_type id2label label2id num_labels license "
    # training only
    "initializer_range initializer_factor attention_dropout hidden_dropout hidden_dropout_prob resid_pdrop embd_pdrop "
    "attn_pdrop dropout residual_dropout z_loss gradient_checkpointing "
    # generation defaults that older files keep here; generation_config.json is where they are read from
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "forced_bos_token_id forced_eos_token_id sep_token_id unk_token_id decoder_start_token_id "
    "cross_attention_hidden_size "
    # size limits of other software
    "max_sequence_length max_seq_len model_max_length".split()
)

# Keys that change the numbers in general, and are accepted only at the value that changes nothing.
_ONLY_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish", None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "chunk_size_feed_forward": (0,),
    "add_cross_attention": (False,),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None, []),
    "quantization_config": (None,),
    "attention_multiplier": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "use_sliding_window": (None, False),
}

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
class RopeConfig:
    """Rotary position embedding: the base angle and how it is stretched.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: ``"default"``, ``"linear"``, ``"llama3"`` or ``"yarn"``.
        factor: how many times the original context is stretched (all kinds but default).
        original_max_position_embeddings: the context before stretching (llama3, yarn).
        low_freq_factor: llama3, wavelengths above original / this are divided by ``factor``.
        high_freq_factor: llama3, wavelengths below original / this are kept.
        beta_fast: yarn, channels with more turns than this are kept.
        beta_slow: yarn, channels with fewer turns than this are divided by ``factor``.
        truncate: yarn, round the channel range outwards to whole channels.
        yarn_scale: yarn, factor on cosine and sine (its "attention factor").
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    yarn_scale: float = 1.0


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
        max_position_embeddings: longest context the model claims.
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
    rope: RopeConfig = RopeConfig()
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
        keys = _Keys(raw)
        family = keys.take("model_type", str)
        if family not in FAMILIES:
            raise ConfigError(f"model_type {family!r} is not supported", f"Supported: {', '.join(FAMILIES)}.")
        for name in _REQUIRED:
            if raw.get(name) is None:
                raise ConfigError(f"{name} is missing")
        hidden_size, num_heads = keys.take("hidden_size", int), keys.take("num_attention_heads", int)
        num_layers = keys.take("num_hidden_layers", int)
        max_position_embeddings = keys.take("max_position_embeddings", int, _DEFAULT_CONTEXT[family])
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
            max_position_embeddings=max_position_embeddings,
            norm_eps=keys.take("rms_norm_eps", float, 1e-6),
            rope=_read_rope(keys, max_position_embeddings),
            tie_word_embeddings=keys.take("tie_word_embeddings", bool, False),
            qkv_bias=attention_bias,
            out_bias=attention_bias and family != "qwen2",
            mlp_bias=_only(keys, "mlp_bias", False, family, "llama"),
            qk_norm=family == "qwen3",
            layer_windows=_read_windows(keys, family, num_layers),
            bos_token_id=_first(keys.take("bos_token_id", (int, list), None)),
            eos_token_ids=_as_tuple(keys.take("eos_token_id", (int, list), None)),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or ""),
            packed=_read_packed(keys),
        )
        keys.take("pad_token_id", (int, list), None)
        keys.refuse_the_rest(family)
        return config


class _Keys:
    """The keys of a ``config.json``, remembering which were read."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.read: set[str] = set()

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value of a key, checked to be of a type; ``null`` counts as absent.

        Raises:
            ConfigError: absent without a default, or of another type.
        """
        self.read.add(name)
        value = self.raw.get(name)
        if value is None:
            if default is ...:
                raise ConfigError(f"{name} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ConfigError(f"{name} = {value!r} should be of type {' or '.join(k.__name__ for k in allowed)}")
        return value

    def refuse_the_rest(self, family: str) -> None:
        """Raise ConfigError for the first key that was not read and is not known to be harmless."""
        for name, value in self.raw.items():
            if name in self.read or name in _HARMLESS:
                continue
            if name in _ONLY_NEUTRAL:
                if value not in _ONLY_NEUTRAL[name]:
                    raise ConfigError(f"{name} = {value!r} is not supported")
                continue
            raise ConfigError(
                f"key {name!r} ({json.dumps(value)[:60]}) is not known for {family}",
                "It may change what the model computes, so it is not ignored. If it does not, remove it.",
            )


def _read_windows(keys: _Keys, family: str, num_layers: int) -> tuple[int | None, ...]:
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


def _layer_types(keys: _Keys) -> list[str] | None:
    """The kind of each layer's attention, where the file names it."""
    types = keys.take("layer_types", list, None)
    if types is not None and not all(isinstance(kind, str) for kind in types):
        raise ConfigError(f"layer_types must hold strings, not {types!r}")
    return types


def _read_rope(keys: _Keys, max_position_embeddings: int) -> RopeConfig:
    """Both spellings: ``rope_theta`` + ``rope_scaling`` of published checkpoints, ``rope_parameters`` of newer ones."""
    theta = keys.take("rope_theta", float, None)
    scaling = keys.take("rope_scaling", dict, None)
    parameters = keys.take("rope_parameters", dict, None)
    if scaling and parameters and any(parameters.get(name) != value for name, value in scaling.items()):
        raise ConfigError("rope_scaling and rope_parameters contradict each other", "Remove the one that is wrong.")
    rope = _Keys({**(scaling or {}), **(parameters or {})})
    theta_inside = rope.take("rope_theta", float, None)
    theta = theta_inside if theta_inside is not None else theta if theta is not None else 10_000.0
    old_name = rope.take("type", str, None)
    kind = rope.take("rope_type", str, old_name) or "default"
    partial = rope.take("partial_rotary_factor", float, 1.0)
    if partial != 1.0:
        raise ConfigError(f"rope partial_rotary_factor = {partial} is not supported")
    if not theta > 1 or not math.isfinite(theta):
        raise ConfigError(f"rope_theta must be above 1, not {theta}")
    fields: dict[str, Any] = {}
    if kind in ("linear", "llama3", "yarn"):
        fields["factor"] = rope.take("factor", float, None)
        if fields["factor"] is None and kind != "yarn":
            raise ConfigError(f"rope {kind} needs a factor")
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            fields[name] = rope.take(name, float)
        original = rope.take("original_max_position_embeddings", int, max_position_embeddings)
        fields["original_max_position_embeddings"] = original
        if fields["high_freq_factor"] <= fields["low_freq_factor"]:
            raise ConfigError("rope llama3 needs high_freq_factor above low_freq_factor")
    elif kind == "yarn":
        fields |= _read_yarn(rope, max_position_embeddings, fields["factor"])
    elif kind not in ("default", "linear"):
        raise ConfigError(f"rope type {kind!r} is not supported", "Supported: default, linear, llama3, yarn.")
    # Files written by converters may carry the original context along where it has no effect.
    if rope.take("original_max_position_embeddings", int, 1) < 1:
        raise ConfigError("rope original_max_position_embeddings must be positive")
    rope.take("finetuned", bool, None)  # says who stretched the context, not how
    for name, value in rope.raw.items():
        if name not in rope.read and value is not None:
            raise ConfigError(f"rope parameter {name!r} = {value!r} is not supported with type {kind!r}")
    factor = fields.get("factor", 1.0)
    if factor <= 0 or not math.isfinite(factor):
        raise ConfigError(f"rope factor must be positive, not {factor}")
    return RopeConfig(theta=theta, kind=kind, **fields)


def _read_yarn(rope: _Keys, max_position_embeddings: int, factor: float | None) -> dict[str, Any]:
    """Yarn's parameters, with its attention factor worked out (Peng et al., 2023, section 3.4)."""
    original = max(1, rope.take("original_max_position_embeddings", int, max_position_embeddings))
    factor = max_position_embeddings / original if factor is None else factor
    mscale, mscale_all_dim = rope.take("mscale", float, None), rope.take("mscale_all_dim", float, None)

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    ratio = temperature(mscale) / temperature(mscale_all_dim) if mscale and mscale_all_dim else temperature(1.0)
    given = rope.take("attention_factor", float, None)
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": rope.take("beta_fast", float, None) or 32.0,
        "beta_slow": rope.take("beta_slow", float, None) or 1.0,
        "truncate": "truncate" not in rope.raw or rope.take("truncate", bool, False),  # null means no
        "yarn_scale": ratio if given is None else given,
    }


def _read_packed(keys: _Keys) -> str:
    """How ``axon quantize`` stored the linear layers."""
    marker = keys.take("axon_packed", dict, None)
    if marker is None:
        return ""
    if marker.get("version") != 2 or marker.get("weights") not in ("int8", "int4"):
        raise ConfigError(f"axon_packed = {marker!r} is not a known format", "Run axon quantize again.")
    return str(marker["weights"])


def _only(keys: _Keys, name: str, neutral: Any, family: str, *families: str) -> Any:
    """A key that only some families compute; elsewhere anything but its neutral value is refused."""
    value = keys.take(name, type(neutral), neutral)
    if value != neutral and family not in families:
        raise ConfigError(f"{name} = {value!r} is not something {family} computes")
    return value


def _as_tuple(value: Any) -> tuple[int, ...]:
    """One id, several, or none."""
    ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ConfigError(f"token ids must be integers, not {value!r}")
    return ids


def _first(value: Any) -> int | None:
    ids = _as_tuple(value)
    return ids[0] if ids else None
