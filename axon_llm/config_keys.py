"""The keys of a ``config.json``, of which none that changes the numbers is overlooked.

Read next: ``rope_config.py``, ``config.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from axon_llm.errors import ConfigError

# Keys with no bearing on what the forward pass computes here. Anything outside this list and outside those that
# are read is refused.
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


class Keys:
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


def only(keys: Keys, name: str, neutral: Any, family: str, *families: str) -> Any:
    """A key that only some families compute; elsewhere anything but its neutral value is refused."""
    value = keys.take(name, type(neutral), neutral)
    if value != neutral and family not in families:
        raise ConfigError(f"{name} = {value!r} is not something {family} computes")
    return value


def ids_of(value: Any) -> tuple[int, ...]:
    """Token ids: one, several, or none."""
    ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ConfigError(f"token ids must be integers, not {value!r}")
    return ids


def first_id(value: Any) -> int | None:
    """The first of them, if there is one."""
    ids = ids_of(value)
    return ids[0] if ids else None
